#!/usr/bin/env bash
# The built-in corpus (python -m remax.demo.prepare), reward model: under a minute on two CPU cores.
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-$ROOT/output/demo/models/reward}
DATA=${DATA:-$ROOT/output/demo/data}
OUTPUT=${OUTPUT:-$ROOT/output/demo/reward}

launch_finetuning --learning_rate 2e-3 --weight_decay 0.1 --num_train_epochs 3 \
    --data_split 4,4,2 --seed 1234 \
    --per_device_train_batch_size $((32 / RANKS)) --per_device_eval_batch_size 50 --max_seq_len 96 \
    --zero_stage 2 --report_to tensorboard "$@"
