#!/usr/bin/env bash
# The three stages on real preference pairs, from nothing: a BPE tokenizer trained on them, small Llamas from config,
# two ranks on a CPU, fixed seeds. About twenty minutes on two free cores for the three stages, and as much again for the
# other methods and their win rates (estimates). Set by the user, if at all:
#   DATA          folder with train.jsonl.gz and test.jsonl.gz, rows {prompt, chosen, rejected}
#   OUTPUT        folder of the results (default: output/real_data)
#   STAGES        which parts to run, in order (default: prepare sft reward referee remax measure methods winrates report)
#   METHODS       from the supervised policy, compared by `winrates`; a policy, answers or verdicts that are there already
#                 are not made again (default: dpo r_dpo ppo remax remax_calibrated rloo_2 rloo_4 grpo reinforce)
#   KEEP_LENGTHS  1: train on every pair; without it, on pairs in which the longer answer wins as often as not
#   SEED          of weights, order and sampling (default: 1)
#   SEEDS         those of the methods' trainings and answers (default: SEED); another one's are in OUTPUT/seed_N. All start
#                 from the one supervised policy, reward model and referee of SEED
#   SFT_FLAGS, REWARD_FLAGS, REMAX_FLAGS, PAIR_FLAGS   further flags of a stage's main.py; they win
#   DOCUMENT      a document whose tables of the methods `report` makes anew, such as docs/results/real_data.md
#   NUM_GPUS      ranks (default: every GPU there is; without any, 2 on the CPU)
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
DATA=${DATA:-$ROOT/../shared/data/alpaca_prefs}
OUTPUT=${OUTPUT:-$ROOT/output/real_data}
STAGES=${STAGES:-prepare sft reward referee remax measure methods winrates report}
METHODS=${METHODS:-dpo r_dpo ppo remax remax_calibrated rloo_2 rloo_4 grpo reinforce}
SEED=${SEED:-1}
SEEDS=${SEEDS:-$SEED}
read -ra SFT_FLAGS <<<"${SFT_FLAGS:-}"
read -ra REWARD_FLAGS <<<"${REWARD_FLAGS:-}"
read -ra REMAX_FLAGS <<<"${REMAX_FLAGS:-}"
read -ra PAIR_FLAGS <<<"${PAIR_FLAGS:-}"

for name in train test; do
    if [[ ! -f $DATA/$name.jsonl.gz ]]; then
        echo "error: DATA: no file $DATA/$name.jsonl.gz; set DATA to a folder with train.jsonl.gz and test.jsonl.gz," \
            "rows {prompt, chosen, rejected}" >&2
        exit 2
    fi
done
if ! command -v deepspeed >/dev/null; then PATH=$ROOT/.venv/bin:$PATH; fi # made by `make`, but not activated
export PATH PYTHONPATH=$ROOT:$ROOT/benchmarks${PYTHONPATH:+:$PYTHONPATH} DATA OUTPUT
mkdir -p "$OUTPUT"

SPLIT=4,4,2 # of the training prompts among the steps
TOKENS=160        # of prompt and answer together, in steps 1 and 2
PROMPT_TOKENS=64  # in step 3
ANSWER_TOKENS=64
TEMPERATURE=0.7 # of the answers
BETA=0.1        # of the KL term, and of DPO
COMMON=(
    --data_output_path "$OUTPUT/cache"
    --seed "$SEED" --overwrite_output_dir # STAGES chooses what is made again
    --per_device_eval_batch_size 32
)

stage() { # stage NUMBER MODEL RESULT FLAGS...
    local script data=$OUTPUT/data
    script=$(echo "$ROOT"/step"$1"_*/training_scripts/demo/run_demo.sh)
    DATA=$data MODEL=$2 OUTPUT=$3 bash "$script" "${COMMON[@]}" "${@:4}"
}

prepare() {
    python "$HERE/prepare.py" --data "$DATA" --output_dir "$OUTPUT" --max_seq_len $TOKENS --seed "$SEED" \
        --data_split $SPLIT --max_prompt_seq_len $PROMPT_TOKENS ${KEEP_LENGTHS:+--keep_lengths}
}

sft() {
    stage 1 "$OUTPUT/models/policy" "$OUTPUT/sft" --data_split $SPLIT --max_seq_len $TOKENS --num_train_epochs 2 \
        --per_device_train_batch_size 8 --learning_rate 2e-3 --num_warmup_steps 20 --logging_steps 20 \
        --eval_steps 100 --max_eval_batches 8 "${SFT_FLAGS[@]}"
}

reward_flags=(
    --max_seq_len "$TOKENS" --num_train_epochs 1 --per_device_train_batch_size 8 --learning_rate 3e-4
    --weight_decay 0.1 --num_warmup_steps 20 --logging_steps 20 --eval_steps 50 --max_eval_batches 8
)

reward() {
    stage 2 "$OUTPUT/sft" "$OUTPUT/reward" --data_split $SPLIT "${reward_flags[@]}" "${REWARD_FLAGS[@]}"
}

