"""From parsed flags to the small typed settings of engines, rollout and trainer: which flag becomes which field."""

from __future__ import annotations

from dataclasses import dataclass, replace

from remax.cli.flags import FinetuneArguments, Step2Arguments, Step3Arguments
from remax.core.sampling import Sampling
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.optimizer import OptimizerConfig
from remax.generation.decode import GenerationSettings
from remax.training.loop import Cadence
from remax.training.trainer import TrainerSettings

Arguments = FinetuneArguments | Step3Arguments


@dataclass(frozen=True)
class LoraSpec:
    """Adapters to add, see `add_lora`; `flag` is the one that errors name."""

    dim: int
    module_name: str
    only: bool
    flag: str


@dataclass(frozen=True)
class ModelSpec:
    """A model to load: where it is, how it is spread over the ranks, and what is done to it.

    Attributes:
        name: Folder or hub name.
        flag: The flag that errors name.
        engine: How it is spread.
        attn_implementation: The attention of transformers that it uses; None: its default.
        disable_dropout: Sets every dropout rate to 0.
        gradient_checkpointing: Computes activations again in the backward pass.
        packing: See `remax.models.packing`.
        lora: Adapters to add.
    """

    name: str
    flag: str
    engine: EngineConfig
    attn_implementation: str | None = None
    disable_dropout: bool = True
    gradient_checkpointing: bool = False
    packing: bool = False
    lora: LoraSpec | None = None


def _optimizer(args: Arguments, steps: int, **rates: float) -> OptimizerConfig:
    return OptimizerConfig(
        total_steps=steps,
        warmup_steps=args.num_warmup_steps,
        schedule=args.lr_scheduler_type,
        betas=(args.adam_beta1, args.adam_beta2),
        **rates,
    )


def finetune_engine(args: FinetuneArguments) -> EngineConfig:
    """How steps 1 and 2 spread the model that they train."""
    return EngineConfig(
        zero_stage=args.zero_stage,
        offload=args.offload,
        offload_parameters=args.offload_parameters,
        dtype=args.dtype,
        micro_batch_size=args.per_device_train_batch_size,
        gradient_clipping=args.gradient_clipping,
    )


def finetune_model(args: FinetuneArguments) -> ModelSpec:
    """The model that steps 1 and 2 train."""
    lora = LoraSpec(args.lora_dim, args.lora_module_name, args.only_optimize_lora, "--lora_module_name")
    return ModelSpec(
        args.model_name_or_path,
        "--model_name_or_path",
        finetune_engine(args),
        args.attn_implementation,
        disable_dropout=args.disable_dropout,
        gradient_checkpointing=args.gradient_checkpointing,
        packing=args.packing,
        lora=lora if args.lora_dim else None,
    )


def finetune_reference(args: Step2Arguments) -> ModelSpec:
    """The frozen start that step 2 compares with (--loss dpo)."""
    name, flag = args.model_name_or_path, "--model_name_or_path"
    return ModelSpec(name, flag, reference_engine(args), args.attn_implementation, packing=args.packing)


def finetune_optimizer(args: FinetuneArguments, steps: int) -> OptimizerConfig:
    """The optimizer of steps 1 and 2."""
    return _optimizer(
        args,
        steps,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        lora_learning_rate=args.lora_learning_rate,
    )


def finetune_cadence(args: FinetuneArguments) -> Cadence:
    """The loop of steps 1 and 2."""
    return Cadence(
        epochs=args.num_train_epochs,
        batches_per_step=args.gradient_accumulation_steps,
        max_steps=args.max_steps,
        evaluate_every=args.eval_steps,
    )


def actor_engine(args: Step3Arguments) -> EngineConfig:
    """How the policy is spread."""
    return EngineConfig(
        zero_stage=args.actor_zero_stage,
        offload=args.offload,
        offload_parameters=args.offload_parameters,
        dtype=args.actor_dtype,
        micro_batch_size=args.per_device_training_batch_size,
        gradient_clipping=args.gradient_clipping,
    )


