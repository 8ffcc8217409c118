#!/usr/bin/env bash
# Llama-2-7B, steps 1 and 2 at once (--loss hydra): one model with a language head and a score head, from the pretrained one.
# It learns from the rows of both steps; all else is as in the scripts llama2/run_llama2_7b.sh of the two steps.
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
# Fits 8 x 40 GB (26 GiB), 1 x 80 GB (48 GiB), 113 GiB of CPU memory: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}
DATA=${DATA:-Dahoas/rm-static}
OUTPUT=${OUTPUT:-$ROOT/output/hydra_7b/hydra_sft}

launch_reward --loss hydra --data_split 0,6,4 --learning_rate 1e-5 --num_train_epochs 2 \
    --per_device_train_batch_size 16 --per_device_eval_batch_size 16 --max_seq_len 512 \
    --zero_stage 2 --offload --gradient_checkpointing "$@"
