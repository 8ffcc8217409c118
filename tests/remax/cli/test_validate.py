"""Flags: names and defaults that users know, what is refused and how, what is filled in."""

import dataclasses
import inspect
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from remax.algorithms import ALGORITHMS
from remax.algorithms.kl import PENALTIES
from remax.cli.evaluation import parse_prompt_eval
from remax.cli.flags import Penalty, Step1Arguments, Step2Arguments, Step3Arguments
from remax.cli.validate import make_algorithm, parse_step1, parse_step2, parse_step3
from utils.run import UserError

ROOT = Path(__file__).parents[3]
MODEL = "--model_name_or_path facebook/opt-125m "
SHARED = "--actor_lora_dim 4 --only_optimize_lora --share"
MODELS = "--reward_model_name_or_path me/reward --actor_model_name_or_path facebook/opt-125m "


def step1(line: str = "") -> Step1Arguments:
    return parse_step1(shlex.split(MODEL + line))


def step2(line: str = "") -> Step2Arguments:
    return parse_step2(shlex.split(MODEL + line))


def step3(line: str = "") -> Step3Arguments:
    return parse_step3(shlex.split(MODELS + line))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ------------------------------------------------------------------------------------------- names and defaults

FINETUNE_DEFAULTS = {
    "data_path": ["Dahoas/rm-static"],
    "data_split": "2,4,4",
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "max_seq_len": 512,
    "weight_decay": 0.0,
    "num_train_epochs": None,  # acts as 1, see below
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "cosine",
    "num_warmup_steps": 0,
    "seed": 2023,
    "data_seed": 1234,
    "local_rank": -1,
    "gradient_checkpointing": False,
    "disable_dropout": False,
    "offload": False,
    "bf16": False,
    "zero_stage": 0,
    "lora_dim": 0,
    "lora_module_name": "all-linear",
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "only_optimize_lora": False,
    "lora_learning_rate": 5e-4,
    "print_loss": False,
    "enable_tensorboard": False,
    "deepspeed": False,
}
STEP3_DEFAULTS = {
    "algo": "remax",
    "data_path": ["Dahoas/rm-static"],
    "data_split": "2,4,4",
    "unsupervised_dataset_name": None,
    "unsupervised_dataset_config_name": None,
    "unsup_coef": 27.8,
    "per_device_generation_batch_size": 16,
    "per_device_training_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "generation_batches": 1,
    "ppo_epochs": 1,
    "max_prompt_seq_len": 256,
    "max_answer_seq_len": 256,
    "actor_learning_rate": 9.65e-6,
    "actor_weight_decay": 0.0,
    "num_train_epochs": None,  # acts as 1, see below
    "lr_scheduler_type": "cosine",
    "gradient_accumulation_steps": 1,
    "num_warmup_steps": 100,
    "data_seed": 1234,
    "offload": False,
    "offload_reference_model": False,
    "offload_reward_model": False,
    "actor_zero_stage": 0,
    "reward_zero_stage": 0,
    "reference_zero_stage": 0,
    "actor_gradient_checkpointing": False,
    "disable_actor_dropout": False,
    "disable_reward_dropout": False,
    "gamma": 0.95,
    "penalty": "one_step",  # what ran in the authors' code, whatever their flag said
    "kl_ctl": 0.1,
    "target_kl": 1.0,
    "save_at_final": False,
    "normalize_kl": False,
    "entropy_coef": 0.0,
    "clip_reward_value": 5.0,
    "clip_on": "difference",
    "actor_lora_dim": 0,
    "actor_lora_module_name": "all-linear",
    "actor_lora_alpha": None,
    "actor_lora_dropout": 0.0,
    "only_optimize_lora": False,
    "actor_lora_learning_rate": 5e-4,
    "enable_ema": False,
    "print_answers": False,
    "save_answers": False,
    "enable_test_mode": False,
    "test_stop_step": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "logprobs_of": "sampling",
}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (step1, FINETUNE_DEFAULTS | {"sft_only_data_path": []}),
        (step2, FINETUNE_DEFAULTS | {"num_padding_at_beginning": None}),
        (step3, STEP3_DEFAULTS),
    ],
)
def test_known_flags_keep_their_names_and_defaults(args, expected):
    found = vars(args())
    assert {name: found[name] for name in expected} == expected
    assert args().epochs == 1 and args("--max_steps 7").epochs == 0 and args("--num_train_epochs 2").epochs == 2


def authors_line(step: int) -> str:
    """The flags that the ReMax authors' OPT and Llama-2 scripts give, together."""
    if step == 3:
        return (
            "--local_rank=0 --algo remax --data_output_path /tmp/data_files/llama2 --data_split 2,4,4 "
            "--num_padding_at_beginning 0 --per_device_generation_batch_size 1 --per_device_training_batch_size 1 "
            "--per_device_eval_batch_size 1 --generation_batches 1 --ppo_epochs 1 --max_answer_seq_len 256 "
            "--max_prompt_seq_len 256 --actor_learning_rate 1e-6 --actor_weight_decay 0.1 --num_train_epochs 1 "
            "--lr_scheduler_type cosine --gradient_accumulation_steps 1 --actor_gradient_checkpointing "
            "--disable_actor_dropout --disable_reward_dropout --num_warmup_steps 0 --kl_ctl 0.05 --gamma 0.99 "
            "--deepspeed --offload --offload_reward_model --offload_reference_model --actor_bf16 --reward_bf16 "
            "--seed 2023 --actor_zero_stage 2 --reward_zero_stage 3 --reference_zero_stage 3 --enable_hybrid_engine "
            "--output_dir out --enable_tensorboard --print_answers --save_answers --save_at_final"
        )
    padding = "--num_padding_at_beginning 1 " if step == 2 else ""
    return padding + (
        "--local_rank=1 --data_output_path /tmp/data_files/opt --data_split 2,4,4 --per_device_train_batch_size 16 "
        "--per_device_eval_batch_size 16 --max_seq_len 512 --learning_rate 1e-5 --weight_decay 0. --num_train_epochs 4 "
        "--gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234 --offload "
        "--gradient_checkpointing --zero_stage 2 --deepspeed --output_dir out --enable_tensorboard --print_loss"
    )