def critic_engine(args: Step3Arguments) -> EngineConfig:
    """The actor's, apart from what the critic has flags for. Only where the algorithm has one."""
    assert args.critic_zero_stage is not None and args.critic_dtype is not None
    return replace(
        actor_engine(args),
        zero_stage=args.critic_zero_stage,
        offload=args.offload_critic,
        offload_parameters=False,
        dtype=args.critic_dtype,
    )


def reference_engine(args: Step2Arguments | Step3Arguments) -> EngineConfig:
    """How the frozen policy is spread."""
    dtype = args.actor_dtype if isinstance(args, Step3Arguments) else args.dtype
    return EngineConfig(args.reference_zero_stage, offload_parameters=args.offload_reference_model, dtype=dtype)


def reward_engine(args: Step3Arguments) -> EngineConfig:
    """How each reward model is spread."""
    return EngineConfig(args.reward_zero_stage, offload_parameters=args.offload_reward_model, dtype=args.reward_dtype)


def actor_model(args: Step3Arguments) -> ModelSpec:
    """The policy that learns."""
    flag = "--actor_lora_module_name"
    lora = LoraSpec(args.actor_lora_dim, args.actor_lora_module_name, args.only_optimize_lora, flag)
    return ModelSpec(
        args.actor_model_name_or_path,
        "--actor_model_name_or_path",
        actor_engine(args),
        args.attn_implementation,
        disable_dropout=args.disable_actor_dropout,
        gradient_checkpointing=args.actor_gradient_checkpointing,
        lora=lora if args.actor_lora_dim else None,
    )


def reference_model(args: Step3Arguments) -> ModelSpec:
    """The policy's frozen start."""
    name, flag = args.actor_model_name_or_path, "--actor_model_name_or_path"
    return ModelSpec(name, flag, reference_engine(args), args.attn_implementation)


def critic_model(args: Step3Arguments, first_reward_model: str) -> ModelSpec:
    """Where the critic starts: its own model, or else the first reward model."""
    own = args.critic_model_name_or_path
    return ModelSpec(
        own or first_reward_model,
        "--critic_model_name_or_path" if own else "--reward_model_name_or_path",
        critic_engine(args),
        args.attn_implementation,
        disable_dropout=args.disable_reward_dropout,
        gradient_checkpointing=args.critic_gradient_checkpointing,
    )


def actor_optimizer(args: Step3Arguments, steps: int) -> OptimizerConfig:
    """The policy's optimizer."""
    return _optimizer(
        args,
        steps,
        learning_rate=args.actor_learning_rate,
        weight_decay=args.actor_weight_decay,
        lora_learning_rate=args.actor_lora_learning_rate,
    )


def critic_optimizer(args: Step3Arguments, steps: int) -> OptimizerConfig:
    """The critic's optimizer."""
    return _optimizer(args, steps, learning_rate=args.critic_learning_rate, weight_decay=args.critic_weight_decay)


def sampling(args: Step3Arguments) -> Sampling:
    """The distribution that answers are drawn from."""
    return Sampling(args.temperature, args.top_p, args.top_k)


def evaluated_distribution(args: Step3Arguments) -> Sampling:
    """The distribution whose log-probs the update differentiates."""
    return sampling(args) if args.logprobs_of == "sampling" else Sampling()


def generation(args: Step3Arguments, pad_id: int) -> GenerationSettings:
    """How the policy answers."""
    return GenerationSettings(
        max_new_tokens=args.max_answer_seq_len,
        pad_id=pad_id,
        sampling=sampling(args),
        max_greedy_tokens=args.max_greedy_seq_len,
        two_pass=args.two_pass_rollout,
    )


def trainer_settings(args: Step3Arguments) -> TrainerSettings:
    """How the trainer cuts its work."""
    return TrainerSettings(
        Cadence(
            epochs=args.num_train_epochs,
            batches_per_step=args.rollout_batches,
            max_steps=args.stop_step,
            evaluate_every=args.eval_steps,
        ),
        micro_batch_size=args.per_device_training_batch_size,
        mini_batches=args.ppo_mini_batches,
        target_kl=args.target_kl,
        best_by=args.best_by,
        unsupervised_coefficient=args.unsup_coef,
    )
