#!/usr/bin/env bash
# OPT-1.3B with a reward model of OPT-350M, ReMax, with the settings of the ReMax authors' script of this name.
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
# Fits 8 x 16 GB (8.4 GiB), 1 x 40 GB (28 GiB), nothing offloaded: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-$ROOT/output/opt_1.3b/sft}
REWARD_MODEL=${REWARD_MODEL-$ROOT/output/opt_350m/reward}
DATA=${DATA:-Dahoas/rm-static}
OUTPUT=${OUTPUT:-$ROOT/output/opt_1.3b/remax}

launch_remax --actor_learning_rate 1e-6 --kl_ctl 0.05 --gamma 0.99 --clip_reward_value 5 \
    --per_device_generation_batch_size 4 --per_device_training_batch_size 4 \
    --max_prompt_seq_len 256 --max_answer_seq_len 256 --temperature 1 --top_p 0.9 \
    --actor_zero_stage 2 --reference_zero_stage 3 --reward_zero_stage 3 --actor_gradient_checkpointing "$@"