def test_the_authors_lines_of_steps_1_and_2_are_understood():
    for parse, step in [(step1, 1), (step2, 2)]:
        args = parse(authors_line(step))
        assert (args.zero_stage, args.offload, args.learning_rate, args.num_train_epochs) == (2, True, 1e-5, 4)
        assert args.console_every == 1  # --print_loss
        assert args.tensorboard_dir == os.path.join("out", "tensorboard")


def test_the_authors_line_of_step_3_is_understood():
    args = step3(authors_line(3))
    assert (args.actor_zero_stage, args.reference_zero_stage, args.reward_zero_stage) == (2, 3, 3)
    assert (args.actor_dtype, args.reward_dtype) == ("bf16", "bf16")
    assert (args.gamma, args.kl_ctl, args.penalty, args.kl_in) == (0.99, 0.05, "one_step", "reward")
    assert len(args.notices) == 3  # DeepSpeed, padding, hybrid engine


def test_dashes_and_several_data_sets(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("")
    args = step3(f"--actor-learning-rate 1e-6 --data_path Dahoas/rm-static {file}")
    assert args.actor_learning_rate == 1e-6
    assert args.data_path == ["Dahoas/rm-static", str(file)]


def test_the_default_data_set_never_mixes_in():
    assert step1().data_path == step2().data_path == step3().data_path == ["Dahoas/rm-static"]
    alone = step1("--sft_only_data_path me/mine --data_split 0,5,5")  # the split is of --data_path
    assert (alone.data_path, alone.sft_only_data_path) == ([], ["me/mine"])
    both = step1("--sft_only_data_path me/mine --data_path me/pairs")
    assert (both.data_path, both.sft_only_data_path) == (["me/pairs"], ["me/mine"])


def test_column_names_are_those_that_were_given():
    assert step1().columns == {}
    assert step2("--prompt_column question --rejected_column bad").columns == {"prompt": "question", "rejected": "bad"}
    assert step3("--data_path me/set#main/train:0.3").data_path == ["me/set#main/train:0.3"]


def test_only_step_3_evaluates_on_a_part_unless_told():
    # Answers are written there, for minutes; 0 still asks for all.
    assert (step1().max_eval_batches, step2().max_eval_batches, step3().max_eval_batches) == (None, None, 16)
    assert step3("--max_eval_batches 0").max_eval_batches == 0


def test_no_flag_has_two_owners():
    for arguments in (Step1Arguments, Step2Arguments, Step3Arguments):
        owners = Counter(name for cls in arguments.__mro__ for name in inspect.get_annotations(cls))
        assert owners.pop("stage") == owners.pop("_group") == owners.pop("models_in") == 1
        assert set(owners) == {field.name for field in dataclasses.fields(arguments)}
        assert set(owners.values()) == {1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dpo_beta .2", r"--dpo_beta with --loss ranking: only --loss dpo and r-dpo read it"),
        ("--loss dpo --length_alpha .2", r"--length_alpha with --loss dpo: only --loss r-dpo"),
        ("--loss dpo --ranked_loss plackett-luce", r"--ranked_loss with --loss dpo: only --loss ranking"),
        (
            "--ranked_loss plackett-luce --label_smoothing .1",
            r"--label_smoothing with --ranked_loss plackett-luce: .* use --ranked_loss pairs",
        ),
        ("--loss dpo --use_margin", r"--use_margin with --loss dpo: only --loss ranking and hydra read it"),
        ("--ranking_weight 2", r"--ranking_weight with --loss ranking: only --loss hydra read"),
        ("--loss hydra --ranked_loss plackett-luce", r"--ranked_loss with --loss hydra: only --loss ranking"),
        ("--loss hydra --dpo_beta .2", r"--dpo_beta with --loss hydra: only --loss dpo"),
        ("--loss hydra --ranking_weight 0", r"--ranking_weight 0.0: must be above 0"),
        ("--label_smoothing 1", r"--label_smoothing 1.0: must be at least 0 and below 1"),
    ],
)
def test_preference_losses_refuse_flags_of_one_another(line, message):
    with pytest.raises(UserError, match=message):
        step2(line)


# ------------------------------------------------------------------------------------------------- refused

