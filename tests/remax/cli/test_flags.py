"""Every flag has a group, a help text and a reader: it is set to a value of its own, and that value must arrive in the
one field that it is for, and nowhere else.

A flag that becomes part of a typed setting is followed there (CASES). Where a stage reads a flag otherwise, READ names
the function and the expression, and the stages read nothing else.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch

from remax.algorithms import ALGORITHMS, readers
from remax.cli.flags import WHY_RETIRED, Step1Arguments, Step2Arguments, Step3Arguments
from remax.cli.parser import flags_of
from remax.cli.validate import make_algorithm, parse_step1, parse_step2, parse_step3
from remax.generation.rollout import DEFAULT_DECODER
from remax.stages import finetune, models, settings
from remax.stages.data import data_config

ROOT = Path(__file__).parents[3]
STAGES = {
    1: (Step1Arguments, parse_step1, "--model_name_or_path me/model "),
    2: (Step2Arguments, parse_step2, "--model_name_or_path me/model "),
    3: (Step3Arguments, parse_step3, "--actor_model_name_or_path me/actor --reward_model_name_or_path me/reward "),
}


@pytest.fixture(autouse=True)
def wandb(monkeypatch, tmp_path_factory):
    """The package is there, as far as anybody asks here."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "wandb").mkdir()
    (folder / "wandb" / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder)


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
    made = {"data": data_config(args), "tensorboard_dir": args.tensorboard_dir, "wandb": "wandb" in args.reports}
    if stage < 3:
        made |= {
            "model": settings.finetune_model(args),
            "optimizer": settings.finetune_optimizer(args, 100),
            "cadence": settings.finetune_cadence(args),
            "console_every": args.console_every,
        }
        if stage == 2:
            made["reference"] = settings.finetune_reference(args)
        return flat(made)
    algorithm = make_algorithm(args)
    made |= {
        "algorithm": algorithm,
        "samples_per_prompt": algorithm.samples_per_prompt,
        "actor": settings.actor_model(args),
        "actor_optimizer": settings.actor_optimizer(args, 100),
        "reference": settings.reference_model(args),
        "reward": settings.reward_engine(args),
        "generation": settings.generation(args, 0),
        "evaluated": settings.evaluated_distribution(args),
        "settings": settings.trainer_settings(args),
        "answers": args.answers_per_rollout,
        "reward_models": args.reward_models,
    }
    if algorithm.critic:
        critic = settings.critic_model(args, "me/first-reward")
        made |= {"critic": critic, "critic_optimizer": settings.critic_optimizer(args, 100)}
    return flat(made)


# --------------------------------------------------------------------------- flags that become part of a typed setting
# (flags under test, flags that make them legal) -> the fields that then differ, with their values

EVERYWHERE = {
    # data
    ("--data_path me/a me/b:0.5", ""): {"data.data_path": ["me/a", "me/b:0.5"]},
    ("--prompt_column p", ""): {"data.columns.prompt": "p"},
    ("--chosen_column c", ""): {"data.columns.chosen": "c"},
    ("--rejected_column r", ""): {"data.columns.rejected": "r"},
    ("--data_split 1,2,3", ""): {"data.data_split": "1,2,3"},
    ("--data_seed 21", ""): {"data.data_seed": 21},
    ("--seed 22", ""): {"data.seed": 22},
    ("--data_output_path d", ""): {"data.cache_dir": "d"},
    ("--preprocessing_num_workers 3", ""): {"data.num_proc": 3},
    ("--overlong drop", ""): {"data.overlong": "drop"},
    ("--streaming", "--max_steps 7"): {"data.streaming": True},
    ("--shuffle_buffer 99", "--max_steps 7 --streaming"): {"data.shuffle_buffer": 99},
    # run
    ("--report_to tensorboard", "--output_dir o"): {"tensorboard_dir": "o/tensorboard"},
    ("--report_to wandb", ""): {"wandb": True},
    ("--report_to wandb tensorboard", "--output_dir o"): {"wandb": True, "tensorboard_dir": "o/tensorboard"},
    ("--enable_tensorboard", "--output_dir o"): {"tensorboard_dir": "o/tensorboard"},
    ("--tensorboard_path t", "--enable_tensorboard"): {"tensorboard_dir": "t"},
}


