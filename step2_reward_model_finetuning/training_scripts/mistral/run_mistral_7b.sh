#!/usr/bin/env bash
# Mistral-7B, reward model. Part II of the ReMax paper scored with UltraRM-13B; this trains one on the same kind of data,
# with the settings of the authors' Llama-2-7B script, for 384 + 384 tokens.
# On eight GPUs of 80 GB nothing need be offloaded (--offload false), which spares time: docs/hardware.md.
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
# Fits 8 x 40 GB (25 GiB), 1 x 80 GB (49 GiB), 119 GiB of CPU memory: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-mistralai/Mistral-7B-v0.1}
DATA=${DATA:-HuggingFaceH4/ultrafeedback_binarized}
OUTPUT=${OUTPUT:-$ROOT/output/mistral_7b/reward}

launch_reward --learning_rate 1e-5 --num_train_epochs 2 \
    --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --max_seq_len 768 \
    --zero_stage 2 --offload --gradient_checkpointing "$@"