REFUSED_EVERYWHERE = [
    ("--bogus 1", r"--bogus: unknown flag"),
    ("--data_spli 2,4,4", r"--data_spli: unknown flag; did you mean --data_split\?"),  # no abbreviations
    ("--deepspeed_config x.json", r"--deepspeed_config: unknown flag; use --zero_stage"),
    ("stray", r"stray: belongs to no flag"),
    ("--data_split 2,4", r"--data_split 2,4: expected three numbers"),
    ("--data_split 2,4,x", r"--data_split 2,4,x: expected three numbers"),
    ("--data_split=-1,4,4", r"--data_split -1,4,4: expected three numbers"),
    ("--data_path no/such/train.jsonl", r"--data_path no/such/train.jsonl: no such file or folder"),
    ("--data_path Dahoas/rm-static ./missing", r"--data_path ./missing: no such file"),
    ("--data_path no/such/train.jsonl:0.5", r"--data_path no/such/train.jsonl:0.5: no such file or folder"),
    ("--data_path ./missing#train_sft", r"--data_path ./missing#train_sft: no such file or folder"),
    ("--data_path", r"--data_path: is empty; expected hub names, folders or files"),
    ("--data_path me/set:0", r"--data_path me/set:0: the weight after the colon must be a number above 0"),
    ("--overlong keep", r"--overlong: invalid choice"),
    ("--num_train_epochs 0", r"--num_train_epochs 0: must be at least 1"),
    ("--per_device_eval_batch_size -1", r"--per_device_eval_batch_size -1: must be at least 1"),
    ("--num_train_epochs 1.5", r"--num_train_epochs: invalid int value"),
    ("--preprocessing_num_workers 0", r"--preprocessing_num_workers 0: must be at least 1"),
    ("--streaming", r"--streaming: needs --max_steps, since nobody knows how many rows will come"),
    ("--streaming --max_steps 5 --preprocessing_num_workers 2", r"--preprocessing_num_workers with --streaming: noth"),
    ("--max_steps 5 --shuffle_buffer 5", r"--shuffle_buffer: has no effect without --streaming"),
    ("--streaming --max_steps 5 --shuffle_buffer 0", r"--shuffle_buffer 0: must be at least 1"),
    ("--adam_beta2 1", r"--adam_beta2 1.0: must be at least 0 and below 1"),
    ("--gradient_clipping nan", r"--gradient_clipping nan: must be 0 or more"),
    ("--lr_scheduler_type cosin", r"--lr_scheduler_type: invalid choice"),
    ("--only_optimize_lora", r"--only_optimize_lora: .* set --(actor_)?lora_dim"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED_EVERYWHERE)
@pytest.mark.parametrize("parse", [step1, step2, step3])
def test_refused_in_every_step(parse, line, message):
    with pytest.raises(UserError, match=message):
        parse(line)


@pytest.mark.parametrize("parse", [step1, step2])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--learning_rate 0", r"--learning_rate 0.0: must be above 0"),
        ("--learning_rate inf", r"--learning_rate inf: must be above 0"),
        ("--max_seq_len 0", r"--max_seq_len 0: must be at least 1"),
        ("--zero_stage 4", r"--zero_stage: invalid choice: '4'"),
        ("--offload", r"--offload with --zero_stage 0: .* set --zero_stage 1, 2 or 3"),
        ("--zero_stage 2 --offload_parameters", r"--offload_parameters with --zero_stage 2: needs --zero_stage 3"),
        ("--dtype fp16", r"--dtype fp16: DeepSpeed has no fp16 on a CPU; use fp32 or bf16"),
        ("--dtype fp32 --bf16", r"--dtype fp32 with --bf16: contradict"),
        ("--packing --attn_implementation eager", r"--packing with --attn_implementation eager: only sdpa and flash"),
    ],
)
def test_refused_in_steps_1_and_2(parse, line, message):
    with pytest.raises(UserError, match=message):
        parse(line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--offload", r"--offload with --actor_zero_stage 0"),
        ("--offload_parameters --actor_zero_stage 1", r"--offload_parameters with --actor_zero_stage 1"),
        ("--inference_tp_size 2 --enable_hybrid_engine", r"--inference_tp_size 2: .* --actor_zero_stage 3"),
        ("--zero3_generation synced", r"--zero3_generation synced with --actor_zero_stage 0"),
        ("--packing --attn_implementation eager", r"--packing with --attn_implementation eager: only sdpa and flash"),
        ("--actor_dtype fp32 --actor_bf16", r"--actor_dtype fp32 with --actor_bf16: contradict"),
        ("--reward_dtype fp16", r"--reward_dtype fp16: DeepSpeed has no fp16 on a CPU"),
        ("--top_p 0", r"--top_p 0.0: must be above 0 and at most 1"),
        ("--temperature 0", r"--temperature 0.0: must be above 0"),
        ("--gamma 1.01", r"--gamma 1.01: must be above 0 and at most 1"),
        ("--max_greedy_seq_len 257", r"--max_greedy_seq_len 257: must not exceed --max_answer_seq_len \(256\)"),
        ("--unsupervised_dataset_config_name x", r"without --unsupervised_dataset_name"),
        ("--per_device_unsupervised_batch_size 3", r"size 3: has no effect without --unsupervised_dataset_name"),
        ("--log_variance_gradient_steps 5", r"without --log_variance"),
        ("--per_device_train_batch_size 4", r"use --per_device_generation_batch_size"),
        ("--per_device_training_batch_size 32", r"must divide the 16 answers of a rollout .*; for example 16"),
        ("--per_device_training_batch_size 6", r"must divide the 16 answers of a rollout .*; for example 4"),
        ("--ppo_epochs 2", r"--ppo_epochs 2 with --algo remax: a rollout gets one step"),
        ("--critic_learning_rate 1e-5 --algo rloo", r"with --algo rloo: only --algo ppo reads it"),
        ("--baseline_decay 0.9", r"--baseline_decay 0.9 with --algo remax: only --algo reinforce reads it"),
        ("--max_greedy_seq_len 9 --algo grpo", r"with --algo grpo: only --algo remax reads it"),
        (
            "--samples_per_prompt 2 --algo ppo",
            r"--samples_per_prompt 2 with --algo ppo: .* use --algo remax or rloo or grpo",
        ),
        (
            "--baseline calibrated --algo ppo",
            r"--baseline calibrated with --algo ppo: only --algo remax, rloo reads it",
        ),
        ("--baseline greedy --algo rloo", r": rloo with baseline 'greedy'; choose others, length_weighted or token_we"),
        ("--baseline others", r": remax with baseline 'others'; choose greedy, greedy_kl or calibrated"),
        ("--samples_per_prompt 1 --algo rloo", r"--samples_per_prompt 1 with --algo rloo: .* 2 or more"),
        ("--algo ppo --ppo_mini_batches 3", r"--ppo_mini_batches 3: must divide the 16 answers"),
        (
            "--algo ppo --ppo_mini_batches 4",
            r"--per_device_training_batch_size 16: must divide the 4 answers of a mini-batch; for example 4",
        ),
        ("--algo ppo --clip_on difference", r"--algo ppo --clip_on difference: "),
        ("--algo ppo --penalty kl_onestep", r"--algo ppo --penalty kl_onestep: "),
        ("--algo ppo --offload_critic", r"--offload_critic with --critic_zero_stage 0"),
        ("--algo ppo --offload --actor_zero_stage 1 --critic_zero_stage 0", r"--offload with --critic_zero_stage 0"),
        ("--penalty none --adaptive_kl", r"--adaptive_kl with --penalty none"),
        ("--penalty none --kl_in loss", r"--kl_in with --penalty none"),
        ("--kl_ctl 0 --adaptive_kl", r"--kl_ctl 0.0 --adaptive_kl: "),
        ("--penalty full_kl --kl_estimator k1", r"--penalty full_kl --kl_estimator k1: "),
        ("--kl_in loss --kl_estimator k1", r"--kl_in loss --kl_estimator k1: .*gradient zero"),
        ("--penalty klx", r"--penalty: invalid choice"),
        # weights that models share
        ("--share reference", r"--share reference: needs --actor_lora_dim and --only_optimize_lora"),
        ("--share reference --actor_lora_dim 4", r"--share reference: needs .* must not learn"),
        (
            f"{SHARED} reference --reference_zero_stage 3",
            r"--reference_zero_stage with --share reference: the reference ",
        ),
        (f"{SHARED} reference --offload_reference_model", r"--offload_reference_model with --share reference: "),
        (
            f"{SHARED} all",
            r"--reward_model_name_or_path with --share all: the reward model has no weights but the actor",
        ),
        ("--joint_critic --algo ppo", r"--joint_critic with --share none: "),
        (f"{SHARED} reference --joint_critic --algo ppo", r"--joint_critic with --share reference: "),
        (
            f"{SHARED} reference --algo ppo --critic_lora_dim 2 --reward_zero_stage 3",
            r"--reward_zero_stage with --share reference: the reward model has no weights but the critic's",
        ),
    ],
)
def test_refused_in_step_3(line, message):
    with pytest.raises(UserError, match=message):
        step3(line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--algo remax --joint_critic", r"--joint_critic True with --algo remax: only --algo ppo reads it"),
        ("--algo ppo --joint_critic --critic_lora_dim 2", r"--joint_critic with --critic_lora_dim: "),
        (
            "--algo ppo --critic_zero_stage 2",
            r"--critic_zero_stage with --share all: the critic has no weights but the a",
        ),
        ("--algo ppo --critic_dtype fp32", r"--critic_dtype with --share all: "),
        ("--algo ppo --offload_critic", r"--offload_critic with --share all: "),
        ("--algo ppo --critic_model_name_or_path me/c", r"--critic_model_name_or_path with --share all: "),
        (
            "--reward_zero_stage 3",
            r"--reward_zero_stage with --share all: the reward model has no weights but the actor's",
        ),
        ("--reward_dtype bf16", r"--reward_dtype with --share all: "),
    ],
)
def test_refused_where_everything_is_shared(line, message):
    actor = "--actor_model_name_or_path me/actor"
    with pytest.raises(UserError, match=message):
        parse_step3(shlex.split(f"{actor} {SHARED} all {line}"))


