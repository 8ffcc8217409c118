"""Every flag has a group, a help text and a reader: it is set to a value of its own, and that value must arrive in the
one field that it is for, and nowhere else.

A flag that becomes part of a typed setting is followed there (CASES). Where a flag is handed on otherwise, READ names
the function and the expression that reads it.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from remax import settings
from remax.algorithms import ALGORITHMS, readers
from remax.cli.flags import WHY_RETIRED, Step1Arguments, Step2Arguments, Step3Arguments
from remax.cli.parser import flags_of
from remax.cli.validate import make_algorithm, parse_step1, parse_step2, parse_step3

ROOT = Path(__file__).parents[2]
ASSEMBLY = "remax/assembly.py"
STAGES = {
    1: (Step1Arguments, parse_step1, "--model_name_or_path me/model "),
    2: (Step2Arguments, parse_step2, "--model_name_or_path me/model "),
    3: (Step3Arguments, parse_step3, "--actor_model_name_or_path me/actor --reward_model_name_or_path me/reward "),
}
MAIN = {
    1: "step1_supervised_finetuning/main.py",
    2: "step2_reward_model_finetuning/main.py",
    3: "step3_rlhf_finetuning/main.py",
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def parse(stage: int, line: str) -> Any:
    _, parse, required = STAGES[stage]
    return parse(shlex.split(required + line))


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """{"a.b": 1} of nested dataclasses, mappings and tuples."""
    if is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    return {key: x for name, part in value.items() for key, x in flat(part, f"{path}.{name}".strip(".")).items()}


def handed_on(stage: int, args: Any) -> dict[str, Any]:
    """Everything typed that a program makes of its flags, and what the arguments themselves derive from them."""
    made = {"columns": args.columns, "tensorboard_dir": args.tensorboard_dir}
    if stage < 3:
        made |= {
            "engine": settings.finetune_engine(args),
            "optimizer": settings.finetune_optimizer(args, 100),
            "settings": settings.finetune_settings(args),
            "console_every": args.console_every,
        }
        if stage == 2:
            made["reference"] = settings.reference_engine(args)
        return flat(made)
    algorithm = make_algorithm(args)
    made |= {
        "algorithm": algorithm,
        "samples_per_prompt": algorithm.samples_per_prompt,
        "actor": settings.actor_engine(args),
        "actor_optimizer": settings.actor_optimizer(args, 100),
        "reference": settings.reference_engine(args),
        "reward": settings.reward_engine(args),
        "generation": settings.generation(args, 0),
        "evaluated": settings.evaluated_distribution(args),
        "settings": settings.trainer_settings(args),
        "answers": args.answers_per_rollout,
    }
    if algorithm.critic:
        made |= {"critic": settings.critic_engine(args), "critic_optimizer": settings.critic_optimizer(args, 100)}
    return flat(made)


# --------------------------------------------------------------------------- flags that become part of a typed setting
# (flags under test, flags that make them legal) -> the fields that then differ, with their values

EVERYWHERE = {
    ("--prompt_column p", ""): {"columns.prompt": "p"},
    ("--chosen_column c", ""): {"columns.chosen": "c"},
    ("--rejected_column r", ""): {"columns.rejected": "r"},
    ("--enable_tensorboard", "--output_dir o"): {"tensorboard_dir": "o/tensorboard"},
    ("--tensorboard_path t", "--enable_tensorboard"): {"tensorboard_dir": "t"},
    ("--num_train_epochs 3", ""): {"settings.epochs": 3},
    ("--max_steps 7", ""): {"settings.max_steps": 7},
    ("--eval_steps 5", ""): {"settings.evaluate_every": 5},
}


def optimizers(*names: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The flags that all optimizers of a program share."""
    base = "--algo ppo" if "critic_optimizer" in names else ""
    return {
        (line, base): {f"{name}.{field}": value for name in names}
        for line, field, value in [
            ("--lr_scheduler_type linear", "schedule", "linear"),
            ("--adam_beta1 0.5", "betas.0", 0.5),
            ("--adam_beta2 0.6", "betas.1", 0.6),
            ("--num_warmup_steps 11", "warmup_steps", 11),
        ]
    }