def cadence(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        ("--num_train_epochs 3", ""): {f"{name}.epochs": 3},
        ("--max_steps 7", ""): {f"{name}.max_steps": 7, f"{name}.epochs": 0},  # as many as it takes
        ("--max_steps 7", "--num_train_epochs 3"): {f"{name}.max_steps": 7},
        ("--eval_steps 5", ""): {f"{name}.evaluate_every": 5},
    }


def lora(prefix: str, base: str) -> dict[tuple[str, str], dict[str, Any]]:
    base = f"{base} --{prefix}lora_dim 4"
    model = prefix.strip("_") or "model"
    return {
        (f"--{prefix}lora_dim 8", base): {f"{model}.lora.dim": 8},
        (f"--{prefix}lora_module_name attn", base): {f"{model}.lora.module_name": "attn"},
        (f"--{prefix}lora_alpha 32", base): {f"{model}.lora.alpha": 32},
        (f"--{prefix}lora_dropout 0.25", base): {f"{model}.lora.dropout": 0.25},
        ("--only_optimize_lora", base): {f"{model}.lora.only": True},
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
    **cadence("cadence"),
    **lora("", ""),
    ("--attn_implementation eager", ""): {"model.attn_implementation": "eager"},
    ("--model_name_or_path me/other", ""): {"model.name": "me/other"},
    ("--disable_dropout", ""): {"model.disable_dropout": True},
    ("--gradient_checkpointing", ""): {"model.gradient_checkpointing": True},
    ("--packing", ""): {"model.packing": True},
    **optimizers("optimizer"),
    ("--learning_rate 0.25", ""): {"optimizer.learning_rate": 0.25},
    ("--weight_decay 0.125", ""): {"optimizer.weight_decay": 0.125},
    ("--lora_learning_rate 0.5", ""): {"optimizer.lora_learning_rate": 0.5},
    ("--zero_stage 2", ""): {"model.engine.zero_stage": 2},
    ("--offload", "--zero_stage 1"): {"model.engine.offload": True},
    ("--offload_parameters", "--zero_stage 3"): {"model.engine.offload_parameters": True},
    ("--bf16", "--zero_stage 1"): {"model.engine.dtype": "bf16"},
    ("--dtype bf16", "--zero_stage 1"): {"model.engine.dtype": "bf16"},
    ("--per_device_train_batch_size 3", ""): {"model.engine.micro_batch_size": 3},
    ("--gradient_clipping 0.75", ""): {"model.engine.gradient_clipping": 0.75},
    ("--gradient_accumulation_steps 9", ""): {"cadence.batches_per_step": 9},
    ("--logging_steps 4", ""): {"console_every": 4},
    ("--print_loss", ""): {"console_every": 1},
}
SUPERVISED = FINETUNE | {
    ("--sft_only_data_path me/c me/d", "--data_path me/a"): {"data.sft_only_data_path": ["me/c", "me/d"]},
    ("--train_on all", ""): {"data.train_on": "all"},
}
OF_BOTH_MODELS = ("name", "attn_implementation", "packing", "engine.dtype")  # of a policy and its reference
PREFERENCES = {
    key: values | {f"reference.{x}": values[f"model.{x}"] for x in OF_BOTH_MODELS if f"model.{x}" in values}
    for key, values in FINETUNE.items()
} | {
    ("--loss dpo", ""): {"data.best_and_worst": True},
    ("--use_margin", ""): {"data.need_margin": True},
    ("--reference_zero_stage 3", "--loss dpo"): {"reference.engine.zero_stage": 3},
    ("--offload_reference_model", "--loss dpo --reference_zero_stage 3"): {"reference.engine.offload_parameters": True},
}
PPO, ZERO_3 = "--algo ppo", "--actor_zero_stage 3"
ADAPTERS = f"{PPO} --actor_lora_dim 4 --only_optimize_lora"
BATCHES = "--per_device_training_batch_size 1"
RLHF = EVERYWHERE | {
    **cadence("settings.cadence"),
    **optimizers("actor_optimizer", "critic_optimizer"),
    ("--actor_learning_rate 0.25", PPO): {"actor_optimizer.learning_rate": 0.25},
    ("--critic_learning_rate 0.5", PPO): {"critic_optimizer.learning_rate": 0.5},
    ("--actor_weight_decay 0.125", PPO): {"actor_optimizer.weight_decay": 0.125},
    ("--critic_weight_decay 0.375", PPO): {"critic_optimizer.weight_decay": 0.375},
    ("--actor_lora_learning_rate 0.5", PPO): {"actor_optimizer.lora_learning_rate": 0.5},
    ("--gradient_clipping 0.75", PPO): {
        "actor.engine.gradient_clipping": 0.75,
        "critic.engine.gradient_clipping": 0.75,
    },
    # models
    ("--actor_model_name_or_path me/other", PPO): {"actor.name": "me/other", "reference.name": "me/other"},
    ("--critic_model_name_or_path me/own", PPO): {
        "critic.name": "me/own",
        "critic.flag": "--critic_model_name_or_path",
    },
    ("--attn_implementation eager", PPO): {
        f"{model}.attn_implementation": "eager" for model in ("actor", "reference", "critic")
    },
    ("--disable_actor_dropout", PPO): {"actor.disable_dropout": True},
    ("--disable_reward_dropout", PPO): {"critic.disable_dropout": True},
    ("--actor_gradient_checkpointing", PPO): {"actor.gradient_checkpointing": True},
    ("--critic_gradient_checkpointing", PPO): {"critic.gradient_checkpointing": True},
    **lora("actor_", PPO),
    ("--share reference", f"{ADAPTERS} --critic_lora_dim 4"): {
        "actor.lora.adapter": "actor",
        "critic.lora.adapter": "critic",
        "reward.dtype": "auto",  # the reward model is the critic's
    },
    ("--critic_lora_dim 3", f"{ADAPTERS} --critic_lora_dim 4"): {"critic.lora.dim": 3},
    ("--actor_lora_alpha 9", f"{ADAPTERS} --critic_lora_dim 4"): {"actor.lora.alpha": 9, "critic.lora.alpha": 9},
    ("--actor_zero_stage 2", PPO): {"actor.engine.zero_stage": 2, "critic.engine.zero_stage": 2},
    ("--critic_zero_stage 2", PPO): {"critic.engine.zero_stage": 2},
    ("--reference_zero_stage 3", ""): {"reference.engine.zero_stage": 3},
    ("--reward_zero_stage 3", ""): {"reward.zero_stage": 3},
    ("--offload", f"{PPO} --actor_zero_stage 1"): {"actor.engine.offload": True, "critic.engine.offload": True},
    ("--offload_critic", f"{PPO} --actor_zero_stage 1"): {"critic.engine.offload": True},
    ("--offload_parameters", f"{PPO} {ZERO_3}"): {"actor.engine.offload_parameters": True},
    ("--offload_reference_model", "--reference_zero_stage 3"): {"reference.engine.offload_parameters": True},
    ("--offload_reward_model", "--reward_zero_stage 3"): {"reward.offload_parameters": True},
    **{
        (line, f"{PPO} {ZERO_3} --critic_dtype fp32"): {"actor.engine.dtype": "bf16", "reference.engine.dtype": "bf16"}
        for line in ("--actor_dtype bf16", "--actor_bf16")
    },
    ("--reward_model_name_or_path me/x me/y:2", ""): {"reward_models": ["me/x", "me/y:2"]},
    ("--reward_dtype bf16", ""): {"reward.dtype": "bf16"},
    ("--reward_bf16", ""): {"reward.dtype": "bf16"},
    ("--critic_dtype bf16", f"{PPO} --critic_zero_stage 1"): {"critic.engine.dtype": "bf16"},
    # rollout
    ("--per_device_generation_batch_size 32", ""): {"answers": 32},
    ("--generation_batches 3", ""): {"answers": 48, "settings.cadence.batches_per_step": 3},
    ("--gradient_accumulation_steps 3", "--generation_batches 2"): {
        "answers": 96,
        "settings.cadence.batches_per_step": 6,
    },
    ("--per_device_training_batch_size 4", PPO): {
        "settings.micro_batch_size": 4,
        "actor.engine.micro_batch_size": 4,
        "critic.engine.micro_batch_size": 4,
    },
    ("--max_answer_seq_len 99", ""): {"generation.max_new_tokens": 99},
    ("--max_answer_seq_len 98", "--loss_aggregation constant"): {
        "generation.max_new_tokens": 98,
        "algorithm.longest_answer": 98,
    },
    ("--max_greedy_seq_len 98", ""): {"generation.max_greedy_tokens": 98},
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
    ("--baseline calibrated", ""): {"algorithm.baseline": "calibrated"},
    ("--gamma 0.5", ""): {"algorithm.gamma": 0.5},
    ("--clip_reward_value 2", ""): {"algorithm.clip_reward_value": 2.0},
    ("--clip_on reward", ""): {"algorithm.clip_on": "reward"},
    ("--loss_aggregation token", ""): {"algorithm.loss_aggregation": "token"},
    ("--entropy_coef 0.3", ""): {"algorithm.entropy_coef": 0.3},
    ("--advantage_scaling none", "--algo grpo"): {"algorithm.advantage_scaling": "none"},
    ("--baseline_decay 0.9", "--algo reinforce"): {"algorithm.baseline_decay": 0.9},
    ("--ppo_epochs 4", PPO): {"algorithm.epochs": 4},
    ("--ppo_mini_batches 2", f"{PPO} {BATCHES}"): {"settings.mini_batches": 2},
    ("--critic_warmup_steps 3", PPO): {"settings.critic_warmup_steps": 3, "actor_optimizer.total_steps": 97},
    ("--cliprange 0.4", PPO): {"algorithm.cliprange": 0.4},
    ("--cliprange_value 0.6", PPO): {"algorithm.cliprange_value": 0.6},
    ("--lam 0.7", PPO): {"algorithm.lam": 0.7},
    ("--inpo_eta 0.02", "--algo inpo"): {"algorithm.eta": 0.02},
    ("--inpo_tau 0.001", "--algo inpo"): {"algorithm.tau": 0.001},
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
    ("--enable_test_mode", "--test_stop_step 6"): {"settings.cadence.max_steps": 6},
    ("--test_stop_step 6", "--enable_test_mode"): {"settings.cadence.max_steps": 6},
}
CASES = {1: SUPERVISED, 2: PREFERENCES, 3: RLHF}


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