def test_what_is_shared_is_not_asked_for():
    # The reward model lies in the actor's folder, the critic beside its reward model; several of these load the rest.
    everything = parse_step3(shlex.split(f"--actor_model_name_or_path me/actor {SHARED} all --algo ppo"))
    assert everything.reward_models == ["me/actor"] and everything.reward_is_shared
    assert everything.critic_zero_stage is None and everything.critic_dtype is None
    line = f"--actor_model_name_or_path me/actor {SHARED} all --algo ppo --disable_reward_dropout"
    (notice,) = parse_step3(shlex.split(line)).notices
    assert notice.startswith("--disable_reward_dropout: without effect, as the critic ")
    assert not parse_step3(shlex.split(f"{line} --disable_actor_dropout")).notices
    one = step3(f"{SHARED} reference --algo ppo --critic_lora_dim 2")
    assert one.critic_is_reward and one.reward_is_shared
    two = step3(f"{SHARED} reference --algo ppo --critic_lora_dim 2 --reward_model_name_or_path me/a me/b")
    assert two.critic_is_reward and not two.reward_is_shared
    for other in ("--critic_model_name_or_path me/c --critic_lora_dim 2", ""):
        assert not step3(f"{SHARED} reference --algo ppo {other}").critic_is_reward
    assert not step3("--algo ppo --critic_lora_dim 2").critic_is_reward


def test_a_share_of_the_data_for_each_step():
    for parse, split in [(step1, "0,1,1"), (step2, "1,0,1"), (step3, "1,1,0")]:
        with pytest.raises(UserError, match=r"--data_split .*: leaves nothing for step"):
            parse(f"--data_split {split}")
    assert step1("--data_split 10,0,0").data_split == "10,0,0"