FINETUNE = EVERYWHERE | {
    **optimizers("optimizer"),
    ("--learning_rate 0.25", ""): {"optimizer.learning_rate": 0.25},
    ("--weight_decay 0.125", ""): {"optimizer.weight_decay": 0.125},
    ("--lora_learning_rate 0.5", ""): {"optimizer.lora_learning_rate": 0.5},
    ("--zero_stage 2", ""): {"engine.zero_stage": 2},
    ("--offload", "--zero_stage 1"): {"engine.offload": True},
    ("--offload_parameters", "--zero_stage 3"): {"engine.offload_parameters": True},
    ("--bf16", "--zero_stage 1"): {"engine.dtype": "bf16"},
    ("--dtype bf16", "--zero_stage 1"): {"engine.dtype": "bf16"},
    ("--per_device_train_batch_size 3", ""): {"engine.micro_batch_size": 3},
    ("--gradient_clipping 0.75", ""): {"engine.gradient_clipping": 0.75},
    ("--gradient_accumulation_steps 9", ""): {"settings.accumulation": 9},
    ("--logging_steps 4", ""): {"console_every": 4},
    ("--print_loss", ""): {"console_every": 1},
}
BF16 = {("--bf16", "--zero_stage 1"), ("--dtype bf16", "--zero_stage 1")}
PREFERENCES = {
    key: values | ({"reference.dtype": "bf16"} if key in BF16 else {}) for key, values in FINETUNE.items()
} | {
    ("--reference_zero_stage 3", "--loss dpo"): {"reference.zero_stage": 3},
    ("--offload_reference_model", "--loss dpo --reference_zero_stage 3"): {"reference.offload_parameters": True},
}
PPO, ZERO_3 = "--algo ppo", "--actor_zero_stage 3"
BATCHES = "--per_device_training_batch_size 1"
RLHF = EVERYWHERE | {
    **optimizers("actor_optimizer", "critic_optimizer"),
    ("--actor_learning_rate 0.25", PPO): {"actor_optimizer.learning_rate": 0.25},
    ("--critic_learning_rate 0.5", PPO): {"critic_optimizer.learning_rate": 0.5},
    ("--actor_weight_decay 0.125", PPO): {"actor_optimizer.weight_decay": 0.125},
    ("--critic_weight_decay 0.375", PPO): {"critic_optimizer.weight_decay": 0.375},
    ("--actor_lora_learning_rate 0.5", PPO): {"actor_optimizer.lora_learning_rate": 0.5},
    ("--gradient_clipping 0.75", PPO): {"actor.gradient_clipping": 0.75, "critic.gradient_clipping": 0.75},
    # models
    ("--actor_zero_stage 2", PPO): {"actor.zero_stage": 2, "critic.zero_stage": 2},
    ("--critic_zero_stage 2", PPO): {"critic.zero_stage": 2},
    ("--reference_zero_stage 3", ""): {"reference.zero_stage": 3},
    ("--reward_zero_stage 3", ""): {"reward.zero_stage": 3},
    ("--offload", f"{PPO} --actor_zero_stage 1"): {"actor.offload": True, "critic.offload": True},
    ("--offload_critic", f"{PPO} --actor_zero_stage 1"): {"critic.offload": True},
    ("--offload_parameters", f"{PPO} {ZERO_3}"): {"actor.offload_parameters": True},
    ("--offload_reference_model", "--reference_zero_stage 3"): {"reference.offload_parameters": True},
    ("--offload_reward_model", "--reward_zero_stage 3"): {"reward.offload_parameters": True},
    **{
        (line, f"{PPO} {ZERO_3} --critic_dtype fp32"): {"actor.dtype": "bf16", "reference.dtype": "bf16"}
        for line in ("--actor_dtype bf16", "--actor_bf16")
    },
    ("--reward_dtype bf16", ""): {"reward.dtype": "bf16"},
    ("--reward_bf16", ""): {"reward.dtype": "bf16"},
    ("--critic_dtype bf16", f"{PPO} --critic_zero_stage 1"): {"critic.dtype": "bf16"},
    # rollout
    ("--per_device_generation_batch_size 32", ""): {"answers": 32},
    ("--generation_batches 3", ""): {"answers": 48, "settings.rollouts_per_step": 3},
    ("--gradient_accumulation_steps 3", "--generation_batches 2"): {"answers": 96, "settings.rollouts_per_step": 6},
    ("--per_device_training_batch_size 4", PPO): {
        "settings.micro_batch_size": 4,
        "actor.micro_batch_size": 4,
        "critic.micro_batch_size": 4,
    },
    ("--max_answer_seq_len 99", ""): {"generation.max_new_tokens": 99},
    ("--max_greedy_seq_len 98", ""): {"generation.max_greedy_tokens": 98},
    ("--two_pass_rollout", ""): {"generation.two_pass": True},
    ("--temperature 0.5", ""): {"generation.sampling.temperature": 0.5, "evaluated.temperature": 0.5},
    ("--top_p 0.25", ""): {"generation.sampling.top_p": 0.25, "evaluated.top_p": 0.25},
    ("--top_k 17", ""): {"generation.sampling.top_k": 17, "evaluated.top_k": 17},
    ("--logprobs_of model", "--temperature 0.5"): {"evaluated.temperature": 1.0},
    # algorithm
    ("--samples_per_prompt 3", f"--algo rloo {BATCHES}"): {
        "algorithm.samples_per_prompt": 3,
        "samples_per_prompt": 3,
        "answers": 48,
    },
    ("--gamma 0.5", ""): {"algorithm.gamma": 0.5},
    ("--clip_reward_value 2", ""): {"algorithm.clip_reward_value": 2.0},
    ("--clip_on reward", ""): {"algorithm.clip_on": "reward"},
    ("--loss_aggregation token", ""): {"algorithm.loss_aggregation": "token"},
    ("--entropy_coef 0.3", ""): {"algorithm.entropy_coef": 0.3},
    ("--baseline_decay 0.9", "--algo reinforce"): {"algorithm.baseline_decay": 0.9},
    ("--ppo_epochs 4", PPO): {"algorithm.epochs": 4},
    ("--ppo_mini_batches 2", f"{PPO} {BATCHES}"): {"settings.mini_batches": 2},
    ("--cliprange 0.4", PPO): {"algorithm.cliprange": 0.4},
    ("--cliprange_value 0.6", PPO): {"algorithm.cliprange_value": 0.6},
    ("--lam 0.7", PPO): {"algorithm.lam": 0.7},
    ("--penalty full_step", ""): {"algorithm.kl.reach": "full_step"},
    ("--kl_ctl 0.07", ""): {"algorithm.kl.coefficient": 0.07},
    ("--kl_in reward", "--algo grpo"): {"algorithm.kl.where": "reward"},
    ("--kl_estimator k2", "--kl_in reward"): {"algorithm.kl.estimator": "k2"},
    ("--normalize_kl", ""): {"algorithm.kl.normalize": True},
    ("--adaptive_kl", ""): {"algorithm.kl.target": 6.0},
    ("--adaptive_kl_target 3", "--adaptive_kl"): {"algorithm.kl.target": 3.0},
    ("--adaptive_kl_horizon 50", "--adaptive_kl"): {"algorithm.kl.horizon": 50},
    # training
    ("--target_kl 0.3", ""): {"settings.target_kl": 0.3},
    ("--best_by objective", ""): {"settings.best_by": "objective"},
    ("--unsup_coef 13", ""): {"settings.unsupervised_coefficient": 13.0},
    ("--enable_test_mode", "--test_stop_step 6"): {"settings.max_steps": 6},
    ("--test_stop_step 6", "--enable_test_mode"): {"settings.max_steps": 6},
}
CASES = {1: FINETUNE, 2: PREFERENCES, 3: RLHF}


