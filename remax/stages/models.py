"""From flags to loaded models on their engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from remax.checks.packing import check_packing
from remax.cli.evaluation import DoctorArguments
from remax.cli.flags import FinetuneArguments, Step2Arguments, Step3Arguments
from remax.engines.base import FrozenEngine, TrainedEngine
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.policy import Actor, Reference
from remax.engines.scorer import Reward, TrainedReward
from remax.engines.zero import loading
from remax.models.loading import check_length, load_config
from remax.models.lora import add_lora
from remax.models.policy import PolicyModel, load_policy
from remax.models.reward_model import RewardModel, check_reward_config, load_reward_model, score_statistics
from remax.rewards.composite import CompositeReward, FunctionReward, Part
from remax.rewards.functions import load_function
from remax.rewards.sources import reward_sources
from remax.stages.settings import (
    actor_engine,
    actor_optimizer,
    critic_engine,
    critic_optimizer,
    evaluated_distribution,
    finetune_engine,
    finetune_optimizer,
    generation,
    reference_engine,
    reward_engine,
)
from utils.run import UserError
from utils.tokenizer import load_tokenizer, same_vocabulary

Tokenizer = PreTrainedTokenizerBase


def _trained_policy(args: FinetuneArguments, tokenizer: Tokenizer, steps: int) -> Actor:
    config = finetune_engine(args)
    model = _load(load_policy, args, config, tokenizer, **_training_options(args))
    _add_adapters(model, args)
    actor = Actor(TrainedEngine(model, config, finetune_optimizer(args, steps)))
    if args.packing:
        check_packing(actor.engine, args.max_seq_len, hidden_only=True)
    return actor


def _trained_reward(args: Step2Arguments, tokenizer: Tokenizer, steps: int) -> TrainedReward:
    config = finetune_engine(args)
    model = _load(load_reward_model, args, config, tokenizer, new_head=True, **_training_options(args))
    _add_adapters(model, args)
    reward = TrainedReward(TrainedEngine(model, config, finetune_optimizer(args, steps)))
    if args.packing:
        check_packing(reward.engine, args.max_seq_len, every_token=True)
    return reward


def _load(load_model: Callable, args: FinetuneArguments, config: EngineConfig, tokenizer: Tokenizer, **options):
    name, flag = args.model_name_or_path, "--model_name_or_path"
    return _load_from(load_model, name, flag, args, config, tokenizer, packing=args.packing, **options)


def _load_from(
    load_model: Callable,
    name: str,
    flag: str,
    args: FinetuneArguments | Step3Arguments | DoctorArguments,
    config: EngineConfig,
    tokenizer: Tokenizer,
    **options,
):
    """The model `name` of `flag`, partitioned as its engine wants it."""
    attention = args.attn_implementation
    with loading(config):
        return load_model(
            name, flag, dtype=config.torch_dtype, tokenizer=tokenizer, attn_implementation=attention, **options
        )


def _training_options(args: FinetuneArguments) -> dict[str, bool]:
    return {"disable_dropout": args.disable_dropout, "gradient_checkpointing": args.gradient_checkpointing}


def _add_adapters(model: PolicyModel | RewardModel, args: FinetuneArguments) -> None:
    if args.lora_dim:
        add_lora(model.hf, args.lora_dim, args.lora_module_name, args.only_optimize_lora, "--lora_module_name")


@dataclass(frozen=True)
class Tokenizers:
    """actor: also the reference's.   rewards: of each reward model, in the order of their flag.   critic: PPO's."""

    actor: Tokenizer
    rewards: list[Tokenizer]
    critic: Tokenizer | None


def check_models(args: Step3Arguments) -> Tokenizers:
    """Reads configurations and tokenizers before any weights, and refuses models that do not go together."""
    models, _ = reward_sources(args.reward_model_name_or_path, args.reward_fn)
    tokenizer = load_tokenizer(
        args.actor_model_name_or_path, "--actor_model_name_or_path", chat_template=args.chat_template
    )
    _check_length(args, args.actor_model_name_or_path, "--actor_model_name_or_path")
    rewards = [_check_scorer(args, model.name, "--reward_model_name_or_path", tokenizer) for model in models]
    if args.algo != "ppo":
        return Tokenizers(tokenizer, rewards, None)
    name, flag = args.critic_model_name_or_path, "--critic_model_name_or_path"
    return Tokenizers(tokenizer, rewards, _check_scorer(args, name, flag, tokenizer) if name else rewards[0])


def _check_length(args: Step3Arguments, name: str, flag: str) -> PreTrainedConfig:
    """The configuration of a model that has room for the longest prompt with the longest answer."""
    config = load_config(name, flag)
    longest = args.max_prompt_seq_len + args.max_answer_seq_len
    check_length(config, longest, "--max_prompt_seq_len + --max_answer_seq_len", flag)
    return config


def _check_scorer(args: Step3Arguments, name: str, flag: str, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer of a reward model or critic that reads the actor's tokens."""
    config = _check_length(args, name, flag)
    check_reward_config(config, name, flag)
    what = "reward model" if flag == "--reward_model_name_or_path" else "critic"
    if args.normalize_reward and what == "reward model":
        score_statistics(config, name, flag)
    own = load_tokenizer(name, flag)
    if difference := same_vocabulary(tokenizer, own):
        raise UserError(
            f"{flag} {name}: its vocabulary differs from that of --actor_model_name_or_path "
            f"{args.actor_model_name_or_path} ({difference}); the {what} reads the actor's tokens, so both need one "
            "tokenizer"
        )
    if tokenizer.chat_template != own.chat_template:
        args.notices.append(
            f"actor and {what} {name} have different chat templates: lists of messages are written by the actor's, "
            f"which the {what} may not have been trained on"
        )
    return own


