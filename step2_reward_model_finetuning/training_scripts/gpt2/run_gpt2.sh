#!/usr/bin/env bash
# GPT-2 (124M), reward model, for texts of 64 + 48 tokens as in the ReMax paper's GPT-2 experiment (which took a ready-made
# sentiment classifier as reward).
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
# Fits 8 x 16 GB (4.7 GiB), 1 x 16 GB (5.9 GiB), nothing offloaded: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-openai-community/gpt2}
DATA=${DATA:-Dahoas/synthetic-instruct-gptj-pairwise}
OUTPUT=${OUTPUT:-$ROOT/output/gpt2/reward}

launch_reward --learning_rate 1e-5 --num_train_epochs 2 \
    --per_device_train_batch_size 32 --per_device_eval_batch_size 32 --max_seq_len 112 \
    --zero_stage 2 "$@"
