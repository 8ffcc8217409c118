#!/usr/bin/env bash
# Llama-2-7B, supervised, with the settings of the ReMax authors' script of this name.
# On eight GPUs of 80 GB nothing need be offloaded (--offload false), which spares time: docs/hardware.md.
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
# Fits 8 x 40 GB (22 GiB), 1 x 80 GB (44 GiB), 113 GiB of CPU memory: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}
DATA=${DATA:-Dahoas/rm-static}
OUTPUT=${OUTPUT:-$ROOT/output/llama2_7b/sft}

launch_sft --learning_rate 1e-5 --num_train_epochs 2 \
    --per_device_train_batch_size 16 --per_device_eval_batch_size 16 --max_seq_len 512 \
    --zero_stage 2 --offload --gradient_checkpointing "$@"
