#!/usr/bin/env bash
# GPT-2 (137M), ReMax, with the 64 + 48 tokens of the ReMax paper's GPT-2 experiment; the rest as in the authors' scripts.
# Extra flags are passed on and win; variables and machines: utils/launch.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-$ROOT/output/gpt2/sft}
REWARD_MODEL=${REWARD_MODEL-$ROOT/output/gpt2/reward}
DATA=${DATA:-Dahoas/synthetic-instruct-gptj-pairwise}
OUTPUT=${OUTPUT:-$ROOT/output/gpt2/remax}

launch \
    --algo remax \
    --data_path "$DATA" \
    --data_split 2,4,4 \
    --actor_model_name_or_path "$MODEL" \
    ${REWARD_MODEL:+--reward_model_name_or_path "$REWARD_MODEL"} \
    --per_device_generation_batch_size 16 \
    --per_device_training_batch_size 16 \
    --per_device_eval_batch_size 16 \
    --max_prompt_seq_len 64 \
    --max_answer_seq_len 48 \
    --actor_learning_rate 1e-6 \
    --actor_weight_decay 0.1 \
    --num_train_epochs 1 \
    --lr_scheduler_type cosine \
    --num_warmup_steps 0 \
    --kl_ctl 0.05 \
    --gamma 0.99 \
    --clip_reward_value 5 \
    --temperature 1 \
    --top_p 0.9 \
    --logprobs_of model \
    --loss_aggregation token \
    --seed 2023 \
    --actor_zero_stage 2 \
    --reference_zero_stage 3 \
    --reward_zero_stage 3 \
    --disable_actor_dropout \
    --disable_reward_dropout \
    --enable_tensorboard \
    --print_answers \
    --save_answers \
    "$@"