def reward_functions(args: Step3Arguments | DoctorArguments, tokenizer: Tokenizer) -> list[Part]:
    """The parts of the reward that are Python functions. tokenizer: the actor's."""
    _, functions = reward_sources(args.reward_model_name_or_path, args.reward_fn)
    return [
        Part(source.label, FunctionReward(load_function(source.name), tokenizer, args.reward_fn_timeout), source.weight)
        for source in functions
    ]


def build_reward(
    args: Step3Arguments | DoctorArguments, config: EngineConfig, tokenizer: Tokenizer, own: list[Tokenizer]
) -> CompositeReward:
    """All parts of the reward. own: the reward models' tokenizers."""
    models, _ = reward_sources(args.reward_model_name_or_path, args.reward_fn)
    flag, parts = "--reward_model_name_or_path", []
    statistics = [(0.0, 1.0)] * len(models)
    if args.normalize_reward:
        statistics = [score_statistics(load_config(model.name, flag), model.name, flag) for model in models]
    for source, (mean, std), its in zip(models, statistics, own, strict=True):
        model = _load_from(load_reward_model, source.name, flag, args, config, its)
        parts.append(Part(source.label, Reward(FrozenEngine(model, config)), source.weight, mean, std, its))
    return CompositeReward([*parts, *reward_functions(args, tokenizer)])


def build_engines(
    args: Step3Arguments, tokenizers: Tokenizers, steps: int
) -> tuple[Actor, Reference, CompositeReward, TrainedReward | None]:
    """Actor, reference, reward, and for PPO a critic; each is loaded by its own ZeRO stage. steps: of the optimizer."""
    tokenizer = tokenizers.actor

    def policy(config: EngineConfig, **options) -> PolicyModel:
        name, flag = args.actor_model_name_or_path, "--actor_model_name_or_path"
        return _load_from(load_policy, name, flag, args, config, tokenizer, **options)

    model = policy(
        actor_engine(args),
        disable_dropout=args.disable_actor_dropout,
        gradient_checkpointing=args.actor_gradient_checkpointing,
    )
    if args.actor_lora_dim:
        flag = "--actor_lora_module_name"
        add_lora(model.hf, args.actor_lora_dim, args.actor_lora_module_name, args.only_optimize_lora, flag)
    distribution, chunk_size = evaluated_distribution(args), args.logprob_chunk_size
    actor = Actor(
        TrainedEngine(model, actor_engine(args), actor_optimizer(args, steps)),
        generation=generation(args, tokenizer.pad_token_id),
        sampling=distribution,
        chunk_size=chunk_size,
        gather_for_generation=args.zero3_generation == "gather",
    )
    config = reference_engine(args)
    reference = Reference(FrozenEngine(policy(config), config), sampling=distribution, chunk_size=chunk_size)
    reward = build_reward(args, reward_engine(args), tokenizer, tokenizers.rewards)
    critic = _critic(args, tokenizers.critic, steps) if args.algo == "ppo" else None
    return actor, reference, reward, critic


def _critic(args: Step3Arguments, tokenizer: Tokenizer, steps: int) -> TrainedReward:
    config, name, flag = critic_engine(args), args.critic_model_name_or_path, "--critic_model_name_or_path"
    if not name:
        models, _ = reward_sources(args.reward_model_name_or_path, args.reward_fn)
        name, flag = models[0].name, "--reward_model_name_or_path"
    options = {
        "disable_dropout": args.disable_reward_dropout,
        "gradient_checkpointing": args.critic_gradient_checkpointing,
    }
    model = _load_from(load_reward_model, name, flag, args, config, tokenizer, **options)
    return TrainedReward(TrainedEngine(model, config, critic_optimizer(args, steps)))
