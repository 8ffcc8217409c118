"""Actor, reference, reward and critic: thin wrappers round DeepSpeed engines that speak in sequences, log-probs and
scores.

The algorithm above them knows no DeepSpeed, and these know no algorithm. A trained model is always a DeepSpeed engine.
A frozen one at ZeRO-0 is a plain module on the device (an engine would add nothing), at ZeRO-3 a DeepSpeed inference
engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remax.core.sequences import Sequences
from remax.engines.deepspeed_config import EngineConfig, inference_config, training_config
from remax.engines.optimizer import OptimizerConfig, build_optimizer
from remax.engines.zero import buffers_kept
from remax.models.packing import token_slots
from utils.distributed import device, world_size


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step reports: learning rate used, gradient norm before clipping, and whether fp16 overflow
    skipped it.
    """

    learning_rate: float
    grad_norm: float
    skipped: bool


class TrainedEngine:
    """A model that learns. The loss given to `backward` is this rank's share of one global objective: the ranks' shares
    add up to it.
    """

    def __init__(self, model: nn.Module, config: EngineConfig, optimizer: OptimizerConfig):
        import deepspeed
        from transformers import get_scheduler  # brings transformers' own trainer along: seconds

        self.config = config
        adam = build_optimizer(model, optimizer, config.offload)
        schedule = get_scheduler(optimizer.schedule, adam, optimizer.warmup_steps, max(optimizer.total_steps, 1))
        with buffers_kept(model):
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=adam,
                lr_scheduler=schedule,
                config=training_config(config),
                dist_init_required=False,
            )
        self.model: nn.Module = self.engine.module

    @property
    def zero3(self) -> bool:
        return self.config.zero_stage == 3

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def slots(self, sequences: Sequences) -> int:
        """Tokens that a forward over these sequences computes, padding included."""
        return token_slots(sequences, self.model.packing)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates the gradient of `loss`, a scalar; `last` on the micro-batch before `step`.

        DeepSpeed averages gradients over the ranks; times the number of ranks makes that the sum. It must know which
        micro-batch is the last, since at ZeRO-1 and 2 it reduces inside backward and would otherwise keep the last
        micro-batch's gradient only.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * world_size())

    def step(self) -> StepResult:
        """One optimizer step and one step of the schedule; none where the gradient is not finite."""
        rate = float(self.engine.get_lr()[0])
        norm = self._grad_norm_without_zero() if self.config.zero_stage == 0 and self.config.dtype == "fp32" else None
        if norm is not None and not math.isfinite(norm):  # ZeRO 1 to 3 skip such a step by themselves
            self.engine.zero_grad()
            return StepResult(rate, norm, skipped=True)
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        return StepResult(rate, float(norm) if norm is not None else math.nan, not self.engine.was_step_applied())

    def _grad_norm_without_zero(self) -> float:
        """At ZeRO-0 in fp32 the gradients are whole on each rank, and DeepSpeed clips them without telling their
        norm.
        """
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))


class FrozenEngine:
    """A model that only evaluates."""

    def __init__(self, model: nn.Module, config: EngineConfig):
        self.config = config
        model.requires_grad_(False).eval()
        if config.zero_stage == 3:
            import deepspeed

            with buffers_kept(model):
                self.engine, *_ = deepspeed.initialize(
                    model=model, config=inference_config(config), dist_init_required=False
                )
            self.engine.eval()
            self.model: nn.Module = self.engine.module
        else:
            with buffers_kept(model):
                self.engine = self.model = model.to(device=device(), dtype=config.torch_dtype)

    @property
    def zero3(self) -> bool:
        return self.config.zero_stage == 3
