#!/usr/bin/env bash
# GPT-2 (124M), supervised, for the short texts of the ReMax paper's GPT-2 experiment: 64 + 48 tokens. The paper took its
# prompts from IMDB; that set holds no answers, so an instruction set with short ones stands here.
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
# Fits 8 x 16 GB (2.9 GiB), 1 x 16 GB (4.1 GiB), nothing offloaded: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-openai-community/gpt2}
DATA=${DATA:-Dahoas/synthetic-instruct-gptj-pairwise}
OUTPUT=${OUTPUT:-$ROOT/output/gpt2/sft}

launch_sft --learning_rate 1e-5 --num_train_epochs 2 \
    --per_device_train_batch_size 32 --per_device_eval_batch_size 32 --max_seq_len 112 \
    --zero_stage 2 "$@"