# A second judge: from random weights, on the pairs of step 1's prompts. Nothing is optimised against it.
referee() {
    stage 2 "$OUTPUT/models/referee" "$OUTPUT/referee" --data_path "$OUTPUT/referee_data" --data_split 0,1,0 \
        "${reward_flags[@]}" "${REWARD_FLAGS[@]}"
}

RUN_SEED=$SEED # of the method in hand
folder() { if [[ $RUN_SEED == "$SEED" ]]; then echo "$OUTPUT"; else echo "$OUTPUT/seed_$RUN_SEED"; fi; }

rlhf() { # rlhf NAME FLAGS...: 64 answers a step, greedy ones included
    REWARD_MODEL=$OUTPUT/reward stage 3 "$OUTPUT/sft" "$(folder)/$1" --data_split $SPLIT --seed "$RUN_SEED" \
        --max_prompt_seq_len $PROMPT_TOKENS --max_answer_seq_len $ANSWER_TOKENS \
        --per_device_generation_batch_size 16 --per_device_training_batch_size 16 --temperature $TEMPERATURE \
        --actor_learning_rate 5e-5 --num_warmup_steps 0 --penalty full_step --kl_ctl $BETA --gamma 1 \
        --max_steps 48 --num_train_epochs 10 --logging_steps 4 --eval_steps 12 --max_eval_batches 4 \
        --reference_zero_stage 0 --reward_zero_stage 0 --save_at_final "${@:2}" "${REMAX_FLAGS[@]}"
}

remax() { rlhf remax; }
remax_calibrated() { rlhf remax_calibrated --baseline calibrated; }
rloo_2() { rlhf rloo_2 --algo rloo --samples_per_prompt 2; }
rloo_4() { rlhf rloo_4 --algo rloo --samples_per_prompt 4 --per_device_generation_batch_size 8; }
grpo() { rlhf grpo --algo grpo --samples_per_prompt 4 --per_device_generation_batch_size 8; }
reinforce() { rlhf reinforce --algo reinforce --baseline_decay 0.9 --per_device_generation_batch_size 32; }
# The critic starts from the reward model and learns at its rate.
ppo() { rlhf ppo --algo ppo --per_device_generation_batch_size 32 --critic_learning_rate 3e-4; }

# From the pairs that the reward model has learned from, at its rate; about as long as an RLHF run.
pairs() { # pairs NAME FLAGS...
    stage 2 "$OUTPUT/sft" "$(folder)/$1" --data_split $SPLIT --seed "$RUN_SEED" "${reward_flags[@]}" --weight_decay 0 \
        --dpo_beta $BETA --max_steps 64 --num_train_epochs 10 --eval_steps 64 "${@:2}" "${PAIR_FLAGS[@]}"
}

dpo() { pairs dpo --loss dpo; }
r_dpo() { pairs r_dpo --loss r-dpo --length_alpha 0.01; }

policy_of() { # its folder
    case $1 in
        sft | sft_again) echo "$OUTPUT/sft" ;;
        *dpo) echo "$(folder)/$1" ;;
        *) echo "$(folder)/$1/actor_final" ;;
    esac
}

methods() {
    local name RUN_SEED
    for RUN_SEED in $SEEDS; do
        for name in $METHODS; do
            if [[ -f $(policy_of "$name")/config.json ]]; then continue; fi
            echo "== $name, seed $RUN_SEED"
            "$name"
        done
    done
}

# Answers to held-out prompts, each seed's baseline and the others with random numbers of their own, and who wins by the
# referee.
winrates() {
    local name RUN_SEED to draw
    for RUN_SEED in $SEEDS; do
        to=$(folder)
        mkdir -p "$to/winrates" "$to/verdicts"
        for name in sft sft_again $METHODS; do
            if [[ -f $to/answers/$name.json ]]; then continue; fi
            if [[ $name == sft ]]; then draw=$((2 * RUN_SEED - 1)); else draw=$((2 * RUN_SEED)); fi
            python -m remax.answers --model "$(policy_of "$name")" --benchmark "$OUTPUT/questions.json" \
                --temperature $TEMPERATURE --max_new_tokens $ANSWER_TOKENS --batch_size 64 --dtype fp32 \
                --seed "$draw" --output "$to/answers/$name.json"
        done
        for name in sft_again $METHODS; do
            if [[ -f $to/verdicts/$name.json && -s $to/winrates/$name.json ]]; then continue; fi
            python -m remax.winrate "$to/answers/$name.json" "$to/answers/sft.json" --judge "reward:$OUTPUT/referee" \
                --output "$to/verdicts/$name.json" --json >"$to/winrates/$name.json"
        done
    done
}

measure() { python "$HERE/measure.py" --run "$OUTPUT" --max_prompt_seq_len $PROMPT_TOKENS; }
report() { python "$HERE/report.py" --run "$OUTPUT" ${DOCUMENT:+--document "$DOCUMENT"}; }

for name in $STAGES; do
    echo "== $name"
    SECONDS=0
    "$name"
    echo "== $name: $SECONDS s"
done
