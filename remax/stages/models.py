"""From typed settings to loaded models in their roles, and which models go together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from remax.algorithms import ALGORITHMS
from remax.checks.packing import check_packing, start_packing
from remax.cli.evaluation import DoctorArguments
from remax.cli.flags import Step3Arguments
from remax.engines.base import FrozenEngine, TrainedEngine
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.optimizer import OptimizerConfig
from remax.engines.policy import Actor, Judge, Reference, TrainedHydra
from remax.engines.roles import Role
from remax.engines.scorer import Reward, TrainedReward
from remax.engines.zero import copied_head, loading
from remax.generation.rollout import decoder_for_one_model
from remax.models.hydra import HydraModel, check_hydra_config, load_hydra
from remax.models.loading import check_length, load_config
from remax.models.lora import add_lora
from remax.models.policy import PolicyModel, check_policy_config, load_policy
from remax.models.reward_model import RewardModel, check_reward_config, load_reward_model, score_statistics
from remax.models.saved_adapters import add_saved
from remax.models.trunk import (
    ACTOR,
    CRITIC,
    JOINT_CRITIC,
    REFERENCE,
    REWARD,
    Trunk,
)
from remax.rewards.composite import CompositeReward, FunctionReward, Part
from remax.rewards.process import load_function
from remax.rewards.sources import reward_sources
from remax.stages.settings import (
    ModelSpec,
    actor_model,
    actor_optimizer,
    critic_adapters,
    critic_model,
    critic_optimizer,
    evaluated_distribution,
    generation,
    reference_model,
    reward_engine,
)
from utils.distributed import print0
from utils.run import UserError
from utils.tokenizer import load_tokenizer, same_vocabulary

Tokenizer = PreTrainedTokenizerBase


def load_policy_model(spec: ModelSpec, tokenizer: Tokenizer) -> PolicyModel:
    """A causal language model, partitioned as its engine wants it, with its adapters."""
    with loading(spec.engine):
        model = load_policy(spec.name, spec.flag, tokenizer=tokenizer, merged=not spec.keeps_adapters, **spec.options)
    add_adapters(model.hf, spec)
    return model


def add_adapters(hf: PreTrainedModel, spec: ModelSpec) -> None:
    """New adapters, or those of the PEFT folder that the model comes from, where any are to learn."""
    if spec.lora is not None and spec.keeps_adapters:
        add_saved(hf, spec.name, spec.flag, spec.lora.dropout)
    elif spec.lora is not None:
        add_lora(hf, *astuple(spec.lora))


def load_scorer(spec: ModelSpec, tokenizer: Tokenizer, *, new_head: bool = False) -> RewardModel:
    """A reward model, in the same way. See `load_reward_model` for `new_head`."""
    options = spec.options | {"new_head": new_head, "merged": not spec.keeps_adapters}
    with loading(spec.engine):
        model = load_reward_model(spec.name, spec.flag, tokenizer=tokenizer, **options)
    add_adapters(model.hf, spec)
    return model


def load_hydra_model(spec: ModelSpec, tokenizer: Tokenizer, *, new_head: bool = False) -> HydraModel:
    """Both in one, in the same way. See `load_hydra` for `new_head`."""
    options = spec.options | {"new_head": new_head, "merged": not spec.keeps_adapters}
    with loading(spec.engine):
        model = load_hydra(spec.name, spec.flag, tokenizer=tokenizer, **options)
    add_adapters(model.hf, spec)
    return model


def trained_policy(spec: ModelSpec, optimizer: OptimizerConfig, tokenizer: Tokenizer, max_len: int) -> Actor:
    """A policy that learns given answers, of rows of at most `max_len` tokens."""
    engine = TrainedEngine(load_policy_model(spec, tokenizer), spec.engine, optimizer)
    actor = Actor(engine)
    if spec.packing:
        check_packing(actor, max_len, hidden_only=True)
    return actor


def trained_reward(spec: ModelSpec, optimizer: OptimizerConfig, tokenizer: Tokenizer, max_len: int) -> TrainedReward:
    """A reward model that learns; its head may be new."""
    engine = TrainedEngine(load_scorer(spec, tokenizer, new_head=True), spec.engine, optimizer)
    reward = TrainedReward(engine)
    if spec.packing:
        check_packing(reward, max_len, every_token=True)
    return reward


def trained_hydra(spec: ModelSpec, optimizer: OptimizerConfig, tokenizer: Tokenizer, max_len: int) -> TrainedHydra:
    """A policy and reward model in one that learns; its score head may be new."""
    engine = TrainedEngine(load_hydra_model(spec, tokenizer, new_head=True), spec.engine, optimizer)
    both = TrainedHydra(engine)
    if spec.packing:
        check_packing(both, max_len, hidden_only=True)
    return both


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of step 3: the actor's and reference's, each reward model's in the order of their flag, PPO's.

    None is PPO's where its critic shares the actor's trunk.
    """

    actor: Tokenizer
    rewards: list[Tokenizer]
    critic: Tokenizer | None


