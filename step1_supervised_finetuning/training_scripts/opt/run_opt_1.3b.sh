#!/usr/bin/env bash
# OPT-1.3B, supervised, with the settings of the ReMax authors' script of this name.
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
# Fits 8 x 16 GB (9.0 GiB), 1 x 40 GB (26 GiB), nothing offloaded: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-facebook/opt-1.3b}
DATA=${DATA:-Dahoas/rm-static}
OUTPUT=${OUTPUT:-$ROOT/output/opt_1.3b/sft}

launch_sft --learning_rate 1e-5 --num_train_epochs 4 \
    --per_device_train_batch_size 16 --per_device_eval_batch_size 16 --max_seq_len 512 \
    --zero_stage 2 --gradient_checkpointing "$@"
