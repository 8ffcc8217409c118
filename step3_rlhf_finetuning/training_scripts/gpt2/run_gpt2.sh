#!/usr/bin/env bash
# GPT-2 (124M), ReMax, with the 64 + 48 tokens of the ReMax paper's GPT-2 experiment; the rest as in the authors' scripts.
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
# Fits 8 x 16 GB (1.9 GiB), 1 x 16 GB (3.5 GiB), nothing offloaded: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-$ROOT/output/gpt2/sft}
REWARD_MODEL=${REWARD_MODEL-$ROOT/output/gpt2/reward}
DATA=${DATA:-Dahoas/synthetic-instruct-gptj-pairwise}
OUTPUT=${OUTPUT:-$ROOT/output/gpt2/remax}

launch_remax --actor_learning_rate 1e-6 --kl_ctl 0.05 --gamma 0.99 --clip_reward_value 5 \
    --per_device_generation_batch_size 16 --per_device_training_batch_size 16 \
    --max_prompt_seq_len 64 --max_answer_seq_len 48 --temperature 1 --top_p 0.9 \
    --actor_zero_stage 2 --reference_zero_stage 3 --reward_zero_stage 3 "$@"
