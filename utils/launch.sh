# shellcheck shell=bash
# Sourced by the shell scripts of the stages. `launch FLAGS...` runs main.py of the script's stage on every rank; what the
# console shows of this run is also kept in $OUTPUT/training.log, and the launcher's exit status is the script's. `launch_sft`,
# `launch_reward` and `launch_remax` add the settings that the scripts of a stage share. Flags given to any of them come
# last and win. $RANKS is the number of ranks on this machine. Set by the script, unless the user has:
#   MODEL, REWARD_MODEL, DATA, OUTPUT   models to start from, data (several names with spaces between them), and the
#                                       folder of the results
# Set by the user, if at all:
#   NUM_GPUS     ranks on each machine (default: every GPU there is, or those of CUDA_VISIBLE_DEVICES; without any, 2
#                ranks on the CPU)
#   HOSTFILE     the machines, as DeepSpeed wants them listed ("name slots=8" a line)
#   RESUME       auto: go on from the newest checkpoint in $OUTPUT, where there is one; or a checkpoint's folder
#   MASTER_PORT  where the ranks meet (default: a free port)
set -euo pipefail

STAGE=$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)
STAGE=${STAGE%/*_scripts*}
ROOT=${STAGE%/*}
if ! command -v deepspeed >/dev/null; then PATH=$ROOT/.venv/bin:$PATH; fi # made by `make`, but not activated
if ! command -v deepspeed >/dev/null; then
    echo "error: deepspeed is not on the PATH; activate the environment in which you ran \`pip install -e .\`" >&2
    exit 2
fi
PYTHON=$(dirname "$(command -v deepspeed)")/python # the one that the launcher starts
if ! [[ -x $PYTHON ]]; then PYTHON=python3; fi
# DeepSpeed's compiled operators, where `make` keeps them, too: they are compiled once.
if [[ -f ${PYTHON%/bin/*}/.ready ]]; then
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-${PYTHON%/bin/*}/torch_extensions}
fi

count_gpus() { # torch takes two seconds to tell; it is not asked where the system shows no device of NVIDIA or AMD
    local pattern
    for pattern in '/dev/nvidia*' '/dev/nvhost*' /dev/kfd /dev/dxg; do
        if [[ ${DS_ACCELERATOR:-} == cuda ]] || compgen -G "$pattern" >/dev/null; then
            "$PYTHON" -c 'import torch; print(torch.cuda.device_count())'
            return
        fi
    done
    echo 0
}

refuse() {
    echo "error: $1" >&2
    exit 2
}

if [[ ${DS_ACCELERATOR:-} == cpu ]]; then RANKS=0; else RANKS=$(count_gpus); fi
if ((RANKS == 0)) && [[ -z ${HOSTFILE:-} ]]; then
    export DS_ACCELERATOR=cpu
    NUM_GPUS=${NUM_GPUS:-2}
fi
DEVICES=() # of CUDA_VISIBLE_DEVICES, which the launcher overlooks as soon as it is told a number
if [[ -n ${HOSTFILE:-} ]]; then
    [[ -f $HOSTFILE ]] || refuse "HOSTFILE $HOSTFILE: no such file (looked from $PWD)" # the launcher would go on alone
    ((RANKS)) || RANKS=$(sed -n 's/^[^#]*slots=\([0-9]*\).*/\1/p' "$HOSTFILE" | head -n 1)
    ((RANKS)) || refuse "HOSTFILE $HOSTFILE: expected lines such as \"name slots=8\""
elif ((RANKS)) && [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    [[ $CUDA_VISIBLE_DEVICES =~ ^[0-9]+(,[0-9]+)*$ ]] ||
        refuse "CUDA_VISIBLE_DEVICES $CUDA_VISIBLE_DEVICES: the launcher takes numbers only, such as 2,3"
    IFS=, read -ra DEVICES <<<"$CUDA_VISIBLE_DEVICES"
    DEVICES=("${DEVICES[@]:0:${NUM_GPUS:-$RANKS}}")
    ((${#DEVICES[@]} == ${NUM_GPUS:-$RANKS})) || refuse "NUM_GPUS $NUM_GPUS: CUDA_VISIBLE_DEVICES has ${#DEVICES[@]}"
fi
if ((RANKS)); then export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}; fi
RANKS=${NUM_GPUS:-$RANKS}
export USERS_DATA=${USERS_DATA-${DATA:-}} # before the script sets its own; kept by a script that starts another one

launch() {
    local port=${MASTER_PORT:-$("$PYTHON" -c 'import socket; print(socket.create_server(("", 0)).getsockname()[1])')}
    local launcher=(deepspeed --log_level critical --master_port "$port")
    if ((${#DEVICES[@]})); then
        launcher+=(--include "localhost:$(IFS=, && echo "${DEVICES[*]}")")
    elif [[ -n ${NUM_GPUS:-} ]]; then
        launcher+=(--num_gpus "$NUM_GPUS")
    fi
    if [[ -n ${HOSTFILE:-} ]]; then
        launcher+=(--hostfile "$HOSTFILE")
        if [[ -z ${DS_ENV_FILE:-} ]]; then share_environment; fi
    fi
    local data=("$DATA")
    if [[ -n $USERS_DATA && ! -e $DATA ]]; then read -ra data <<<"$DATA"; fi
    data=(--data_path "${data[@]}")
    # The script's own data never mix with data that the user chose.
    if [[ -z $USERS_DATA && " $*" == *" --sft"[_-]only[_-]data[_-]path* ]]; then data=(); fi
    mkdir -p "$OUTPUT"
    local log=$OUTPUT/training.log status=0
    if [[ -n ${RESUME:-} ]]; then set -- --resume "$RESUME" "$@"; fi
    if [[ -f $log ]]; then mv "$log" "$log.before"; fi
    start_launcher "$log" "${launcher[@]}" "$STAGE/main.py" "${data[@]}" --output_dir "$OUTPUT" "$@"
    await_launcher || status=$?
    if [[ -f $log.before ]]; then # a run that was refused leaves that of the run before
        if ((status == 2)); then
            mv "$log.before" "$log"
        elif [[ " $*" =~ .*\ --resume[\ =]([^\ ]+) && ${BASH_REMATCH[1]} != never ]]; then # of one run, start after start
            cat "$log" >>"$log.before" && mv "$log.before" "$log"
        else
            rm "$log.before"
        fi
    fi
    return "$status"
}

# The launcher has a process group of its own: Ctrl-C comes to this script alone, which hands it on to the ranks. (set -m
# would do so too, and stop a script that runs in a terminal's background.) tee outlives all, so that the last words of the
# ranks are kept as well.
OWN_GROUP='import os, signal, sys
os.setpgid(0, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # the shell has it ignored in the background
os.execvp(sys.argv[1], sys.argv[1:])'
PATIENCE=60 # seconds from a signal to SIGKILL, and those that ranks ask for which are saving
asked_for() { cat "$RANK_FILES/patience" 2>/dev/null || echo 0; }

start_launcher() { # LOG COMMAND...
    local name
    RANK_FILES=$(mktemp -d) # what the ranks leave there is said in utils/stopping.py
    export RANK_FILES SCRIPT_PID=$$
    exec {OUT}> >(trap '' HUP INT TERM USR1 && exec tee "$1")
    TEE=$!
    STOPPED_BY=''
    "$PYTHON" -c "$OWN_GROUP" "${@:2}" >&"$OUT" 2>&1 </dev/null {OUT}>&- &
    LAUNCHER=$!
    for name in HUP INT TERM USR1; do
        # shellcheck disable=SC2064
        trap "stop_ranks $name" "$name"
    done
}

rank_pids() { cat "$RANK_FILES"/rank.* 2>/dev/null || true; }

stop_ranks() { # SIGNAL
    local pids
    if [[ -z $STOPPED_BY ]]; then
        STOPPED_BY=$1 DEADLINE=$((SECONDS + PATIENCE))
        pids=$(rank_pids)
        # shellcheck disable=SC2086
        if [[ -z $pids ]] || ! kill -s "$1" $pids 2>/dev/null; then # the ranks are still to come, or on other machines
            kill -TERM -- "-$LAUNCHER" 2>/dev/null || kill -TERM "$LAUNCHER" 2>/dev/null || true
        fi
    elif [[ $1 == INT ]]; then
        DEADLINE=0
        rm -f "$RANK_FILES/patience"
    fi
}

await_launcher() { # says what ended the ranks, if it was not their own doing; the script's exit status
    local status=0 name rank number=0 words='' leftover
    { # without the shell's own words about processes that a signal has ended
        while
            wait "$LAUNCHER" && status=0 || status=$?
            kill -0 "$LAUNCHER" # or else a signal to this script has ended the wait
        do
            while [[ -n $STOPPED_BY ]] && kill -0 "$LAUNCHER"; do
                if ((SECONDS >= DEADLINE + $(asked_for))); then kill -KILL -- "-$LAUNCHER" || true; fi
                sleep 0.2 || true
            done
        done
    } 2>/dev/null
    leftover=$(cd "$RANK_FILES" && compgen -G 'rank.*' | sed 's/rank\.//' | paste -sd, | sed 's/,/ or /g') || true
    read -r name rank 2>/dev/null <"$RANK_FILES/signal" || true
    if [[ -n $STOPPED_BY ]]; then
        number=$(kill -l "$STOPPED_BY") words="stopped by SIG$STOPPED_BY, which was sent to this script"
    elif ((status > 192)); then # the launcher's way to say that a signal ended a rank: 256 - its number
        number=$((256 - status)) words="${leftover:+rank $leftover}"
        words="${words:-a rank} was killed by signal $number$(why_killed "$number")"
    elif ((status > 128)) && [[ -n ${name:-} ]]; then
        number=$(kill -l "$name") words="stopped by $name, which was sent to rank $rank"
    elif ((status > 128)) && launcher_left_ranks; then
        number=$((status - 128)) words="the launcher was killed by signal $number"
    elif ((status == 1)) && [[ -n ${name:-} && ! -e $RANK_FILES/left ]]; then # with 1 it ends when it was told to
        number=$(kill -l "$name") words="the launcher was told to stop, and sent $name to the ranks"
    elif ((status == 0)) && { [[ -n $leftover ]] || { [[ ! -e $RANK_FILES/left ]] && launcher_left_ranks; }; }; then
        number=9 words="the launcher was killed" # its lower half; the upper one sees no harm in that
    fi
    trap - HUP INT TERM USR1
    if ((number)); then
        end_all
        status=$((128 + number))
        echo "error: $words" >&"$OUT"
    fi
    exec {OUT}>&-
    wait "$TEE" || true
    rm -rf "$RANK_FILES"
    return "$status"
}

launcher_left_ranks() { kill -0 -- "-$LAUNCHER" 2>/dev/null; }

end_all() { # what a dead launcher has left
    local end=$((SECONDS + 5 + PATIENCE / 6)) # until they have seen it, and said how long they need
    kill -TERM -- "-$LAUNCHER" 2>/dev/null || true
    while launcher_left_ranks && ((SECONDS < end + $(asked_for))); do sleep 0.2; done
    kill -KILL -- "-$LAUNCHER" 2>/dev/null || true
}

# By itself the launcher hands few variables on to other machines. It reads the others from a file, which is readable by its
# owner alone and removed at the end; a user's own (.deepspeed_env here or at home) goes on to be read, and wins.
TRAVELLERS='^(HF_|HUGGING|TRANSFORMERS_|DATASETS_|WANDB_|DEEPSPEED_|DS_|TORCH|PYTORCH_|TRITON_|CUDA_(DEVICE|LAUNCH|HOME)|GLOO_|OMP_|MKL_|'
TRAVELLERS+='TOKENIZERS_|TENSORBOARD|(HTTPS?|NO|ALL)_PROXY$|(https?|no|all)_proxy$)'
share_environment() {
    local name value
    DS_ENV_FILE=$(mktemp)
    export DS_ENV_FILE
    trap 'rm -f "$DS_ENV_FILE"' EXIT
    for name in $(compgen -e | grep -E "$TRAVELLERS"); do
        value=${!name}
        if [[ $name != DS_ENV_FILE && $value != *$'\n'* ]]; then # the launcher puts double quotes round most values
            printf '%s=%s\n' "$name" "$(printf '%s' "$value" | sed 's/[\\"$`]/\\&/g')"
        fi
    done >"$DS_ENV_FILE"
    for name in ~/.deepspeed_env .deepspeed_env; do
        if [[ -f $name ]]; then grep '=' "$name" >>"$DS_ENV_FILE" || true; fi
    done
}

why_killed() { if (($1 == 9)); then echo " (by hand, or by the system for want of memory: dmesg tells)"; fi; }

launch_finetuning() { # steps 1 and 2
    launch --model_name_or_path "$MODEL" --gradient_accumulation_steps 1 \
        --lr_scheduler_type cosine --num_warmup_steps 0 "$@"
}

# What the ReMax authors' scripts of a stage have in common; a script states the rest.
COMMON=(--data_split "2,4,4" --report_to tensorboard)
launch_sft() { launch_finetuning "${COMMON[@]}" --weight_decay 0 --seed 2023 --print_loss "$@"; }
launch_reward() { launch_finetuning "${COMMON[@]}" --weight_decay 0.1 --seed 1234 --print_loss "$@"; }
launch_remax() {
    launch "${COMMON[@]}" --algo remax \
        --actor_model_name_or_path "$MODEL" ${REWARD_MODEL:+--reward_model_name_or_path "$REWARD_MODEL"} \
        --actor_weight_decay 0.1 --num_train_epochs 1 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 2023 \
        --disable_actor_dropout --disable_reward_dropout --logprobs_of model --loss_aggregation token \
        --top_k 50 --per_device_eval_batch_size 32 --print_answers --save_answers "$@"
}
