#!/usr/bin/env bash
# Mistral-7B-Instruct-v0.2, ReMax, with the settings of Part II of the ReMax paper and of the model card of its
# Mistral-7B-ReMax-v0.1: KL over the rest of the answer, differences clipped at 1, 32 rows per GPU. The prompts there came
# from lmsys-chat-1m and the reward from UltraRM-13B; here both come from UltraFeedback.
# On eight GPUs of 80 GB nothing need be offloaded, which spares time: docs/hardware.md has the flags.
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
# Fits 8 x 40 GB (32 GiB), 1 x 80 GB (55 GiB), 148 GiB of CPU memory: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-mistralai/Mistral-7B-Instruct-v0.2}
REWARD_MODEL=${REWARD_MODEL-$ROOT/output/mistral_7b/reward}
DATA=${DATA:-HuggingFaceH4/ultrafeedback_binarized}
OUTPUT=${OUTPUT:-$ROOT/output/mistral_7b/remax}

launch_remax --actor_learning_rate 5e-7 --kl_ctl 0.1 --gamma 1 --clip_reward_value 1 --penalty full_step \
    --per_device_generation_batch_size 32 --per_device_training_batch_size 32 \
    --max_prompt_seq_len 384 --max_answer_seq_len 384 --temperature 0.7 --top_p 0.9 \
    --actor_zero_stage 2 --reference_zero_stage 3 --reward_zero_stage 3 \
    --offload --offload_reference_model --offload_reward_model --actor_gradient_checkpointing "$@"