def test_missing_models_are_refused_before_anything_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "sft" / "final").mkdir(parents=True)
    (tmp_path / "output" / "sft" / "final" / "config.json").write_text("{}")
    (tmp_path / "model.bin").write_text("")
    for name, message in [
        ("/no/such/model", r"--model_name_or_path /no/such/model: no such folder"),
        ("./model", r"no such folder"),
        ("output/stf", r"output/stf: no such folder"),  # `output` is a folder here, so this is no hub name
        ("output/sft", r"no config.json, .*; its subfolder has one: final"),
        ("model.bin", r"is a file"),
        ("''", r"--model_name_or_path '': expected some text"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_step1(shlex.split(f"--model_name_or_path {name}"))
    assert parse_step1(["--model_name_or_path", "output/sft/final"]).model_name_or_path == "output/sft/final"
    with pytest.raises(UserError, match=r"--critic_model_name_or_path /no"):
        step3("--algo ppo --critic_model_name_or_path /no")


def test_required_flags_are_named():
    with pytest.raises(UserError, match="required: --actor_model_name_or_path "):
        parse_step3([])
    with pytest.raises(UserError, match="--reward_model_name_or_path or --reward_fn: one of them is required"):
        parse_step3(["--actor_model_name_or_path", "facebook/opt-125m"])


MAIN = [
    f"step{stage}/main.py" for stage in ("1_supervised_finetuning", "2_reward_model_finetuning", "3_rlhf_finetuning")
]


def test_reading_flags_imports_neither_torch_nor_transformers():
    modules = ("flags", "parser", "config_file", "validate", "evaluation", "model_names")
    code = f"import sys, {', '.join(f'remax.cli.{name}' for name in modules)}\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy', 'yaml')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("program", "line", "message"),
    [
        (MAIN[0], "--model_name_or_path me/model --learning_rate -1", "--learning_rate -1.0: must be above 0"),
        (MAIN[1], "--loss dpo", "the following arguments are required: --model_name_or_path (all flags: --help all)"),
        (MAIN[2], MODELS + "--kl_ct 1", "--kl_ct: unknown flag; did you mean --kl_ctl? (all flags: --help all)"),
        (MAIN[2], MODELS + "--data_split 1,2", "--data_split 1,2: expected three numbers, 0 or more, such as 2,4,4"),
        (
            MAIN[2],
            MODELS + "--zero3_generation synced",
            "--zero3_generation synced with --actor_zero_stage 0: is for ZeRO 3 only",
        ),
        (
            "step1_supervised_finetuning/prompt_eval.py",
            "--model_name_or_path_baseline me/a --model_name_or_path_finetune me/b --top_p 1.5",
            "--top_p 1.5: must be above 0 and at most 1",
        ),
        (
            "step2_reward_model_finetuning/rw_eval.py",
            "--model_name_or_path me/a --output scores.jsonl",
            "--output: is for the scores of --data_path; give that too",
        ),
        (
            "remax/doctor.py",
            "--actor_model_name_or_path me/a",
            "--reward_model_name_or_path or --reward_fn: one of them is required; it says what to learn",
        ),
        (
            "remax/answers.py",
            "--model me/a --benchmark mt_bench --questions q --output a.json",
            "--output a.json: expected a name that ends in .jsonl, by which its readers go",
        ),
        (
            "remax/chat.py",
            "--model me/a --temperature -1",
            "--temperature -1.0: must be 0 for greedy answers, or at least 1e-6",
        ),
        (
            "remax/winrate.py",
            "a.json b.json --judge gpt4",
            "--judge gpt4: expected reward:MODEL, lm:MODEL or annotations:FILE",
        ),
        (
            "remax/plan.py",
            "--model Llama-2-7b --zero 0",
            "--zero 0 with --dtype bf16: training in 16 bits needs --zero 1, 2 or 3",
        ),
    ],
)
def test_a_bad_flag_exits_with_2_before_torch_is_imported(program, line, message):
    # The program itself: what it imports at its top counts too.
    code = (
        f"import runpy, sys; sys.argv = [{program!r}, *{shlex.split(line)}]\n"
        f"try: runpy.run_path({program!r}, run_name='__main__')\n"
        "finally: print([name for name in ('torch', 'transformers', 'numpy', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    assert done.stderr == f"error: {message}\n"


def test_programs_import_what_takes_time_where_ctrl_c_is_caught():
    programs = [*MAIN, "step1_supervised_finetuning/prompt_eval.py", "step2_reward_model_finetuning/rw_eval.py"]
    programs += ["remax/doctor.py", "remax/answers.py", "remax/winrate.py", "remax/plan.py", "remax/chat.py"]
    code = (
        "import runpy, sys\n"
        f"for program in {programs}: runpy.run_path(program, run_name='imported')\n"
        "loaded = {name for name in sys.modules if name.startswith(('remax', 'torch', 'numpy'))}\n"
        "print(loaded - {'remax', 'remax.cli', 'remax.cli.entry'})"  # the entry itself, which imports `run_main` alone
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_what_the_algorithm_refuses_costs_torch_alone():
    line = f"{MODELS} --algo rloo --samples_per_prompt 1"
    code = (
        f"import sys\nfrom remax.cli.validate import parse_step3\nfrom utils.run import run_main\n"
        f"try: run_main(lambda: parse_step3({line!r}.split()))\n"
        "finally: print([name for name in ('transformers', 'deepspeed', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr.startswith("error: --samples_per_prompt 1 with --algo rloo")


# ------------------------------------------------------------------------------------------- overwriting


def model_in(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_an_output_folder_that_holds_something_is_refused(tmp_path):
    model_in(tmp_path / "done")
    with pytest.raises(
        UserError, match=r"--output_dir .*done: holds a model .*\(config.json\).*--overwrite_output_dir"
    ):
        step1(f"--output_dir {tmp_path}/done")
    assert step2(f"--output_dir {tmp_path}/done --overwrite_output_dir").overwrite_output_dir
    step3(f"--output_dir {tmp_path}/done")  # step 3 writes its models into subfolders
    model_in(tmp_path / "done" / "actor")
    with pytest.raises(UserError, match=r"holds a model already \(actor/config.json\)"):
        step3(f"--output_dir {tmp_path}/done")


def adapters_in(folder, base, **fields):
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_text("")
    config = {"peft_type": "LORA", "r": 3, "base_model_name_or_path": str(base)} | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("parse", "prefix"), [(parse_step1, ""), (parse_step2, ""), (parse_step3, "actor_")])
def test_adapters_of_a_folder_go_on_as_they_are(parse, prefix, tmp_path):
    base = model_in(tmp_path / "base")
    folder = adapters_in(tmp_path / "a", base)
    line = f"--{prefix}model_name_or_path {folder} --output_dir {tmp_path}/out"
    line += f" --reward_model_name_or_path {base}" if prefix else ""
    told = f"--{prefix}model_name_or_path {folder}: its adapters of rank 3 go on learning, alone; base: {base}"
    for more in ("", "--only_optimize_lora", f"--{prefix}lora_dropout 0.1", f"--{prefix}lora_learning_rate 1e-3"):
        assert told in parse(shlex.split(f"{line} {more}")).notices
    if prefix:
        with pytest.raises(UserError, match="--share reference with --actor_model.*/a: .*; give the merged model"):
            parse(shlex.split(f"{line} --share reference --only_optimize_lora"))
    for more in ("lora_dim 4", "lora_alpha 8", "lora_module_name q_proj"):
        with pytest.raises(UserError, match=f"--{prefix}{more} with --.*/a: its adapters go on learning as they are"):
            parse(shlex.split(f"{line} --{prefix}{more}"))


def test_adapters_without_their_base_or_weights_are_refused_before_anything_loads(tmp_path):
    name = "--model_name_or_path"
    for i, (base, message) in enumerate(
        [
            (
                tmp_path / "nowhere",
                "adapter_config.json has base_model_name_or_path '.*/nowhere', and there is no",
            ),
            (tmp_path, f"{name} .base_model_name_or_path of .*adapter_config.json. {tmp_path}: .* has no config.json"),
            ("", "adapter_config.json has base_model_name_or_path ''; expected"),
        ]
    ):
        with pytest.raises(UserError, match=message):
            parse_step1(shlex.split(f"{name} {adapters_in(tmp_path / str(i), base)} --output_dir {tmp_path}/out"))
    (tmp_path / "0" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=f"{name} {tmp_path}/0: has no adapter_model.safetensors; .* is never read"):
        parse_step1(shlex.split(f"{name} {tmp_path}/0"))


def test_adapters_and_their_base_are_never_written_over(tmp_path):
    base, more = model_in(tmp_path / "base"), "--overwrite_output_dir"
    folder = adapters_in(tmp_path / "sft" / "adapter", base)  # beside the merged model of an earlier run
    model_in(tmp_path / "sft")
    for output in ("sft", "base", "sft/adapter"):
        with pytest.raises(UserError, match="is where --model_name_or_path .*adapter lies; choose another folder"):
            parse_step1(shlex.split(f"--model_name_or_path {folder} --output_dir {tmp_path}/{output} {more}"))


def test_a_model_that_is_read_is_never_written_over(tmp_path):
    model, more = model_in(tmp_path / "model"), "--overwrite_output_dir"
    for line in (f"{tmp_path}/model", f"{tmp_path}/other/../model/"):
        with pytest.raises(UserError, match="is where --model_name_or_path .*model lies; choose another folder"):
            parse_step1(shlex.split(f"--model_name_or_path {model} --output_dir {line} {more}"))
    actor = model_in(tmp_path / "run" / "actor")
    line = f"--actor_model_name_or_path {actor} --reward_model_name_or_path {model}:0.5 {more}"
    with pytest.raises(UserError, match="is where --actor_model_name_or_path .*run/actor lies"):
        parse_step3(shlex.split(f"{line} --output_dir {tmp_path}/run"))
    with pytest.raises(UserError, match="is where --reward_model_name_or_path .*model lies"):
        parse_step3(shlex.split(f"{line} --output_dir {model}"))


def test_answers_do_not_go_into_the_file_that_is_read(tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("Why?\n")
    line = f"--model_name_or_path_baseline me/a --model_name_or_path_finetune me/b --prompts_file {file}"
    with pytest.raises(UserError, match="--output .*questions.txt: is the file of --prompts_file"):
        parse_prompt_eval(shlex.split(f"{line} --output {file}"))
    assert file.read_text() == "Why?\n"


# ------------------------------------------------------------------------------------------- rewards


def rules(folder: Path) -> str:
    path = folder / "rules.py"
    path.write_text("def short(prompt, answer): return -len(answer)\n")
    return str(path)


def test_rewards_from_models_functions_or_both(tmp_path):
    actor, rule = ["--actor_model_name_or_path", "me/actor"], rules(tmp_path)
    args = step3(f"--reward_model_name_or_path me/a me/b:0.5 --reward_fn {rule}:short:-0.1 --normalize_reward")
    assert args.reward_model_name_or_path == ["me/a", "me/b:0.5"] and args.reward_fn == [f"{rule}:short:-0.1"]
    assert (args.reward_fn_timeout, args.normalize_reward) == (60.0, True)
    alone = parse_step3([*actor, "--reward_fn", f"{rule}:short", "--reward_fn_timeout", "0"])
    assert (alone.reward_model_name_or_path, alone.reward_fn_timeout) == ([], 0.0)
    critic = ["--critic_model_name_or_path", "me/critic"]
    assert parse_step3([*actor, "--reward_fn", f"{rule}:short", "--algo", "ppo", *critic]).algo == "ppo"
    with pytest.raises(UserError, match="--algo ppo with --reward_fn alone: .* give --critic_model_name_or_path"):
        parse_step3([*actor, "--reward_fn", f"{rule}:short", "--algo", "ppo"])
    with pytest.raises(UserError, match="--normalize_reward with --reward_fn alone"):
        parse_step3([*actor, "--reward_fn", f"{rule}:short", "--normalize_reward"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--reward_model_name_or_path me/a ./none:0.5", r"--reward_model_name_or_path ./none: no such folder"),
        ("--reward_model_name_or_path me/a:0", r"--reward_model_name_or_path me/a:0: the weight .* other than 0"),
        ("--reward_fn nowhere.py:f", r"--reward_fn nowhere.py:f: no such file"),
        ("--reward_fn rules", r"--reward_fn rules: expected module:function or file.py:function"),
        ("--reward_fn math:pi:0.5", r"--reward_fn math:pi: pi is a float; expected a function"),
        ("--reward_fn_timeout 5", r"--reward_fn_timeout: has no effect without --reward_fn"),
        ("--reward_fn rules:f --reward_fn_timeout -1", r"--reward_fn_timeout -1.0: must be 0 or more"),
    ],
)
def test_rewards_that_cannot_be_are_refused(line, message):
    with pytest.raises(UserError, match=message):
        step3(line)


# ------------------------------------------------------------------------------------------- retired flags, notices


def test_retired_flags_are_named_with_the_reason():
    args = step3(
        "--enable_hybrid_engine --unpin_actor_parameters --release_inference_cache --tp_gather_partition_size 8 "
        "--inference_tp_size 1 --memory_efficient_linear --enable_mixed_precision_lora --num_padding_at_beginning 0"
    )
    padding, hybrid, quantised = args.notices
    assert padding.startswith("--num_padding_at_beginning: without effect; ")  # also with 0
    assert hybrid.startswith(
        "--enable_hybrid_engine, --unpin_actor_parameters, --release_inference_cache, --tp_gather_partition_size, "
        "--inference_tp_size, --memory_efficient_linear: without effect; "
    )
    assert quantised.startswith("--enable_mixed_precision_lora: without effect; ")


@pytest.mark.parametrize(("rank", "first_line"), [("0", "usage: deepspeed main.py [flags]\n"), ("1", "")])
def test_only_rank_0_prints_the_help(capsys, monkeypatch, rank, first_line):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop:
        step1("--help")
    assert stop.value.code == 0
    assert "".join(capsys.readouterr().out.splitlines(keepends=True)[:1]) == first_line


# ------------------------------------------------------------------------------------------------- filled in


def test_number_formats_follow_the_device(gpu):
    args = step3("--algo ppo --actor_zero_stage 2 --reward_dtype fp32")
    assert (args.actor_dtype, args.reward_dtype, args.critic_dtype) == ("bf16", "fp32", "bf16")
    assert step1("--zero_stage 1 --dtype fp16").dtype == "fp16"


def test_a_gpu_without_bf16_gets_fp32(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert step1().dtype == "fp32"


def test_number_formats_on_a_cpu():
    args = step3("--algo ppo")
    assert (args.actor_dtype, args.reward_dtype, args.critic_dtype) == ("fp32", "fp32", "fp32")
    assert step1("--bf16 --zero_stage 1").dtype == "bf16"


def test_fp16_without_zero_gets_zero_1(gpu):
    args = step1("--dtype fp16")
    assert args.zero_stage == 1
    assert args.notices == ["--zero_stage 0: ZeRO 1 is used, since fp16 needs its loss scaled"]
    args = step3("--actor_dtype fp16 --algo ppo --reward_dtype fp16")
    assert (args.actor_zero_stage, args.critic_zero_stage, args.reward_zero_stage) == (1, 1, 0)


def test_bf16_without_zero_gets_zero_1():
    args = step1("--bf16")
    assert args.zero_stage == 1
    assert args.notices == ["--zero_stage 0: ZeRO 1 is used, since bf16 training without fp32 master weights drifts"]
    args = step3("--actor_bf16 --algo ppo")
    assert (args.actor_zero_stage, args.critic_zero_stage) == (1, 1)
    assert step3("--reward_bf16").reward_zero_stage == 0  # it is not trained


def test_frozen_models_know_zero_0_and_3():
    args = step3("--reward_zero_stage 1 --reference_zero_stage 2")
    assert (args.reward_zero_stage, args.reference_zero_stage, len(args.notices)) == (0, 0, 2)
    args = step3("--reward_zero_stage 3 --offload_reference_model")
    assert (args.reward_zero_stage, args.reference_zero_stage, len(args.notices)) == (3, 3, 1)


def test_the_critic_follows_the_actor():
    args = step3("--algo ppo --actor_zero_stage 2 --offload")
    assert (args.critic_zero_stage, args.offload_critic, args.critic_dtype) == (2, True, "fp32")
    args = step3("--actor_zero_stage 2 --offload")  # no critic, so nothing is filled in for one
    assert (args.critic_zero_stage, args.offload_critic, args.critic_dtype) == (None, False, None)


def test_the_choices_of_penalty_are_those_of_the_algorithms():
    assert set(Penalty.__args__) == {"none", *PENALTIES}


@pytest.mark.parametrize(
    ("line", "penalty", "kl_in", "estimator", "kl_ctl"),
    [
        ("", "one_step", "reward", "k1", 0.1),
        ("--algo reinforce", "one_step", "reward", "k1", 0.1),
        ("--algo rloo", "full_step", "reward", "k1", 0.1),
        ("--algo ppo", "full_step", "reward", "k1", 0.1),
        ("--algo grpo", "one_step", "loss", "k3", 0.04),
        ("--penalty kl", "full_step", "reward", "k1", 0.1),
        ("--penalty kl_onestep", "one_step", "reward", "k1", 0.1),
        ("--penalty full_kl_onestep", "full_kl_one_step", "loss", "full", 0.1),
        ("--penalty full_kl --kl_in reward", "full_kl_full_step", "reward", "full", 0.1),
        ("--penalty full_step --kl_estimator full --kl_ctl 0.01", "full_kl_full_step", "loss", "full", 0.01),
        ("--kl_estimator k3", "one_step", "loss", "k3", 0.1),
        (
            "--algo ppo --kl_estimator clamped_js --kl_in reward --kl_ctl 0.02",
            "full_step",
            "reward",
            "clamped_js",
            0.02,
        ),
    ],
)
def test_kl_flags_by_name_and_algorithm(line, penalty, kl_in, estimator, kl_ctl):
    args = step3(line)
    assert (args.penalty, args.kl_in, args.kl_estimator, args.kl_ctl) == (penalty, kl_in, estimator, kl_ctl)
    kl = make_algorithm(args).kl  # what has been filled in means the same again
    assert (kl.where, kl.estimator, kl.coefficient, kl.reach) == (kl_in, estimator, kl_ctl, penalty[-len(kl.reach) :])


def test_penalty_none_has_no_kl():
    args = step3("--penalty none --algo grpo")
    assert not make_algorithm(args).kl.active
    assert args.kl_ctl == 0


@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_defaults_are_those_of_the_algorithm(algo):
    args = step3(f"--algo {algo}")
    made, own = make_algorithm(args), ALGORITHMS[algo]()
    assert made.gamma == args.gamma == (0.95 if algo in ("remax", "reinforce") else 1.0)
    assert made == own
    assert args.samples_per_prompt == own.samples_per_prompt
    assert args.clip_on == own.clip_on
    assert args.loss_aggregation == own.loss_aggregation


def test_flags_reach_the_algorithm():
    made = make_algorithm(
        step3(
            "--algo ppo --ppo_epochs 3 --lam 0.9 --cliprange 0.1 --cliprange_value 0.3 --gamma 0.5 --entropy_coef 0.2 "
            "--clip_reward_value 0 --loss_aggregation sequence --adaptive_kl --adaptive_kl_target 2 "
            "--adaptive_kl_horizon 50 --normalize_kl"
        )
    )
    assert (made.epochs, made.lam, made.cliprange, made.cliprange_value) == (3, 0.9, 0.1, 0.3)
    assert (made.gamma, made.entropy_coef, made.clip_reward_value, made.loss_aggregation) == (0.5, 0.2, 0.0, "sequence")
    assert (made.kl.target, made.kl.horizon, made.kl.normalize) == (2.0, 50, True)
    assert make_algorithm(step3("--algo reinforce --baseline_decay 0.9")).baseline_decay == 0.9
    assert make_algorithm(step3("--algo rloo --samples_per_prompt 2")).samples_per_prompt == 2


def test_answers_of_a_rollout():
    line = "--per_device_generation_batch_size 3 --generation_batches 2 --gradient_accumulation_steps 5 --algo grpo"
    args = step3(line + " --samples_per_prompt 4 --per_device_training_batch_size 8")
    assert args.rollout_batches == 10  # 2 * 5
    assert args.answers_per_rollout == 120  # 3 prompts * 10 batches * 4 answers


@pytest.mark.parametrize(
    ("line", "stop"),
    [
        ("", 0),
        ("--max_steps 7", 7),
        ("--enable_test_mode --test_stop_step 3", 3),
        ("--enable_test_mode", 1),
        ("--enable_test_mode --test_stop_step 9 --max_steps 7", 7),
        ("--test_stop_step 3", 0),
    ],
)
def test_where_training_stops_early(line, stop):
    assert step3(line).stop_step == stop


def test_cadence_and_tensorboard():
    args = step1("--logging_steps 5")
    assert (args.console_every, args.tensorboard_dir) == (5, None)
    assert step1("--enable_tensorboard --tensorboard_path tb").tensorboard_dir == "tb"


def test_where_figures_go(tmp_path, monkeypatch):
    assert step1("--report_to none").reports == step1().reports == step1("--report_to").reports == set()
    assert step1("--report_to tensorboard --report_to none").reports == set()  # such as behind a script's name
    assert step3("--report_to tensorboard --enable_tensorboard").reports == {"tensorboard"}
    for line, message in {
        "none tensorboard": "--report_to none with tensorboard: contradict one another",
        "none --enable_tensorboard": "--report_to none with --enable_tensorboard: contradict",
        "mlflow": r"--report_to: invalid choice: 'mlflow'",
        "none --tensorboard_path tb": "--tensorboard_path: has no effect without --report_to tensorboard",
    }.items():
        with pytest.raises(UserError, match=message):
            step1(f"--report_to {line}")
    (tmp_path / "wandb").mkdir()  # the folder that the package leaves behind is not the package
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="--report_to wandb: the package is not installed; `pip install wandb`"):
        step1("--report_to wandb")


def test_advantages_are_scaled_where_the_algorithm_can():
    assert step3("--algo grpo").advantage_scaling == "group" and step3("--algo ppo").advantage_scaling == "none"
    assert make_algorithm(step3("--algo grpo --advantage_scaling none")).advantage_scaling == "none"
    assert make_algorithm(step3("--algo ppo --advantage_scaling batch")).advantage_scaling == "batch"
    assert step3("--algo remax").advantage_scaling is None
    known = "--advantage_scaling batch with --algo remax: only --algo reinforce, rloo, grpo, ppo reads it"
    with pytest.raises(UserError, match=known):
        step3("--algo remax --advantage_scaling batch")
    with pytest.raises(UserError, match="rloo with advantage_scaling 'group'; choose none or batch"):
        step3("--algo rloo --advantage_scaling group")
