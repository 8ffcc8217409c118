#!/usr/bin/env bash
# GPT-2 (137M), reward model, for texts of 64 + 48 tokens as in the ReMax paper's GPT-2 experiment (which took a ready-made
# sentiment classifier as reward).
# Extra flags are passed on and win; variables and machines: utils/launch.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-openai-community/gpt2}
DATA=${DATA:-Dahoas/synthetic-instruct-gptj-pairwise}
OUTPUT=${OUTPUT:-$ROOT/output/gpt2/reward}

launch \
    --data_path "$DATA" \
    --data_split 2,4,4 \
    --model_name_or_path "$MODEL" \
    --per_device_train_batch_size 32 \
    --per_device_eval_batch_size 32 \
    --max_seq_len 112 \
    --learning_rate 1e-5 \
    --weight_decay 0.1 \
    --num_train_epochs 2 \
    --gradient_accumulation_steps 1 \
    --lr_scheduler_type cosine \
    --num_warmup_steps 0 \
    --seed 1234 \
    --zero_stage 2 \
    --enable_tensorboard \
    --print_loss \
    "$@"