@dataclass(frozen=True)
class Models:
    """The roles of step 3; the critic is PPO's, the judge there where one trunk is reference and reward."""

    actor: Actor
    reference: Reference
    reward: CompositeReward
    critic: TrainedReward | None = None
    judge: Judge | None = None


def check_models(args: Step3Arguments) -> Tokenizers:
    """Reads configurations and tokenizers before any weights, and refuses models that do not go together."""
    models, _ = reward_sources(args.reward_models, args.reward_fn)
    config = _check_length(args, args.actor_model_name_or_path, "--actor_model_name_or_path")
    check_policy_config(config, args.actor_model_name_or_path, "--actor_model_name_or_path")
    tokenizer = load_tokenizer(
        args.actor_model_name_or_path, "--actor_model_name_or_path", chat_template=args.chat_template
    )
    if args.share == "all":
        check_hydra_config(config, args.actor_model_name_or_path, "--share all: --actor_model_name_or_path")
        if args.normalize_reward:
            score_statistics(config, args.actor_model_name_or_path, "--actor_model_name_or_path")
        return Tokenizers(tokenizer, [tokenizer], None)
    rewards = [_check_scorer(args, model.name, "--reward_model_name_or_path", tokenizer) for model in models]
    critic = None
    if ALGORITHMS[args.algo].critic:
        name, flag = args.critic_model_name_or_path, "--critic_model_name_or_path"
        critic = _check_scorer(args, name, flag, tokenizer) if name else rewards[0]
    return Tokenizers(tokenizer, rewards, critic)


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


def reward_functions(
    args: Step3Arguments | DoctorArguments, tokenizer: Tokenizer, eos_ids: Sequence[int] | None = None
) -> list[FunctionReward]:
    """The functions of --reward_fn; the tokenizer is the actor's, and so are the end tokens."""
    _, functions = reward_sources(args.reward_models, args.reward_fn)
    timeout = args.reward_fn_timeout
    return [FunctionReward(load_function(source.name), tokenizer, timeout, eos_ids) for source in functions]


def build_reward(
    args: Step3Arguments | DoctorArguments,
    engine: EngineConfig,
    tokenizer: Tokenizer,
    own: Sequence[Tokenizer],
    eos_ids: Sequence[int] | None = None,
    shared: Reward | None = None,
) -> CompositeReward:
    """All parts of the reward.

    Args:
        tokenizer: The actor's, and so are `eos_ids`.
        own: The tokenizers of the reward models.
        shared: The first model, where it is loaded already for another role.
    """
    models, functions = reward_sources(args.reward_models, args.reward_fn)
    flag, parts = "--reward_model_name_or_path", []
    for source, of_model in zip(models, own, strict=True):
        mean, std = 0.0, 1.0
        if args.normalize_reward:
            mean, std = score_statistics(load_config(source.name, flag), source.name, flag)
        scorer, shared = shared, None
        if scorer is None:
            model = load_scorer(ModelSpec(source.name, flag, engine, args.attn_implementation), of_model)
            scorer = Reward(FrozenEngine(model, engine))
        parts.append(Part(source.label, scorer, source.weight, mean, std, of_model))
    for source, function in zip(functions, reward_functions(args, tokenizer, eos_ids), strict=True):
        parts.append(Part(source.label, function, source.weight))
    return CompositeReward(parts)


def load_trunk(args: Step3Arguments, spec: ModelSpec, tokenizer: Tokenizer) -> Trunk:
    """The actor's model, which is the reference too, and with --share all the reward model and the critic."""
    if args.share == "reference":
        return Trunk(load_policy_model(spec, tokenizer), gradient_checkpointing=spec.gradient_checkpointing)
    model, critic = load_hydra_model(spec, tokenizer), ALGORITHMS[args.algo].critic
    if critic and not args.joint_critic:
        add_lora(model.hf, *astuple(critic_adapters(args)))
    value = copied_head(model.score_head, spec.engine) if critic else None
    return Trunk(model, value=value, gradient_checkpointing=spec.gradient_checkpointing)


