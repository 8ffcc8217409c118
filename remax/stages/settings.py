"""From parsed flags to the small typed settings of engines, rollout and trainer: which flag becomes which field."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from remax.cli.flags import FinetuneArguments, SamplingFlags, Step2Arguments, Step3Arguments
from remax.core.sampling import Sampling
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.optimizer import OptimizerConfig
from remax.generation.decoder import GenerationSettings
from remax.models.trunk import ACTOR_SET, CRITIC_SET
from remax.training.loop import Cadence
from remax.training.trainer import TrainerSettings
from utils.adapter_folder import is_adapter
from utils.present import present

Arguments = FinetuneArguments | Step3Arguments


@dataclass(frozen=True)
class LoraSpec:
    """Adapters to add, see `add_lora`; `flag` is the one that errors name.

    Those of a PEFT folder go on learning as they are: of these settings only the dropout is for them, and `dim` is 0.
    """

    dim: int
    module_name: str
    only: bool
    flag: str
    alpha: int | None = None
    dropout: float = 0.0
    adapter: str = "default"


@dataclass(frozen=True)
class ModelSpec:
    """A model to load: where it is, the flag that errors name, how it is spread over the ranks, what is done to it."""

    name: str
    flag: str
    engine: EngineConfig
    attn_implementation: str | None = None
    disable_dropout: bool = True
    gradient_checkpointing: bool = False
    packing: bool = False
    lora: LoraSpec | None = None

    @property
    def keeps_adapters(self) -> bool:
        """Whether the adapters of its PEFT folder go on learning: they are not merged."""
        return self.lora is not None and self.lora.dim == 0

    @property
    def options(self) -> dict[str, Any]:
        """What `load_policy` and `load_reward_model` have in common."""
        names = ("disable_dropout", "gradient_checkpointing", "attn_implementation", "packing")
        return {"dtype": self.engine.torch_dtype} | {name: getattr(self, name) for name in names}


def _trained_engine(args: Arguments, zero_stage: int, dtype: str, micro_batch_size: int) -> EngineConfig:
    offload, parameters = args.offload, args.offload_parameters
    return EngineConfig(zero_stage, offload, parameters, dtype, micro_batch_size, args.gradient_clipping)


def _optimizer(
    args: Arguments, steps: int, rate: float, weight_decay: float, lora_rate: float | None = None
) -> OptimizerConfig:
    return OptimizerConfig(
        rate,
        steps,
        warmup_steps=args.num_warmup_steps,
        schedule=args.lr_scheduler_type,
        weight_decay=weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        lora_learning_rate=lora_rate,
    )


def _cadence(args: Arguments, batches_per_step: int, max_steps: int) -> Cadence:
    return Cadence(args.epochs, batches_per_step, max_steps, args.eval_steps)


def finetune_model(args: FinetuneArguments) -> ModelSpec:
    saved = is_adapter(args.model_name_or_path)
    only, flag = args.only_optimize_lora or saved, "--lora_module_name"
    lora = LoraSpec(args.lora_dim, args.lora_module_name, only, flag, args.lora_alpha, args.lora_dropout)
    return ModelSpec(
        args.model_name_or_path,
        "--model_name_or_path",
        _trained_engine(args, args.zero_stage, args.dtype, args.per_device_train_batch_size),
        args.attn_implementation,
        disable_dropout=args.disable_dropout,
        gradient_checkpointing=args.gradient_checkpointing,
        packing=args.packing,
        lora=lora if args.lora_dim or saved else None,
    )


def finetune_reference(args: Step2Arguments) -> ModelSpec:
    """The frozen start that step 2 compares with (--loss dpo)."""
    name, flag = args.model_name_or_path, "--model_name_or_path"
    return ModelSpec(name, flag, _reference_engine(args, args.dtype), args.attn_implementation, packing=args.packing)


def finetune_optimizer(args: FinetuneArguments, steps: int) -> OptimizerConfig:
    return _optimizer(args, steps, args.learning_rate, args.weight_decay, args.lora_learning_rate)


def finetune_cadence(args: FinetuneArguments) -> Cadence:
    return _cadence(args, args.gradient_accumulation_steps, args.max_steps)


def _reference_engine(args: Step2Arguments | Step3Arguments, dtype: str) -> EngineConfig:
    return EngineConfig(args.reference_zero_stage, offload_parameters=args.offload_reference_model, dtype=dtype)


def reward_engine(args: Step3Arguments) -> EngineConfig:
    return EngineConfig(args.reward_zero_stage, offload_parameters=args.offload_reward_model, dtype=args.reward_dtype)


def actor_model(args: Step3Arguments) -> ModelSpec:
    saved = is_adapter(args.actor_model_name_or_path)
    lora = _adapters(args, args.actor_lora_dim, args.only_optimize_lora or saved, saved)
    return ModelSpec(
        args.actor_model_name_or_path,
        "--actor_model_name_or_path",
        _trained_engine(args, args.actor_zero_stage, args.actor_dtype, args.per_device_training_batch_size),
        args.attn_implementation,
        disable_dropout=args.disable_actor_dropout,
        gradient_checkpointing=args.actor_gradient_checkpointing,
        lora=lora if args.share == "none" or lora is None else replace(lora, adapter=ACTOR_SET),
    )


def _adapters(args: Step3Arguments, dim: int, only: bool, saved: bool = False) -> LoraSpec | None:
    name, flag = args.actor_lora_module_name, "--actor_lora_module_name"
    return LoraSpec(dim, name, only, flag, args.actor_lora_alpha, args.actor_lora_dropout) if dim or saved else None


def critic_adapters(args: Step3Arguments) -> LoraSpec:
    """Those of a critic on the trunk that it shares."""
    lora = present(_adapters(args, args.critic_lora_dim or args.actor_lora_dim, only=True), "--critic_lora_dim")
    return replace(lora, adapter=CRITIC_SET)


def reference_model(args: Step3Arguments) -> ModelSpec:
    name, flag = args.actor_model_name_or_path, "--actor_model_name_or_path"
    return ModelSpec(name, flag, _reference_engine(args, args.actor_dtype), args.attn_implementation)


def critic_model(args: Step3Arguments, first_reward_model: str) -> ModelSpec:
    """Where the critic starts: its own model, or else the first reward model. Only where the algorithm has a critic."""
    own = args.critic_model_name_or_path
    stage, dtype = present(args.critic_zero_stage, "--critic_zero_stage"), present(args.critic_dtype, "--critic_dtype")
    engine = _trained_engine(args, stage, dtype, args.per_device_training_batch_size)
    return ModelSpec(
        own or first_reward_model,
        "--critic_model_name_or_path" if own else "--reward_model_name_or_path",
        replace(engine, offload=args.offload_critic, offload_parameters=False),
        args.attn_implementation,
        disable_dropout=args.disable_reward_dropout,
        gradient_checkpointing=args.critic_gradient_checkpointing,
        lora=critic_adapters(args) if args.critic_is_reward else _adapters(args, args.critic_lora_dim, only=True),
    )


def actor_optimizer(args: Step3Arguments, steps: int) -> OptimizerConfig:
    steps -= args.critic_warmup_steps * args.ppo_epochs * args.ppo_mini_batches
    actor = _optimizer(args, steps, args.actor_learning_rate, args.actor_weight_decay, args.actor_lora_learning_rate)
    critic = (args.critic_learning_rate, args.critic_weight_decay)
    return replace(actor, critic=critic) if args.share == "all" else actor


def critic_optimizer(args: Step3Arguments, steps: int) -> OptimizerConfig:
    return _optimizer(args, steps, args.critic_learning_rate, args.critic_weight_decay)


def sampling(args: SamplingFlags) -> Sampling:
    """The distribution that answers are drawn from."""
    return Sampling(args.temperature, args.top_p, args.top_k)


def evaluated_distribution(args: Step3Arguments) -> Sampling:
    """The distribution whose log-probs the update differentiates."""
    return sampling(args) if args.logprobs_of == "sampling" else Sampling()


def generation(args: Step3Arguments, pad_id: int) -> GenerationSettings:
    longest, longest_greedy = args.max_answer_seq_len, args.max_greedy_seq_len
    return GenerationSettings(longest, pad_id, sampling(args), longest_greedy)


def trainer_settings(args: Step3Arguments) -> TrainerSettings:
    return TrainerSettings(
        _cadence(args, args.rollout_batches, args.stop_step),
        micro_batch_size=args.per_device_training_batch_size,
        mini_batches=args.ppo_mini_batches,
        critic_warmup_steps=args.critic_warmup_steps,
        target_kl=args.target_kl,
        best_by=args.best_by,
        unsupervised_coefficient=args.unsup_coef,
    )
