#!/usr/bin/env bash
# Answers of a model before and after ReMax, one under the other, by step 1's program; flags: prompt_eval.py --help.
source "$(dirname "${BASH_SOURCE[0]}")/../../utils/launch.sh"
BASELINE=${BASELINE:-$ROOT/output/opt_1.3b/sft}
MODEL=${MODEL:-$ROOT/output/opt_1.3b/remax/actor}

"$PYTHON" "$ROOT/step1_supervised_finetuning/prompt_eval.py" \
    --model_name_or_path_baseline "$BASELINE" \
    --model_name_or_path_finetune "$MODEL" \
    "$@"
