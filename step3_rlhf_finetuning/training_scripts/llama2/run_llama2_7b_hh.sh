#!/usr/bin/env bash
# Llama-2-7B, ReMax, as in Part I of the ReMax paper: full-hh-rlhf, KL 0.1.
# Everything else is as in run_llama2_7b.sh beside it.
# Fits 8 x 24 GB (21 GiB), 1 x 80 GB (41 GiB), 138 GiB of CPU memory: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
export MODEL=${MODEL:-$ROOT/output/llama2_7b_hh/sft}
export REWARD_MODEL=${REWARD_MODEL-$ROOT/output/llama2_7b_hh/reward}
export DATA=${DATA:-Dahoas/full-hh-rlhf}
export OUTPUT=${OUTPUT:-$ROOT/output/llama2_7b_hh/remax}

exec bash "$STAGE/training_scripts/llama2/run_llama2_7b.sh" --kl_ctl 0.1 "$@"
