#!/usr/bin/env bash
# Llama-2-7B, Hydra-ReMax: actor, reference and reward model are one frozen model, from step 2's script of this name, and one
# set of adapters of rank 16. By arithmetic one GPU of 24 GB holds it (docs/hydra.md). Other settings as llama2/run_llama2_7b.sh.
# Extra flags are passed on and win; the remaining settings, variables and machines: utils/launch.sh.
# Fits 8 x 24 GB (21 GiB), 1 x 24 GB (21 GiB), nothing offloaded: by the planner, on each GPU (docs/hardware.md).
source "$(dirname "${BASH_SOURCE[0]}")/../../../utils/launch.sh"
MODEL=${MODEL:-$ROOT/output/hydra_7b/hydra_sft}
REWARD_MODEL=${REWARD_MODEL-} # the model's own score head
DATA=${DATA:-Dahoas/rm-static}
OUTPUT=${OUTPUT:-$ROOT/output/hydra_7b/remax}

launch_remax --share all --only_optimize_lora --actor_lora_dim 16 --actor_lora_alpha 32 --actor_lora_module_name all-linear \
    --actor_lora_learning_rate 1e-5 --kl_ctl 0.05 --gamma 0.99 --clip_reward_value 5 \
    --per_device_generation_batch_size 4 --per_device_training_batch_size 4 \
    --max_prompt_seq_len 256 --max_answer_seq_len 256 --temperature 1 --top_p 0.9 \
    --actor_zero_stage 2 --actor_gradient_checkpointing --save_at_final "$@"
