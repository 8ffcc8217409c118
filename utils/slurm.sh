#!/usr/bin/env bash
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append
# A job of Slurm that is queued again as often as its training takes, each time from where it was:
#     OUTPUT=/shared/output/sft sbatch --nodes=1 --gres=gpu:8 --cpus-per-task=96 --time=8:00:00 utils/slurm.sh \
#         bash step1_supervised_finetuning/training_scripts/llama2/run_llama2_7b.sh
# or any other command to which --resume auto can be added, such as `srun python step1_.../main.py FLAGS...`.
# Before the time limit (300 seconds: a step and a save must fit into them) and at --max_hours the training saves its
# state and leaves. Only then the job is queued again: not where it fails, has no state to go on from, or is cancelled.
# (One that makes way for another job is queued again by Slurm itself.)
set -euo pipefail

: "${SLURM_JOB_ID:?is set by sbatch, which starts this script}"
LOG=$(mktemp)
trap 'rm -f "$LOG"' EXIT
exec {OUT}> >(trap '' HUP INT TERM USR1 && exec tee "$LOG")
TEE=$!
"$@" --resume auto >&"$OUT" 2>&1 {OUT}>&- &
TRAINING=$!
trap 'kill -s USR1 "$TRAINING" 2>/dev/null || true' USR1
trap 'kill -s TERM "$TRAINING" 2>/dev/null || true' TERM

while
    wait "$TRAINING" && STATUS=0 || STATUS=$?
    kill -0 "$TRAINING" 2>/dev/null # or else a signal to this script has ended the wait
do :; done
exec {OUT}>&-
wait "$TEE" || true

if ((STATUS == 75 || STATUS == 128 + $(kill -l USR1))); then # see docs/clusters.md
    if grep -q -- '--resume auto goes on from there' "$LOG"; then
        echo "job $SLURM_JOB_ID is queued again"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "error: job $SLURM_JOB_ID is not queued again, as no state was saved: has it come to a step in its --time?" >&2
    fi
fi
exit "$STATUS"