def load_critic(args: Step3Arguments, spec: ModelSpec, tokenizer: Tokenizer) -> RewardModel | Trunk:
    """The critic's model, which is the reward model too where they share their weights."""
    model = load_scorer(spec, tokenizer)
    if not args.critic_is_reward:
        return model
    value = copied_head(model.head, spec.engine)
    return Trunk(model, value=value, gradient_checkpointing=spec.gradient_checkpointing)


def build_models(args: Step3Arguments, tokenizers: Tokenizers, steps: int) -> Models:
    """Actor, reference, reward, and for PPO a critic, each by its own ZeRO stage, and packing where --packing says so.

    Args:
        steps: The optimizer's.
    """
    models = build_roles(args, tokenizers, steps)
    pack_rows(args, models)
    return models


def build_roles(args: Step3Arguments, tokenizers: Tokenizers, steps: int) -> Models:
    """All of `build_models` but packing. With --share several roles hold one engine."""
    tokenizer, spec, shared = tokenizers.actor, actor_model(args), args.share != "none"
    distribution, chunk_size = evaluated_distribution(args), args.logprob_chunk_size
    model = load_trunk(args, spec, tokenizer) if shared else load_policy_model(spec, tokenizer)
    engine = TrainedEngine(model, spec.engine, actor_optimizer(args, steps))
    actor = Actor(
        engine,
        generation=generation(args, tokenizer.pad_token_id),
        sampling=distribution,
        chunk_size=chunk_size,
        gather_for_generation=args.zero3_generation == "gather",
        decoder=decoder_for_one_model(graphs=bool(args.cuda_graphs)),
        use=ACTOR if shared else None,
    )
    if shared:
        reference = Reference(engine, sampling=distribution, chunk_size=chunk_size, use=REFERENCE)
    else:
        spec = reference_model(args)
        frozen = FrozenEngine(load_policy_model(spec, tokenizer), spec.engine)
        reference = Reference(frozen, sampling=distribution, chunk_size=chunk_size)
    eos_ids = actor.model.hf.generation_config.eos_token_id if args.reward_fn else None
    if args.share == "all":
        reward = build_reward(args, spec.engine, tokenizer, tokenizers.rewards, eos_ids, Reward(engine, use=REWARD))
        use = JOINT_CRITIC if args.joint_critic else CRITIC
        critic = TrainedReward(engine, use) if ALGORITHMS[args.algo].critic else None
        return Models(actor, reference, reward, critic, Judge(reference))
    critic = first = None
    if tokenizers.critic is not None and args.critic_is_reward:
        critic = build_critic(args, tokenizers.critic, steps)
        first = Reward(critic.engine, REWARD)
    reward = build_reward(args, reward_engine(args), tokenizer, tokenizers.rewards, eos_ids, first)
    if tokenizers.critic is not None and critic is None:
        critic = build_critic(args, tokenizers.critic, steps)
    return Models(actor, reference, reward, critic)


def pack_rows(args: Step3Arguments, models: Models) -> None:
    """Has every model read its rows packed, as --packing says; where some cannot, or gain nothing, says so once.

    Raises:
        UserError: --packing was given, and a model cannot.
    """
    longest = args.max_prompt_seq_len + args.max_answer_seq_len
    padded = defaultdict[str, list[str]](list)  # models by the reason why they do not
    roles: list[tuple[str, Role, str]] = [("actor", models.actor, "hidden_only")]
    roles += [("reference", models.reference, "hidden_only")]
    roles += [("reward", part.model, "every_token") for part in models.reward.models]
    roles += [("critic", models.critic, "every_token")] if models.critic is not None else []
    engines: set[int] = set()  # several roles may hold one
    for name, role, read in roles:
        if id(role.engine) not in engines:
            engines.add(id(role.engine))
            if reason := start_packing(role, longest, args.packing, **{read: True}):
                padded[reason].append(name)
    for reason, names in padded.items():
        print0(f"{', '.join(dict.fromkeys(names))}: rows are padded, since {reason}")


def build_critic(args: Step3Arguments, tokenizer: Tokenizer, steps: int) -> TrainedReward:
    """PPO's critic, from its own model or the first reward model."""
    models, _ = reward_sources(args.reward_models, args.reward_fn)
    spec = critic_model(args, models[0].name if models else "")
    engine = TrainedEngine(load_critic(args, spec, tokenizer), spec.engine, critic_optimizer(args, steps))
    return TrainedReward(engine, CRITIC if args.critic_is_reward else None)
