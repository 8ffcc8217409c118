"""Models on their ranks: thin wrappers round DeepSpeed engines, which know neither roles nor algorithms.

A trained model is always a DeepSpeed engine. A frozen one at ZeRO-0 is a plain module on the device (an engine would
add nothing), at ZeRO-3 a DeepSpeed inference engine. What a model is for, and what it is asked, is a matter of the
roles in `policy` and `scorer`, which hold an engine.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remax.core.sequences import Sequences
from remax.engines.deepspeed_config import EngineConfig, inference_config, training_config
from remax.engines.optimizer import OptimizerConfig, build_optimizer
from remax.engines.zero import buffers_kept
from remax.models.loading import count_parameters, evaluating
from remax.models.packing import token_slots
from utils.distributed import device, world_size


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step reports.

    Attributes:
        grad_norm: Of the whole gradient before clipping; nan where it is not known.
        skipped: No step was taken, since the gradient overflowed.
        loss_scale: By which the next step's loss is multiplied in fp16; None in other formats.
    """

    learning_rate: float
    grad_norm: float
    skipped: bool
    loss_scale: float | None = None

    @property
    def figures(self) -> dict[str, float]:
        """For the log."""
        figures = {"grad_norm": self.grad_norm, "lr": self.learning_rate}
        if self.skipped:
            figures["skipped"] = 1.0
        return figures if self.loss_scale is None else figures | {"loss_scale": self.loss_scale}


class Engine:
    """A model spread over the ranks.

    Attributes:
        wrapped: What its forward must go through: the DeepSpeed engine, or the module.
    """

    model: Any  # PolicyModel or RewardModel: the roles know which
    wrapped: Any  # DeepSpeed has no types
    config: EngineConfig

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The model's forward, with what DeepSpeed hangs on it."""
        return self.wrapped(*args, **options)

    @property
    def zero3(self) -> bool:
        """Whether the parameters are spread over the ranks, so that every forward needs all of them."""
        return self.config.zero_stage == 3

    def train(self, mode: bool = True) -> None:
        """Dropout on, or off."""
        self.model.train(mode)

    @contextlib.contextmanager
    def generating(self, gather: bool = True) -> Iterator[bool]:
        """Inside, `generate` may be called many times, in eval mode; yields whether it needs `synced_gpus`.

        Under ZeRO-3 with `gather` the parameters are collected and DeepSpeed's hooks taken off meanwhile: collecting
        alone gains nothing.
        """
        with evaluating(self.model):
            if self.zero3 and gather:
                from deepspeed.runtime.zero import unwrap_model_for_generation

                with unwrap_model_for_generation(self.wrapped):
                    yield False
            else:
                yield self.zero3


class TrainedEngine(Engine):
    """A model that learns.

    The loss given to `backward` is this rank's share of one global objective: the ranks' shares add up to it.
    """

    def __init__(self, model: nn.Module, config: EngineConfig, optimizer: OptimizerConfig):
        if config.zero_stage == 0 and config.dtype != "fp32":
            raise ValueError(f"EngineConfig(0, dtype={config.dtype!r}): training in 16 bits needs ZeRO 1, 2 or 3")
        import deepspeed
        from transformers import get_scheduler  # brings transformers' own trainer along: seconds

        self.config = config
        adam = build_optimizer(model, optimizer, config.offload)
        schedule = get_scheduler(optimizer.schedule, adam, optimizer.warmup_steps, max(optimizer.total_steps, 1))
        with buffers_kept(model):
            self.wrapped, *_ = deepspeed.initialize(
                model=model,
                optimizer=adam,
                lr_scheduler=schedule,
                config=training_config(config, count_parameters(model, trained_only=True)),
                dist_init_required=False,
            )
        self.model = self.wrapped.module

    def slots(self, sequences: Sequences) -> int:
        """Tokens that a forward over these sequences computes, padding included."""
        return token_slots(sequences, self.model.packing)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates the gradient of `loss`, a scalar; `last` on the micro-batch before `step`.

        DeepSpeed averages gradients over the ranks; times the number of ranks makes that the sum. It must know which
        micro-batch is the last, since at ZeRO-1 and 2 it reduces inside backward and would otherwise keep the last
        micro-batch's gradient only.
        """
        self.wrapped.set_gradient_accumulation_boundary(last)
        self.wrapped.backward(loss * world_size())

    def step(self) -> StepResult:
        """One optimizer step and one step of the schedule; none where the gradient is not finite."""
        rate = float(self.wrapped.get_lr()[0])
        norm = self._grad_norm_without_zero() if self.config.zero_stage == 0 else None
        if norm is not None and not math.isfinite(norm):  # ZeRO 1 to 3 skip such a step by themselves
            self.wrapped.zero_grad()
            return StepResult(rate, norm, skipped=True)
        self.wrapped.step()
        norm = self.wrapped.get_global_grad_norm() if norm is None else norm
        scale = float(self.wrapped.optimizer.cur_scale) if self.config.dtype == "fp16" else None
        norm = float(norm) if norm is not None else math.nan
        return StepResult(rate, norm, not self.wrapped.was_step_applied(), scale)

    def _grad_norm_without_zero(self) -> float:
        """At ZeRO-0 in fp32 each rank has the whole gradient, and DeepSpeed clips it without reporting its norm."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))


class FrozenEngine(Engine):
    """A model that only evaluates."""

    def __init__(self, model: nn.Module, config: EngineConfig):
        self.config = config
        model.requires_grad_(False).eval()
        if config.zero_stage == 3:
            import deepspeed

            with buffers_kept(model):
                self.wrapped, *_ = deepspeed.initialize(
                    model=model, config=inference_config(config), dist_init_required=False
                )
            self.wrapped.eval()
            self.model = self.wrapped.module
        else:
            with buffers_kept(model):
                self.wrapped = self.model = model.to(device=device(), dtype=config.torch_dtype)
