"""From the flags of step 3 to its live engines: which models go together, and how each of them is loaded."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedTokenizerBase

from remax.arguments import Step3Arguments
from remax.deepspeed_config import EngineConfig
from remax.engines import Actor, Reference, Reward, TrainedReward, loading
from remax.modeling import add_lora, check_length, load_config, load_policy
from remax.reward_model import load_reward_model
from remax.settings import (
    actor_engine,
    actor_optimizer,
    critic_engine,
    critic_optimizer,
    evaluated_distribution,
    generation,
    reference_engine,
    reward_engine,
)
from utils.run import UserError
from utils.tokenizer import load_tokenizer, same_vocabulary

Tokenizer = PreTrainedTokenizerBase


def check_models(args: Step3Arguments) -> tuple[Tokenizer, Tokenizer]:
    """Reads configurations and tokenizers before any weights, and refuses models that do not go together.

    Returns the actor's tokenizer and the reward model's.
    """
    longest = args.max_prompt_seq_len + args.max_answer_seq_len
    for flag in ("actor_model_name_or_path", "reward_model_name_or_path"):
        config = load_config(getattr(args, flag), f"--{flag}")
        check_length(config, longest, "--max_prompt_seq_len + --max_answer_seq_len", f"--{flag}")
    tokenizer = load_tokenizer(args.actor_model_name_or_path, "--actor_model_name_or_path")
    reward_tokenizer = load_tokenizer(args.reward_model_name_or_path, "--reward_model_name_or_path")
    if difference := same_vocabulary(tokenizer, reward_tokenizer):
        raise UserError(
            f"--reward_model_name_or_path {args.reward_model_name_or_path}: its vocabulary differs from that of "
            f"--actor_model_name_or_path {args.actor_model_name_or_path} ({difference}); the reward model reads the "
            "actor's tokens, so both need one tokenizer"
        )
    return tokenizer, reward_tokenizer


def build_engines(
    args: Step3Arguments, tokenizer: Tokenizer, reward_tokenizer: Tokenizer, steps: int
) -> tuple[Actor, Reference, Reward, TrainedReward | None]:
    """Actor, reference, reward, and for PPO a critic; each is loaded by its own ZeRO stage. steps: of the optimizer."""

    def load(load_model: Callable, config: EngineConfig, name: str, flag: str, tokenizer: Tokenizer, **options):
        attention = args.attn_implementation
        with loading(config):
            return load_model(
                name, flag, dtype=config.torch_dtype, tokenizer=tokenizer, attn_implementation=attention, **options
            )

    def policy(config: EngineConfig, **options) -> nn.Module:
        return load(
            load_policy, config, args.actor_model_name_or_path, "--actor_model_name_or_path", tokenizer, **options
        )

    def scorer(config: EngineConfig, name: str, flag: str, **options) -> nn.Module:
        return load(load_reward_model, config, name, flag, reward_tokenizer, **options)

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
    config, name, flag = reward_engine(args), args.reward_model_name_or_path, "--reward_model_name_or_path"
    reward = Reward(scorer(config, name, flag), config)
    if args.algo != "ppo":
        return actor, reference, reward, None
    critic = scorer(
        critic_engine(args),
        args.critic_model_name_or_path or name,
        "--critic_model_name_or_path" if args.critic_model_name_or_path else flag,
        disable_dropout=args.disable_reward_dropout,
        gradient_checkpointing=args.critic_gradient_checkpointing,
    )
    return actor, reference, reward, TrainedReward(critic, critic_engine(args), critic_optimizer(args, steps))
