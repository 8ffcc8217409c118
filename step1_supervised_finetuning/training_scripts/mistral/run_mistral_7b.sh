#!/usr/bin/env bash
# Mistral-7B, supervised. Part II of the ReMax paper starts from a finished chat model and skips this stage; the settings
# are those of the authors' Llama-2-7B script, for its 384 + 384 tokens.
# On eight GPUs of 80 GB nothing need be offloaded (--offload false), which spares time: docs/hardware.md.
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
# Fits 8 x 40 GB (23 GiB), 1 x 80 GB (46 GiB), 121 GiB of CPU memory: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-mistralai/Mistral-7B-v0.1}
DATA=${DATA:-HuggingFaceH4/ultrafeedback_binarized}
OUTPUT=${OUTPUT:-$ROOT/output/mistral_7b/sft}

launch_sft --learning_rate 1e-5 --num_train_epochs 2 \
    --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --max_seq_len 768 \
    --zero_stage 2 --offload --gradient_checkpointing "$@"