@pytest.mark.parametrize(
    ("stage", "line", "base", "expected"),
    [(stage, *lines, expected) for stage, cases in CASES.items() for lines, expected in cases.items()],
)
def test_a_flag_arrives_in_its_field_and_in_no_other(stage, line, base, expected):
    before, after = (handed_on(stage, parse(stage, part)) for part in (base, f"{base} {line}"))
    missing = object()
    changed = {path: value for path, value in after.items() if before.get(path, missing) != value}
    assert changed == expected
    assert set(before) <= set(after)


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_comes_back_from_run_json(stage, tmp_path):
    file = tmp_path / "run.json"
    for lines in CASES[stage]:
        first = parse(stage, " ".join(lines))
        file.write_text(json.dumps({"stage": first.stage, "arguments": vars(first)}))
        again = STAGES[stage][1](["--config", str(file)])
        assert vars(again) == vars(first) | {"config": str(file), "notices": again.notices}


def test_the_algorithm_arrives():
    for name, kind in ALGORITHMS.items():
        assert type(make_algorithm(parse(3, f"--algo {name}"))) is kind


# ---------------------------------------------------------------------------------------- flags that are read elsewhere
# flag -> (file:function, expression), once or several times

OPEN_DATA = f"{ASSEMBLY}:_open_data"
READ_EVERYWHERE = {
    "output_dir": [("{main}:main", "args.output_dir")],
    "seed": [("{main}:main", "set_seed(args.seed)"), (OPEN_DATA, "'seed': args.seed")],
    "local_rank": [("{main}:main", "init_distributed(args.local_rank)")],
    "data_path": [(OPEN_DATA, "'data_path': args.data_path")],
    "data_split": [(OPEN_DATA, "'data_split': args.data_split")],
    "data_seed": [(OPEN_DATA, "'data_seed': args.data_seed")],
    "data_output_path": [(OPEN_DATA, "'data_output_path': args.data_output_path")],
    "overlong": [(OPEN_DATA, "'overlong': args.overlong")],
    "streaming": [(OPEN_DATA, "if not args.streaming")],
    "shuffle_buffer": [(OPEN_DATA, "'shuffle_buffer': args.shuffle_buffer")],
    "preprocessing_num_workers": [(OPEN_DATA, "num_proc=args.preprocessing_num_workers")],
    "per_device_eval_batch_size": [(OPEN_DATA, "'eval_batch_size': args.per_device_eval_batch_size")],
    "attn_implementation": [(f"{ASSEMBLY}:_load_from", "attention = args.attn_implementation")],
}
LOADERS, TASK = f"{ASSEMBLY}:finetune_loaders", f"{ASSEMBLY}:build_preference_task"
ADAPTERS = "add_lora(model.hf, args.lora_dim, args.lora_module_name, args.only_optimize_lora, '--lora_module_name')"
READ_IN_FINETUNING = READ_EVERYWHERE | {
    "model_name_or_path": [
        ("{main}:main", "load_config(args.model_name_or_path, '--model_name_or_path')"),
        (f"{ASSEMBLY}:_load", "(args.model_name_or_path, '--model_name_or_path')"),
    ],
    "chat_template": [("{main}:main", "chat_template=args.chat_template")],
    "max_seq_len": [(LOADERS, "max_len=args.max_seq_len")],
    "max_eval_batches": [(LOADERS, "First(evaluation, args.max_eval_batches)")],
    "packing": [(f"{ASSEMBLY}:_load", "packing=args.packing")],
    "gradient_checkpointing": [
        (f"{ASSEMBLY}:_training_options", "'gradient_checkpointing': args.gradient_checkpointing")
    ],
    "disable_dropout": [(f"{ASSEMBLY}:_training_options", "'disable_dropout': args.disable_dropout")],
    **dict.fromkeys(("lora_dim", "lora_module_name", "only_optimize_lora"), [(f"{ASSEMBLY}:_add_adapters", ADAPTERS)]),
}
READ = {
    1: READ_IN_FINETUNING
    | {
        "sft_only_data_path": [(LOADERS, "'sft_only_data_path': args.sft_only_data_path")],
        "train_on": [(LOADERS, "'train_on': args.train_on")],
    },
    2: READ_IN_FINETUNING
    | {
        "loss": [
            (TASK, "args.loss == 'ranking'"),
            (TASK, "args.length_alpha if args.loss == 'r-dpo' else 0.0"),
            (LOADERS, "'best_and_worst': args.loss != 'ranking'"),
        ],
        "use_margin": [(TASK, "use_margin=args.use_margin"), (LOADERS, "'need_margin': args.use_margin")],
        "label_smoothing": [(TASK, "label_smoothing=args.label_smoothing")],
        "center_rewards_coefficient": [(TASK, "centring=args.center_rewards_coefficient")],
        "ranked_loss": [(TASK, "ranked_loss=args.ranked_loss")],
        "length_alpha": [(TASK, "args.length_alpha if args.loss == 'r-dpo' else 0.0")],
        "dpo_beta": [(TASK, "args.dpo_beta")],
    },
    3: READ_EVERYWHERE
    | {
        "actor_model_name_or_path": [
            (f"{ASSEMBLY}:check_models", "args.actor_model_name_or_path"),
            (f"{ASSEMBLY}:build_engines", "(args.actor_model_name_or_path, '--actor_model_name_or_path')"),
        ],
        "critic_model_name_or_path": [
            (f"{ASSEMBLY}:check_models", "(args.critic_model_name_or_path, '--critic_model_name_or_path')"),
            (f"{ASSEMBLY}:_critic", "args.critic_model_name_or_path"),
        ],
        "reward_model_name_or_path": [
            (f"{ASSEMBLY}:build_reward", "reward_sources(args.reward_model_name_or_path, args.reward_fn)")
        ],
        "reward_fn": [
            (f"{ASSEMBLY}:reward_functions", "reward_sources(args.reward_model_name_or_path, args.reward_fn)")
        ],
        "reward_fn_timeout": [
            (
                f"{ASSEMBLY}:reward_functions",
                "FunctionReward(load_function(source.name), tokenizer, args.reward_fn_timeout)",
            )
        ],
        "normalize_reward": [(f"{ASSEMBLY}:build_reward", "if args.normalize_reward")],
        "chat_template": [(f"{ASSEMBLY}:check_models", "chat_template=args.chat_template")],
        "algo": [("remax/arguments.py:make_algorithm", "ALGORITHMS[args.algo]")],
        "max_prompt_seq_len": [
            (f"{ASSEMBLY}:load_data", "max_len=args.max_prompt_seq_len"),
            (f"{ASSEMBLY}:_check_length", "args.max_prompt_seq_len + args.max_answer_seq_len"),
            (f"{ASSEMBLY}:examine_engines", "max_prompt_tokens=args.max_prompt_seq_len"),
        ],
        "max_eval_batches": [(f"{ASSEMBLY}:load_data", "limit = args.max_eval_batches")],
        "zero3_generation": [(f"{ASSEMBLY}:build_engines", "gather_for_generation=args.zero3_generation == 'gather'")],
        "logprob_chunk_size": [
            (f"{ASSEMBLY}:build_engines", "(evaluated_distribution(args), args.logprob_chunk_size)")
        ],
        "disable_actor_dropout": [(f"{ASSEMBLY}:build_engines", "disable_dropout=args.disable_actor_dropout")],
        "actor_gradient_checkpointing": [
            (f"{ASSEMBLY}:build_engines", "gradient_checkpointing=args.actor_gradient_checkpointing")
        ],
        "disable_reward_dropout": [(f"{ASSEMBLY}:_critic", "'disable_dropout': args.disable_reward_dropout")],
        "critic_gradient_checkpointing": [
            (f"{ASSEMBLY}:_critic", "'gradient_checkpointing': args.critic_gradient_checkpointing")
        ],
        **dict.fromkeys(
            ("actor_lora_dim", "actor_lora_module_name", "only_optimize_lora"),
            [
                (
                    f"{ASSEMBLY}:build_engines",
                    "add_lora(model.hf, args.actor_lora_dim, args.actor_lora_module_name, args.only_optimize_lora, "
                    "flag)",
                )
            ],
        ),
        "unsupervised_dataset_name": [(f"{ASSEMBLY}:load_data", "if args.unsupervised_dataset_name")],
        "unsupervised_dataset_config_name": [
            (f"{ASSEMBLY}:load_data", "configuration=args.unsupervised_dataset_config_name")
        ],
        "logging_steps": [("{main}:main", "console_every=args.logging_steps")],
        "save_answers": [("{main}:main", "if args.save_answers")],
        "print_answers": [("{main}:main", "if args.print_answers")],
        "log_variance": [("{main}:main", "if args.log_variance")],
        "log_variance_gradient_steps": [("{main}:main", "steps_between = args.log_variance_gradient_steps")],
        "skip_doctor": [("{main}:main", "if not args.skip_doctor")],
        "enable_ema": [
            ("{main}:main", "WeightAverage(actor.model.hf, zero3=actor.zero3) if args.enable_ema else None")
        ],
        "save_at_final": [("{main}:save_final", "if args.save_at_final")],
    },
}


