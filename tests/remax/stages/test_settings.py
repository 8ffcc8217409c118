"""Every setting of a stage comes from its own flag: all flags have distinct values, and these are found again."""

from __future__ import annotations

import shlex

import pytest
import torch

from remax.cli.validate import parse_step1, parse_step2, parse_step3
from remax.core.sampling import Sampling
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.optimizer import OptimizerConfig
from remax.generation.decoder import GenerationSettings
from remax.stages import settings
from remax.stages.settings import LoraSpec, ModelSpec
from remax.training.loop import Cadence
from remax.training.trainer import TrainerSettings

OPTIMIZER = "--lr_scheduler_type linear --num_warmup_steps 3 --adam_beta1 0.5 --adam_beta2 0.6"
SHARED = f"{OPTIMIZER} --attn_implementation eager --gradient_clipping 0.7 --num_train_epochs 4 --max_steps 90"
SHARED += " --eval_steps 8 --gradient_accumulation_steps 2"
FINETUNE = (
    f"--model_name_or_path me/model {SHARED} --zero_stage 3 --offload_parameters --dtype bf16 --learning_rate 0.1"
    " --per_device_train_batch_size 5 --weight_decay 0.2 --lora_learning_rate 0.3 --lora_dim 6 --lora_module_name q"
)
RLHF = (
    f"--actor_model_name_or_path me/actor --reward_model_name_or_path me/one me/two --algo ppo {SHARED}"
    " --actor_zero_stage 3 --offload_parameters --actor_dtype bf16 --per_device_training_batch_size 4"
    " --actor_learning_rate 0.1 --actor_weight_decay 0.2 --actor_lora_learning_rate 0.3 --actor_lora_dim 6"
    " --actor_lora_module_name q --critic_learning_rate 0.4 --critic_weight_decay 0.05 --critic_zero_stage 2"
    " --critic_dtype fp32 --offload_critic --reference_zero_stage 3 --offload_reward_model --reward_dtype fp32"
    " --generation_batches 3 --per_device_generation_batch_size 8 --ppo_mini_batches 6 --target_kl 0.9"
    " --best_by objective --unsup_coef 13 --temperature 0.8 --top_p 0.95 --top_k 40 --max_answer_seq_len 99"
)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def optimizer(rate: float, decay: float, lora: float | None) -> OptimizerConfig:
    return OptimizerConfig(rate, 77, 3, "linear", decay, (0.5, 0.6), lora)


@pytest.mark.parametrize(("flag", "dropout"), [("", False), ("--disable_dropout", True)])
def test_steps_1_and_2(flag, dropout):
    args = parse_step1(shlex.split(f"{FINETUNE} --packing --gradient_checkpointing {flag}".replace("eager", "sdpa")))
    engine = EngineConfig(3, False, True, "bf16", 5, 0.7)
    lora = LoraSpec(6, "q", False, "--lora_module_name")
    name, of = "--model_name_or_path", "me/model"
    assert settings.finetune_model(args) == ModelSpec(of, name, engine, "sdpa", dropout, True, True, lora)
    assert settings.finetune_optimizer(args, 77) == optimizer(0.1, 0.2, 0.3)
    assert settings.finetune_cadence(args) == Cadence(4, 2, 90, 8)
    only = parse_step1(shlex.split(f"{FINETUNE} --only_optimize_lora"))
    assert settings.finetune_model(only).lora == LoraSpec(6, "q", True, "--lora_module_name")
    dpo = parse_step2(shlex.split(f"{FINETUNE} --loss dpo --offload_reference_model"))
    frozen = EngineConfig(3, offload_parameters=True, dtype="bf16")
    assert settings.finetune_reference(dpo) == ModelSpec(of, name, frozen, "eager")


def test_the_models_of_step_3():
    args = parse_step3(shlex.split(RLHF))
    actor = EngineConfig(3, False, True, "bf16", 4, 0.7)
    critic = EngineConfig(2, True, False, "fp32", 4, 0.7)
    lora = LoraSpec(6, "q", False, "--actor_lora_module_name")
    flag, reward = "--actor_model_name_or_path", "--reward_model_name_or_path"
    assert settings.actor_model(args) == ModelSpec("me/actor", flag, actor, "eager", False, False, False, lora)
    assert settings.reference_model(args) == ModelSpec("me/actor", flag, EngineConfig(3, dtype="bf16"), "eager")
    assert settings.reward_engine(args) == EngineConfig(3, offload_parameters=True, dtype="fp32")
    assert settings.critic_model(args, "me/one") == ModelSpec("me/one", reward, critic, "eager", False)
    assert settings.actor_optimizer(args, 77) == optimizer(0.1, 0.2, 0.3)
    assert settings.critic_optimizer(args, 77) == optimizer(0.4, 0.05, None)


@pytest.mark.parametrize(
    ("flag", "changed"),
    [
        ("--disable_actor_dropout", {("actor", "disable_dropout"): True}),
        ("--disable_reward_dropout", {("critic", "disable_dropout"): True}),
        ("--actor_gradient_checkpointing", {("actor", "gradient_checkpointing"): True}),
        ("--critic_gradient_checkpointing", {("critic", "gradient_checkpointing"): True}),
        ("--only_optimize_lora", {("actor", "lora"): LoraSpec(6, "q", True, "--actor_lora_module_name")}),
        (
            "--critic_model_name_or_path me/c",
            {("critic", "name"): "me/c", ("critic", "flag"): "--critic_model_name_or_path"},
        ),
    ],
)
def test_a_flag_of_one_model_leaves_the_others_alone(flag, changed):
    def made(line: str) -> dict:
        args = parse_step3(shlex.split(line))
        models = {"actor": settings.actor_model(args), "reference": settings.reference_model(args)}
        models["critic"] = settings.critic_model(args, "me/one")
        return {(model, name): value for model, spec in models.items() for name, value in vars(spec).items()}

    before, after = made(RLHF), made(f"{RLHF} {flag}")
    assert {key: value for key, value in after.items() if before[key] != value} == changed


def test_generation_and_training_of_step_3():
    args = parse_step3(shlex.split(RLHF))
    drawn = Sampling(0.8, 0.95, 40)
    assert settings.generation(args, 7) == GenerationSettings(99, 7, drawn, 0)
    assert settings.evaluated_distribution(args) == drawn
    assert settings.trainer_settings(args) == TrainerSettings(Cadence(4, 6, 90, 8), 4, 6, 0.9, "objective", 13.0)
    model = parse_step3(shlex.split(f"{RLHF} --logprobs_of model --enable_test_mode --test_stop_step 9"))
    assert settings.evaluated_distribution(model) == Sampling()
    assert settings.trainer_settings(model).cadence.max_steps == 9
    remax = RLHF.partition(" --critic_learning_rate")[0].replace("--algo ppo", "--algo remax")
    fast = settings.generation(parse_step3(shlex.split(f"{remax} --max_greedy_seq_len 9")), 7)
    assert fast.max_greedy_tokens == 9