@pytest.mark.parametrize(("stage", "model"), [(1, "model"), (2, "model"), (3, "actor")])
def test_without_a_dimension_there_are_no_adapters(stage, model):
    assert handed_on(stage, parse(stage, ""))[f"{model}.lora"] is None


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
# file:function -> the expressions that read flags there; FOLLOWED functions make what CASES looks at

DATA, MODELS, FINETUNING, LEARNING, RESUME = (
    f"remax/stages/{name}.py" for name in ("data", "models", "finetune", "rlhf", "resume")
)
FOLLOWED = {f"{DATA}:data_config"}
LONGEST = "args.max_prompt_seq_len + args.max_answer_seq_len"
REWARDS = "reward_sources(args.reward_models, args.reward_fn)"
READ = {
    f"{FINETUNING}:run_finetuning": [
        "name, flag = (args.model_name_or_path, '--model_name_or_path')",
        "check_length(config, args.max_seq_len, '--max_seq_len')",
        "load_tokenizer(args.model_name_or_path, chat_template=args.chat_template)",
        "args.loss in ('ranking', 'hydra')",
        "init_distributed(args.local_rank)",
        "set_seed(args.seed)",
        "torch.set_float32_matmul_precision('high' if args.tf32 else 'highest')",
        "output = open_folder(args.output_dir)",
        "for notice in args.notices",
        "train_loader, held_out = finetune_loaders(args, tokenizer)",
        "(finetune_cadence(args), resume.checkpoints(args, output, found))",
        "task = build_task(args, tokenizer, held_out, cadence.total_steps(len(train_loader)))",
    ],
    f"{FINETUNING}:build_task": [
        "trained_policy(trained, optimizer, tokenizer, args.max_seq_len)",
        "trained_reward(trained, optimizer, tokenizer, args.max_seq_len)",
        "trained_hydra(trained, optimizer, tokenizer, args.max_seq_len)",
        "{'use_margin': args.use_margin, 'label_smoothing': args.label_smoothing, 'centring': "
        "args.center_rewards_coefficient}",
        "if args.loss == 'ranking'",
        "if args.loss == 'hydra'",
        "ranked_loss=args.ranked_loss",
        "Hydra(both, held_out, args.ranking_weight, **of_pairs)",
        "alpha = args.length_alpha if args.loss == 'r-dpo' else 0.0",
        "DirectPreference(policy, reference, held_out, args.dpo_beta, alpha, args.label_smoothing)",
    ],
    f"{FINETUNING}:train_and_export": [
        "output, learner = (Path(args.output_dir), task.learner)",
        "start_run(output, args, args.stage, resumed)",
        "tensorboard_dir=args.tensorboard_dir",
        "wandb=vars(args) if 'wandb' in args.reports else None",
        "console_every=args.console_every",
    ],
    f"{DATA}:finetune_loaders": [
        "data_config(args, args.output_dir)",
        "batches=args.max_steps * args.gradient_accumulation_steps",
        "max_len=args.max_seq_len",
        "train_batch_size=args.per_device_train_batch_size",
        "eval_batch_size=args.per_device_eval_batch_size",
        "First(evaluation, args.max_eval_batches)",
    ],
    f"{DATA}:columns_of": [
        "for name in args.data_path",
        "read_splits(name, args.data_output_path, '--data_path', args.streaming)",
    ],
    f"{DATA}:load_data": [
        f"longest = {LONGEST}",
        "data_config(args, output)",
        "batches=args.max_steps * args.rollout_batches",
        "max_len=args.max_prompt_seq_len",
        "train_batch_size=args.per_device_generation_batch_size",
        "eval_batch_size = args.per_device_eval_batch_size",
        "if args.unsupervised_dataset_name",
        "plain_text_batches(args.unsupervised_dataset_name, configuration=args.unsupervised_dataset_config_name, "
        "tokenizer=tokenizer, block=longest, batch_size=args.per_device_unsupervised_batch_size, seed=args.seed, "
        "cache_dir=args.data_output_path, **ranks)",
        "limit, rows = (args.max_eval_batches, concatenate_datasets(held_out) if held_out else None)",
    ],
    f"{MODELS}:check_models": [
        REWARDS,
        "load_tokenizer(args.actor_model_name_or_path, '--actor_model_name_or_path', chat_template=args.chat_template)",
        "_check_length(args, args.actor_model_name_or_path, '--actor_model_name_or_path')",
        "if args.share == 'all'",
        "if args.normalize_reward",
        "score_statistics(config, args.actor_model_name_or_path, '--actor_model_name_or_path')",
        "if ALGORITHMS[args.algo].critic",
        "name, flag = (args.critic_model_name_or_path, '--critic_model_name_or_path')",
    ],
    f"{MODELS}:_check_length": [f"longest = {LONGEST}"],
    f"{MODELS}:_check_scorer": [
        "if args.normalize_reward and what == 'reward model'",
        "args.actor_model_name_or_path",  # in a message
        "args.notices.append",
    ],
    f"{MODELS}:reward_functions": [
        REWARDS,
        "timeout = args.reward_fn_timeout",
    ],
    f"{MODELS}:build_reward": [
        REWARDS,
        "if args.normalize_reward",
        "ModelSpec(source.name, flag, engine, args.attn_implementation)",
    ],
    f"{MODELS}:build_roles": [
        "eos_ids = actor.model.hf.generation_config.eos_token_id if args.reward_fn else None",
        "distribution, chunk_size = (evaluated_distribution(args), args.logprob_chunk_size)",
        "gather_for_generation=args.zero3_generation == 'gather'",
        "decoder=decoder_for_one_model(graphs=bool(args.cuda_graphs))",
        "tokenizer, spec, shared = (tokenizers.actor, actor_model(args), args.share != 'none')",
        "if args.share == 'all'",
        "JOINT_CRITIC if args.joint_critic else CRITIC",
        "TrainedReward(engine, use) if ALGORITHMS[args.algo].critic else None",
        "if tokenizers.critic is not None and args.critic_is_reward",
    ],
    f"{MODELS}:pack_rows": ["longest = " + LONGEST, "start_packing(role, longest, args.packing, **{read: True})"],
    f"{MODELS}:build_critic": [REWARDS, "TrainedReward(engine, CRITIC if args.critic_is_reward else None)"],
    f"{MODELS}:load_trunk": [
        "if args.share == 'reference'",
        "model, critic = (load_hydra_model(spec, tokenizer), ALGORITHMS[args.algo].critic)",
        "if critic and (not args.joint_critic)",
        "add_lora(model.hf, *astuple(critic_adapters(args)))",
    ],
    f"{MODELS}:load_critic": ["if not args.critic_is_reward"],
    f"{LEARNING}:run_rlhf": [
        "init_distributed(args.local_rank)",
        "set_seed(args.seed)",
        "torch.set_float32_matmul_precision('high' if args.tf32 else 'highest')",
        "output = open_folder(args.output_dir)",
        "start_run(output, args, args.stage, found.step if found else None)",
        "for notice in args.notices",
        "algorithm = make_algorithm(args, sum_across_ranks=sum_across_ranks)",
        "settings = trainer_settings(args)",
        "if not (args.skip_doctor or found)",
        "tensorboard_dir=args.tensorboard_dir",
        "wandb=vars(args) if 'wandb' in args.reports else None",
        "console_every=args.logging_steps",
        "if args.save_answers",
        "if args.print_answers",
        "if args.log_variance",
        "steps_between = args.log_variance_gradient_steps",
        "average=WeightAverage(actor.model.hf, zero3=actor.zero3) if args.enable_ema else None",
        "args.best_by",  # in a message
        "if args.critic_warmup_steps >= steps",
    ],
    f"{LEARNING}:examine_models": [f"max_len={LONGEST}", "max_prompt_tokens=args.max_prompt_seq_len"],
    f"{LEARNING}:save_final": ["if args.save_at_final"],
    "remax/cli/validate.py:make_algorithm": ["ALGORITHMS[args.algo]"],
    "remax/cli/validate.py:check_resume": [
        "if args.resume not in ('auto', 'never') and (not Path(args.resume).is_dir())",
        "if args.resume != 'never' and args.overwrite_output_dir",
        "if not (same_run or args.overwrite_output_dir)",
    ],
    f"{RESUME}:complete": ["if args.resume != 'auto' or not (output / 'results.json').is_file()"],
    f"{RESUME}:find": ["if args.resume == 'never'", "if args.resume == 'auto'", "folder = Path(args.resume)"],
    f"{RESUME}:checkpoints": [
        "Saving(args.save_steps, args.save_minutes, args.save_total_limit, args.max_hours, "
        "go_back=args.on_nan == 'rollback')"
    ],
}


