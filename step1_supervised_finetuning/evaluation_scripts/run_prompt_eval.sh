#!/usr/bin/env bash
# Answers of a model before and after supervised fine-tuning, one under the other (BASELINE= for the second one alone);
# flags: prompt_eval.py --help.
source "$(dirname "${BASH_SOURCE[0]}")/../../utils/launch.sh"
BASELINE=${BASELINE-facebook/opt-1.3b}
MODEL=${MODEL:-$ROOT/output/opt_1.3b/sft}

"$PYTHON" "$STAGE/prompt_eval.py" ${BASELINE:+--model_name_or_path_baseline "$BASELINE"} \
    --model_name_or_path_finetune "$MODEL" "$@"
