#!/usr/bin/env bash
# The built-in corpus (python -m remax.demo.prepare), supervised: under a minute on two CPU cores.
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-$ROOT/output/demo/models/actor}
DATA=${DATA:-$ROOT/output/demo/data}
OUTPUT=${OUTPUT:-$ROOT/output/demo/sft}

launch_finetuning --learning_rate 3e-3 --weight_decay 0 --num_train_epochs 5 \
    --data_split 4,4,2 --seed 2023 \
    --per_device_train_batch_size $((32 / RANKS)) --per_device_eval_batch_size 50 --max_seq_len 96 \
    --zero_stage 2 --logging_steps 50 --report_to tensorboard "$@"
