# Sourced by the training scripts. `launch FLAGS...` runs main.py of the script's stage on every rank; what the console
# shows is also kept in $OUTPUT/training.log, and the launcher's exit status is the script's. Set by the user, if at all:
#   OUTPUT       folder of the results
#   NUM_GPUS     ranks on each machine (default: every GPU there is; without any, 2 ranks on the CPU)
#   HOSTFILE     the machines, as DeepSpeed wants them listed ("name slots=8" a line)
#   MASTER_PORT  where the ranks meet (default: a free port)
set -euo pipefail

STAGE=$(cd "$(dirname "${BASH_SOURCE[1]}")/../.." && pwd)
ROOT=$(dirname "$STAGE")
if ! command -v deepspeed >/dev/null; then PATH=$ROOT/.venv/bin:$PATH; fi # made by `make`, but not activated

launch() {
    if ! command -v deepspeed >/dev/null; then
        echo "error: deepspeed is not on the PATH; activate the environment in which you ran \`pip install -e .\`" >&2
        return 2
    fi
    local python
    python=$(dirname "$(command -v deepspeed)")/python
    if [[ -z ${DS_ACCELERATOR:-} ]] && ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
        export DS_ACCELERATOR=cpu
    fi
    if [[ ${DS_ACCELERATOR:-} == cpu ]]; then NUM_GPUS=${NUM_GPUS:-2}; fi
    local port=${MASTER_PORT:-$("$python" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')}
    local launcher=(deepspeed --log_level critical --master_port "$port")
    if [[ -n ${NUM_GPUS:-} ]]; then launcher+=(--num_gpus "$NUM_GPUS"); fi
    if [[ -n ${HOSTFILE:-} ]]; then launcher+=(--hostfile "$HOSTFILE"); fi
    mkdir -p "$OUTPUT"
    # tee outlives Ctrl-C, so that the last words of the ranks are kept as well.
    "${launcher[@]}" "$STAGE/main.py" --output_dir "$OUTPUT" "$@" 2>&1 | tee -a -i "$OUTPUT/training.log"
}
