#!/usr/bin/env bash
# OPT-1.3B, supervised, with the settings of the ReMax authors' script of this name.
# Extra flags are passed on and win; variables and machines: utils/launch.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-facebook/opt-1.3b}
DATA=${DATA:-Dahoas/rm-static}
OUTPUT=${OUTPUT:-$ROOT/output/opt_1.3b/sft}

launch \
    --data_path "$DATA" \
    --data_split 2,4,4 \
    --model_name_or_path "$MODEL" \
    --per_device_train_batch_size 16 \
    --per_device_eval_batch_size 16 \
    --max_seq_len 512 \
    --learning_rate 1e-5 \
    --weight_decay 0 \
    --num_train_epochs 4 \
    --gradient_accumulation_steps 1 \
    --lr_scheduler_type cosine \
    --num_warmup_steps 0 \
    --seed 2023 \
    --zero_stage 2 \
    --gradient_checkpointing \
    --enable_tensorboard \
    --print_loss \
    "$@"
