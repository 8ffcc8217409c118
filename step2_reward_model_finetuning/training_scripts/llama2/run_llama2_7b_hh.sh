#!/usr/bin/env bash
# Llama-2-7B, reward model, as in Part I of the ReMax paper: full-hh-rlhf, 36 rows per GPU; accuracy 63 % there.
# Everything else is as in run_llama2_7b.sh beside it.
# Fits 8 x 80 GB (44 GiB), not 1 x 80 GB (130 GiB), nothing offloaded: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
export DATA=${DATA:-Dahoas/full-hh-rlhf}
export OUTPUT=${OUTPUT:-$ROOT/output/llama2_7b_hh/reward}

exec bash "$STAGE/training_scripts/llama2/run_llama2_7b.sh" --per_device_train_batch_size 36 --per_device_eval_batch_size 36 "$@"