def expressions(place: str) -> set[str]:
    """The text of every expression, keyword, assignment, condition and dictionary entry in `file:function`."""
    file, _, name = place.partition(":")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    (function,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    nodes = list(ast.walk(function))
    found = {ast.unparse(node) for node in nodes if isinstance(node, ast.expr | ast.keyword | ast.Assign)}
    found |= {f"if {ast.unparse(node.test)}" for node in nodes if isinstance(node, ast.If)}
    pairs = [
        (k, v) for node in nodes if isinstance(node, ast.Dict) for k, v in zip(node.keys, node.values, strict=True)
    ]
    return found | {f"{ast.unparse(key)}: {ast.unparse(value)}" for key, value in pairs if key is not None}


@pytest.mark.parametrize(
    ("flag", "place", "expression"),
    sorted(
        {
            (flag, place.format(main=MAIN[stage]), expression)
            for stage, read in READ.items()
            for flag, readings in read.items()
            for place, expression in readings
        }
    ),
)
def test_a_flag_is_read_where_the_table_says(flag, place, expression):
    assert re.search(rf"args\.{flag}\b", expression)
    assert expression in expressions(place)


# ----------------------------------------------------------------------------------------------------------- every flag


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_has_a_group_a_help_text_and_a_reader(stage):
    arguments = STAGES[stage][0]
    flags = flags_of(arguments)
    followed = {line.split()[0].removeprefix("--") for line, _ in CASES[stage]}
    assert followed.isdisjoint(READ[stage])
    config = {"config"}  # read_flags reads it; see test_config_file.py
    retired = {name for name in flags if name in WHY_RETIRED}
    assert set(flags) == followed | set(READ[stage]) | retired | config
    for name, flag in flags.items():
        assert flag.help, name
        assert flag.group or name == "config", name


@pytest.mark.parametrize("stage", STAGES)
def test_retired_flags_change_nothing(stage):
    before = handed_on(stage, parse(stage, ""))
    for name, flag in flags_of(STAGES[stage][0]).items():
        if name in WHY_RETIRED:
            args = parse(stage, f"--{name}" + (" 1" if flag.kind.type is int else ""))
            assert args.notices == [f"--{name}: without effect; {WHY_RETIRED[name]}"]
            assert handed_on(stage, args) == before


def test_every_algorithm_can_be_chosen():
    assert get_args(get_type_hints(Step3Arguments)["algo"]) == tuple(ALGORITHMS)


def test_flags_of_some_algorithms_name_what_algorithms_have():
    for field in fields(Step3Arguments):
        for trait in field.metadata.get("only", ()):
            assert readers(trait) or any(getattr(kind, trait, False) is True for kind in ALGORITHMS.values())
    losses = get_args(get_type_hints(Step2Arguments)["loss"])
    for field in fields(Step2Arguments):
        assert set(field.metadata.get("only", ())) <= set(losses)


@pytest.mark.parametrize("name", ["gamma", "samples_per_prompt", "clip_on", "loss_aggregation"])
def test_the_help_states_the_default_of_every_algorithm(name):
    # "...; default: 4 (rloo, grpo), 1 (others)": the value before a bracket is the default of those inside
    words = flags_of(Step3Arguments)[name].help.split("default")[-1]
    for algo, kind in ALGORITHMS.items():
        stated = [part.rsplit("(", 1) for part in words.replace(":", "").split(")") if "(" in part]
        named = [value for value, names in stated if algo in names] or [v for v, names in stated if "others" in names]
        default = getattr(kind(), name)
        assert named[0].strip(", ") == (f"{default:g}" if isinstance(default, int | float) else default)
