"""What ZeRO asks of code around it: loading by parts, parameters made whole, number formats kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.utils import skip_init

from remax.engines.deepspeed_config import EngineConfig, training_config
from remax.models.loading import count_parameters
from utils.distributed import device


@contextlib.contextmanager
def loading(config: EngineConfig) -> Iterator[None]:
    """Hugging Face models loaded inside are partitioned over the ranks as they are read when `config` is ZeRO-3.

    transformers keeps that switch process-wide. It is dropped on leaving, so that the next model loads by its own
    configuration.
    """
    if config.zero_stage != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    switch = HfDeepSpeedConfig(training_config(config))
    try:
        yield
    finally:
        del switch
        unset_hf_deepspeed_config()


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Floating-point buffers keep the number format they were loaded in, whatever a cast of the model inside does.

    transformers holds rotary frequencies in float32 in a bfloat16 model too. Casting the whole module, as DeepSpeed
    does, rounds them to three digits, and the angle at position 1000 is then off by a radian or two.
    """
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]
    yield
    for module, name, buffer in kept:
        module._buffers[name] = buffer.to(device())


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter], zero3: bool) -> Iterator[None]:
    """Inside, ZeRO-3 partitioned parameters are whole on every rank (read-only)."""
    if not zero3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


def copied_head(head: nn.Module, config: EngineConfig) -> nn.Linear:
    """A linear head with the weights of another, whole also where ZeRO-3 spreads those."""
    with gathered(head.parameters(), config.zero_stage == 3):
        weight = cast(nn.Linear, head).weight
        out, width = weight.shape
        # Without drawing weights first, so that a run's random state does not tell how its models share theirs.
        copy = skip_init(nn.Linear, width, out, bias=False, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            copy.weight.copy_(weight)
    return copy


@dataclass(frozen=True)
class Size:
    """Numbers of parameters."""

    parameters: int = 0
    trained: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.parameters + other.parameters, self.trained + other.trained)

    @property
    def share(self) -> float:
        """What is trained of it, 0 to 1."""
        return self.trained / max(self.parameters, 1)

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, of which {self.trained:,} are trained ({self.share:.2%})"


def size_of(model: nn.Module) -> Size:
    """Of the whole model, also where ZeRO-3 spreads it; tied parameters count once."""
    return Size(count_parameters(model), count_parameters(model, trained_only=True))
