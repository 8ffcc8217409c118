"""AdamW with its parameter groups and schedule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remax.models.trunk import Trunk, learns_as_critic
from utils.distributed import print0
from utils.run import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule; steps are optimizer steps, not micro-batches.

    Attributes:
        lora_learning_rate: Of adapters, where they have one of their own.
        critic: Learning rate and weight decay of a critic that shares the actor's trunk.
    """

    learning_rate: float
    total_steps: int
    warmup_steps: int = 0
    schedule: str = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    lora_learning_rate: float | None = None
    critic: tuple[float, float] | None = None


def build_optimizer(model: nn.Module, config: OptimizerConfig, offload: bool) -> torch.optim.Optimizer:
    """DeepSpeed's CPU Adam when the optimizer states live in CPU memory, else torch's fused AdamW.

    The latter needs no compiler. It goes through the weights once, without it ten times.
    """
    groups = optimizer_groups(model, config.weight_decay, config.lora_learning_rate, config.critic)
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        announce_compilation("cpu_adam")
        return DeepSpeedCPUAdam(groups, lr=config.learning_rate, betas=config.betas, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def announce_compilation(operator: str) -> None:
    """One line where DeepSpeed is about to compile this operator, which takes up to minutes, in silence."""
    from torch.utils import cpp_extension  # warns where it is imported on a machine with CUDA but without a GPU

    folder = Path(cpp_extension._get_build_directory(operator, False))  # under TORCH_EXTENSIONS_DIR
    if not (folder / f"{operator}.so").is_file():
        print0(f"compiling DeepSpeed's {operator}, up to some minutes; only once, as it is kept in {folder}")


def optimizer_groups(
    model: nn.Module,
    weight_decay: float,
    lora_learning_rate: float | None = None,
    critic: tuple[float, float] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of the trained parameters.

    There is no weight decay on biases and normalisation (1-dimensional weights), and adapters learn at their own rate;
    so does a `critic` on the same trunk, see `OptimizerConfig`.
    """
    groups: dict[tuple[bool, str], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a partitioned parameter is flat; DeepSpeed keeps its true shape in ds_shape.
            one_dimensional = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
            kind = "lora" if "lora_" in name else ""
            kind = "critic" if critic and isinstance(model, Trunk) and learns_as_critic(name) else kind
            groups.setdefault((one_dimensional or name.endswith(".bias"), kind), []).append(parameter)
    if not groups:
        raise UserError("no parameter is trainable: check --only_optimize_lora and --lora_module_name")
    rates = {"lora": lora_learning_rate, "critic": critic and critic[0]}
    decays = {"critic": critic[1]} if critic else {}
    return [
        {
            "params": params,
            "weight_decay": 0.0 if undecayed else decays.get(kind, weight_decay),
            **({"lr": rate} if (rate := rates.get(kind)) is not None else {}),
        }
        for (undecayed, kind), params in groups.items()
    ]
