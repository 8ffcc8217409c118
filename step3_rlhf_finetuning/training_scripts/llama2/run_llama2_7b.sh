#!/usr/bin/env bash
# Llama-2-7B, ReMax, with the settings of the ReMax authors' script of this name.
# On eight GPUs of 80 GB nothing need be offloaded, which spares time: docs/hardware.md has the flags.
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
# Fits 8 x 24 GB (21 GiB), 1 x 80 GB (41 GiB), 138 GiB of CPU memory: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-$ROOT/output/llama2_7b/sft}
REWARD_MODEL=${REWARD_MODEL-$ROOT/output/llama2_7b/reward}
DATA=${DATA:-Dahoas/rm-static}
OUTPUT=${OUTPUT:-$ROOT/output/llama2_7b/remax}

launch_remax --actor_learning_rate 1e-6 --kl_ctl 0.05 --gamma 0.99 --clip_reward_value 5 \
    --per_device_generation_batch_size 1 --per_device_training_batch_size 1 \
    --max_prompt_seq_len 256 --max_answer_seq_len 256 --temperature 1 --top_p 0.9 --loss_aggregation sequence_mean \
    --actor_zero_stage 2 --reference_zero_stage 3 --reward_zero_stage 3 \
    --offload --offload_reference_model --offload_reward_model --actor_gradient_checkpointing \
    --save_at_final "$@"
