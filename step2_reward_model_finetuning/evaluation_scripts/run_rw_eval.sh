#!/usr/bin/env bash
# Scores of a reward model for two built-in examples, or for a file: --data_path FILE --output scores.jsonl; more flags:
# rw_eval.py --help.
source "$(dirname "${BASH_SOURCE[0]}")/../../utils/launch.sh"
MODEL=${MODEL:-$ROOT/output/opt_350m/reward}

"$PYTHON" "$STAGE/rw_eval.py" --model_name_or_path "$MODEL" "$@"
