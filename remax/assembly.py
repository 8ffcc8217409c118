"""From flags to live engines: how each model is loaded, what it learns, and which models go together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from remax.deepspeed_config import EngineConfig
from remax.engines import Actor, Reference, Reward, TrainedReward, check_packing, loading
from remax.examination import examine
from remax.findings import Report
from remax.finetune import DirectPreference, Ranking, Supervised
from remax.flags import FinetuneArguments, Step1Arguments, Step2Arguments, Step3Arguments
from remax.modeling import PolicyModel, add_lora, check_length, load_config, load_policy
from remax.reward_checks import held_out_pairs
from remax.reward_functions import load_function
from remax.reward_model import RewardModel, check_reward_config, load_reward_model, score_statistics
from remax.reward_sources import reward_sources
from remax.rewards import CompositeReward, FunctionReward, Part, try_functions
from remax.sequences import Prompts
from remax.settings import (
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
from remax.stage_data import PromptData, data_config
from utils.data.batches import Batch, PromptBatch
from utils.run import UserError
from utils.tokenizer import load_tokenizer, same_vocabulary

if TYPE_CHECKING:
    from remax.doctor import DoctorArguments

Tokenizer = PreTrainedTokenizerBase


def build_supervised_task(
    args: Step1Arguments, tokenizer: Tokenizer, eval_loader: Iterable[Batch], steps: int
) -> Supervised:
    """Step 1: the model on its engine, with what it learns. steps: of the optimizer."""
    return Supervised(_trained_policy(args, tokenizer, steps), eval_loader)


def build_preference_task(
    args: Step2Arguments, tokenizer: Tokenizer, eval_loader: Iterable[Batch], steps: int
) -> Ranking | DirectPreference:
    """Step 2: a reward model, or with --loss dpo a policy and its reference."""
    if args.loss == "ranking":
        return Ranking(
            _trained_reward(args, tokenizer, steps),
            eval_loader,
            use_margin=args.use_margin,
            label_smoothing=args.label_smoothing,
            centring=args.center_rewards_coefficient,
            ranked_loss=args.ranked_loss,
        )
    config = reference_engine(args)
    reference = Reference(_load(load_policy, args, config, tokenizer), config)
    alpha = args.length_alpha if args.loss == "r-dpo" else 0.0
    return DirectPreference(_trained_policy(args, tokenizer, steps), reference, eval_loader, args.dpo_beta, alpha)


def _trained_policy(args: FinetuneArguments, tokenizer: Tokenizer, steps: int) -> Actor:
    config = finetune_engine(args)
    model = _load(load_policy, args, config, tokenizer, **_training_options(args))
    _add_adapters(model, args)
    actor = Actor(model, config, finetune_optimizer(args, steps))
    if args.packing:
        check_packing(actor, args.max_seq_len, hidden_only=True)
    return actor


def _trained_reward(args: Step2Arguments, tokenizer: Tokenizer, steps: int) -> TrainedReward:
    config = finetune_engine(args)
    model = _load(load_reward_model, args, config, tokenizer, new_head=True, **_training_options(args))
    _add_adapters(model, args)
    reward = TrainedReward(model, config, finetune_optimizer(args, steps))
    if args.packing:
        check_packing(reward, args.max_seq_len, every_token=True)
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
        parts.append(Part(source.label, Reward(model, config), source.weight, mean, std, its))
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
        model,
        actor_engine(args),
        actor_optimizer(args, steps),
        generation=generation(args, tokenizer.pad_token_id),
        sampling=distribution,
        chunk_size=chunk_size,
        gather_for_generation=args.zero3_generation == "gather",
    )
    config = reference_engine(args)
    reference = Reference(policy(config), config, sampling=distribution, chunk_size=chunk_size)
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
    return TrainedReward(model, config, critic_optimizer(args, steps))


def try_reward_functions(args: Step3Arguments, tokenizer: Tokenizer, held_out: Iterable[PromptBatch]) -> None:
    """Asks the functions of --reward_fn about two held-out prompts, before any weights are read."""
    functions = [part.scorer for part in reward_functions(args, tokenizer)]
    if functions:
        try_functions(functions, next(iter(held_out)).prompts[:2])


def examine_engines(
    args: Step3Arguments,
    actor: Actor,
    reward: CompositeReward,
    reference: Reference,
    tokenizer: Tokenizer,
    data: PromptData,
) -> Report:
    """The doctor's report on the models as they are about to be trained with."""
    prompts = next(iter(data.evaluation))
    pairs = None
    if reward.models:
        pairs = held_out_pairs(
            data_config(args),
            tokenizer,
            max_len=args.max_prompt_seq_len + args.max_answer_seq_len,
            announce=False,
            rows=data.held_out,
        )
    return examine(
        actor,
        reward,
        tokenizer,
        Prompts(prompts.input_ids, prompts.lengths),
        reference=reference,
        pairs=pairs,
        max_prompt_tokens=args.max_prompt_seq_len,
    )
