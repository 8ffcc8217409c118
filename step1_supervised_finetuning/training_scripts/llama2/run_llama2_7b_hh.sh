#!/usr/bin/env bash
# Llama-2-7B, supervised, as in Part I of the ReMax paper: full-hh-rlhf, 30 rows per GPU.
# Everything else is as in run_llama2_7b.sh beside it.
# Fits 8 x 40 GB (26 GiB), 1 x 80 GB (48 GiB), 113 GiB of CPU memory: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
export DATA=${DATA:-Dahoas/full-hh-rlhf}
export OUTPUT=${OUTPUT:-$ROOT/output/llama2_7b_hh/sft}

exec bash "$STAGE/training_scripts/llama2/run_llama2_7b.sh" --per_device_train_batch_size 30 --per_device_eval_batch_size 30 "$@"
