#!/usr/bin/env bash
# Llama-2-7B, reward model, with the settings of the ReMax authors' script of this name.
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
# Fits 8 x 40 GB (35 GiB), not 1 x 80 GB (121 GiB), nothing offloaded: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}
DATA=${DATA:-Dahoas/rm-static}
OUTPUT=${OUTPUT:-$ROOT/output/llama2_7b/reward}

launch_reward --learning_rate 1e-5 --num_train_epochs 2 \
    --per_device_train_batch_size 16 --per_device_eval_batch_size 16 --max_seq_len 512 \
    --zero_stage 2 --gradient_checkpointing "$@"
