#!/usr/bin/env bash
# Llama-2-7B, ReMax, 32 rows per GPU where run_llama2_7b.sh beside it has one, and nothing offloaded: for GPUs of 80 GB.
# The hyper-parameters are the same, so an epoch has a thirty-second of the updates, each with less noise. A decode step of
# a few rows costs nearly what one of 64 does, so an epoch takes a fraction of the time; docs/hardware.md has the arithmetic.
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
# Fits 8 x 80 GB (37 GiB), not 1 x 80 GB (142 GiB), nothing offloaded: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-$ROOT/output/llama2_7b/sft}
REWARD_MODEL=${REWARD_MODEL-$ROOT/output/llama2_7b/reward}
DATA=${DATA:-Dahoas/rm-static}
OUTPUT=${OUTPUT:-$ROOT/output/llama2_7b_large_batch/remax}

launch_remax --actor_learning_rate 1e-6 --kl_ctl 0.05 --gamma 0.99 --clip_reward_value 5 \
    --per_device_generation_batch_size 32 --per_device_training_batch_size 8 \
    --max_prompt_seq_len 256 --max_answer_seq_len 256 --temperature 1 --top_p 0.9 --loss_aggregation sequence_mean \
    --actor_zero_stage 2 --reference_zero_stage 3 --reward_zero_stage 3 --actor_gradient_checkpointing \
    --save_at_final "$@"