def functions(file: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def names_read(text: str) -> set[str]:
    return set(re.findall(r"\bargs\.(\w+)", text))


def read_in(stage: int) -> set[str]:
    """The flags of a stage that its programs read by READ."""
    foreign = (
        (DATA + ":load_data", MODELS, LEARNING, "remax/cli/validate.py:make_algorithm")
        if stage < 3
        else (FINETUNING, DATA + ":finetune_")
    )
    lines = [line for place, lines in READ.items() if not place.startswith(foreign) for line in lines]
    return names_read(" ".join(lines)) & set(flags_of(STAGES[stage][0]))


def expressions(place: str) -> set[str]:
    """The text of every expression, keyword, assignment, condition and loop in `file:function`."""
    file, _, name = place.partition(":")
    nodes = list(ast.walk(functions(file)[name]))
    found = {ast.unparse(node) for node in nodes if isinstance(node, ast.expr | ast.keyword | ast.Assign)}
    found |= {f"if {ast.unparse(node.test)}" for node in nodes if isinstance(node, ast.If)}
    return found | {
        f"for {ast.unparse(node.target)} in {ast.unparse(node.iter)}" for node in nodes if isinstance(node, ast.For)
    }


@pytest.mark.parametrize(("place", "expression"), [(place, line) for place, lines in READ.items() for line in lines])
def test_a_flag_is_read_where_the_table_says(place, expression):
    assert re.search(r"\bargs\b", expression)
    assert expression in expressions(place)


@pytest.mark.parametrize("file", [DATA, MODELS, FINETUNING, LEARNING])
def test_stages_read_what_the_table_says_and_nothing_else(file):
    for name, function in functions(file).items():
        place = f"{file}:{name}"
        if place not in FOLLOWED:
            assert names_read(ast.unparse(function)) == names_read(" ".join(READ.get(place, [])))


# ------------------------------------------------------------------------------- the settings come to the right models


def recorded(*parts: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Stands for a function or a class: keeps what it was called with."""
    return parts, options


def record(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(module, name, partial(recorded, name))


@pytest.mark.parametrize(
    "line", ["--zero3_generation synced --temperature 0.5", "--actor_dtype bf16 --actor_lora_dim 4"]
)
def test_every_model_of_step_3_gets_its_own_settings(monkeypatch, line):
    record(monkeypatch, models, "load_policy_model", "load_scorer", "TrainedEngine", "FrozenEngine")
    record(monkeypatch, models, "Actor", "Reference", "Reward", "TrainedReward")
    args = parse(3, f"--algo ppo --actor_zero_stage 3 --reference_zero_stage 1 --critic_dtype fp32 {line}")
    tokenizer = SimpleNamespace(pad_token_id=7)
    built = models.build_roles(args, models.Tokenizers(tokenizer, ["of the reward"], "of the critic"), 50)

    actor, reference = settings.actor_model(args), settings.reference_model(args)
    critic, engine = settings.critic_model(args, "me/reward"), settings.reward_engine(args)
    trained = recorded(
        "TrainedEngine",
        recorded("load_policy_model", actor, tokenizer),
        actor.engine,
        settings.actor_optimizer(args, 50),
    )
    frozen = recorded("FrozenEngine", recorded("load_policy_model", reference, tokenizer), reference.engine)
    sampling = settings.evaluated_distribution(args)
    assert built.actor == recorded(
        "Actor",
        trained,
        generation=settings.generation(args, 7),
        sampling=sampling,
        chunk_size=args.logprob_chunk_size,
        gather_for_generation="synced" not in line,
        decoder=DEFAULT_DECODER,
        use=None,
    )
    assert built.reference == recorded("Reference", frozen, sampling=sampling, chunk_size=args.logprob_chunk_size)
    spec = settings.ModelSpec("me/reward", "--reward_model_name_or_path", engine, args.attn_implementation)
    (part,) = built.reward.parts
    model = recorded("load_scorer", spec, "of the reward")
    assert part.scorer == recorded("Reward", recorded("FrozenEngine", model, engine))
    learner = (recorded("load_scorer", critic, "of the critic"), critic.engine, settings.critic_optimizer(args, 50))
    assert built.critic == recorded("TrainedReward", recorded("TrainedEngine", *learner), None)


@pytest.mark.parametrize(
    ("stage", "line", "task"),
    [
        (1, "--lora_dim 4", "Supervised"),
        (2, "--label_smoothing 0.1 --center_rewards_coefficient 0.2", "Ranking"),
        (2, "--ranked_loss plackett-luce", "Ranking"),
        (2, "--use_margin", "Ranking"),
        (2, "--loss hydra --ranking_weight 0.3 --center_rewards_coefficient 0.2 --use_margin", "Hydra"),
        (2, "--loss dpo --dpo_beta 0.3 --label_smoothing 0.1 --reference_zero_stage 3", "DirectPreference"),
        (2, "--loss r-dpo --length_alpha 0.4", "DirectPreference"),
    ],
)
def test_every_task_gets_its_own_settings(monkeypatch, stage, line, task):
    record(monkeypatch, finetune, "load_policy_model", "trained_policy", "trained_reward", "FrozenEngine", "Reference")
    record(monkeypatch, finetune, "Supervised", "Ranking", "Hydra", "DirectPreference", "trained_hydra")
    args = parse(stage, f"--max_seq_len 99 {line}")
    learned = (settings.finetune_model(args), settings.finetune_optimizer(args, 50), "tokenizer", 99)
    policy = recorded("trained_policy", *learned)
    expected = recorded("Supervised", policy, "held out")
    if task in ("Ranking", "Hydra"):
        terms = {"use_margin": args.use_margin, "label_smoothing": args.label_smoothing}
        terms["centring"] = args.center_rewards_coefficient
        if task == "Ranking":
            terms["ranked_loss"] = args.ranked_loss
            expected = recorded("Ranking", recorded("trained_reward", *learned), "held out", **terms)
        else:
            expected = recorded("Hydra", recorded("trained_hydra", *learned), "held out", 0.3, **terms)
    elif task == "DirectPreference":
        spec = settings.finetune_reference(args)
        model = recorded("load_policy_model", spec, "tokenizer")
        reference = recorded("Reference", recorded("FrozenEngine", model, spec.engine))
        alpha = 0.4 if "r-dpo" in line else 0.0
        settled = (args.dpo_beta, alpha, args.label_smoothing)
        expected = recorded("DirectPreference", policy, reference, "held out", *settled)
    assert finetune.build_task(args, "tokenizer", "held out", 50) == expected


# ----------------------------------------------------------------------------------------------------------- every flag


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_has_a_group_a_help_text_and_a_reader(stage):
    arguments = STAGES[stage][0]
    flags = flags_of(arguments)
    followed = {line.split()[0].removeprefix("--") for line, _ in CASES[stage]}
    config = {"config"}  # read_flags reads it; see test_config_file.py
    retired = {name for name in flags if name in WHY_RETIRED}
    assert set(flags) == followed | read_in(stage) | retired | config
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


@pytest.mark.parametrize("name", ["gamma", "samples_per_prompt", "clip_on", "loss_aggregation", "advantage_scaling"])
def test_the_help_states_the_default_of_every_algorithm(name):
    # "...; default: 4 (rloo, grpo), 1 (others)": the value before a bracket is the default of those inside
    words = flags_of(Step3Arguments)[name].help.split("default")[-1]
    for algo, kind in ALGORITHMS.items():
        if not hasattr(kind(), name):
            continue
        stated = [part.rsplit("(", 1) for part in words.replace(":", "").split(")") if "(" in part]
        named = [value for value, names in stated if algo in names] or [v for v, names in stated if "others" in names]
        default = getattr(kind(), name)
        assert named[0].strip(", ") == (f"{default:g}" if isinstance(default, int | float) else default)
