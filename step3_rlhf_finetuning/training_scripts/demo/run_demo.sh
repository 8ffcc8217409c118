#!/usr/bin/env bash
# The built-in corpus (python -m remax.demo.prepare), ReMax: about a minute on two CPU cores.
# Extra flags are passed on and win; variables and machines: utils/launch.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-$ROOT/output/demo/sft}
REWARD_MODEL=${REWARD_MODEL-$ROOT/output/demo/reward}
DATA=${DATA:-$ROOT/output/demo/data}
OUTPUT=${OUTPUT:-$ROOT/output/demo/remax}

launch --algo remax --data_split 4,4,2 --seed 2023 \
    --actor_model_name_or_path "$MODEL" ${REWARD_MODEL:+--reward_model_name_or_path "$REWARD_MODEL"} \
    --per_device_generation_batch_size $((64 / RANKS)) --per_device_training_batch_size $((64 / RANKS)) \
    --per_device_eval_batch_size 50 --max_prompt_seq_len 48 --max_answer_seq_len 40 \
    --actor_learning_rate 6e-4 --actor_weight_decay 0 --lr_scheduler_type cosine --num_warmup_steps 5 \
    --num_train_epochs 3 --max_steps 60 --kl_ctl 0.3 --gamma 1 \
    --actor_zero_stage 2 --reference_zero_stage 3 --reward_zero_stage 3 \
    --disable_actor_dropout --disable_reward_dropout --save_answers --save_at_final \
    --report_to tensorboard "$@"
