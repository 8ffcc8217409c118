"""All that a training has to know to go on as if it had never stopped, gathered and restored in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from remax.checkpoint.ema import WeightAverage
from remax.checkpoint.shards import Shards, key_of
from remax.engines import state as of_engine
from remax.engines.base import TrainedEngine
from utils.distributed import rank, set_random_state


class Stateful(Protocol):
    """Something that moves during a training, and whose state json can say; the same on every rank."""

    def state_dict(self) -> Mapping[str, Any]:
        """Where it stands."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Goes on from what `state_dict` gave."""
        ...


@dataclass
class RunState:
    """What moves during a training.

    Attributes:
        engines: The models that learn, by name, with optimizer, schedule and loss scale.
        values: Everything else, by name: step and best figures, position in the data, algorithm, watchers.
        average: Moving average of the actor's weights.
    """

    engines: Mapping[str, TrainedEngine]
    values: Mapping[str, Stateful] = field(default_factory=dict)
    average: WeightAverage | None = None

    def tensors(self) -> dict[str, Tensor]:
        """This rank's share of the tensors, which all ranks' files together hold whole; not copies."""
        found = {}
        for model, engine in self.engines.items():
            for (kind, name, start), numbers in of_engine.tensors(engine).items():
                found[key_of(f"{model}.{kind}", name, start)] = numbers
        for (name, start), numbers in self.average.tensors().items() if self.average else ():
            found[key_of("average", name, start)] = numbers
        return found

    def size(self) -> int:
        """Bytes of `tensors` once Adam has its moments."""
        weights = sum(
            numbers.numel()
            for engine in self.engines.values()
            for (kind, _, _), numbers in of_engine.tensors(engine).items()
            if kind == of_engine.WEIGHT
        )
        averages = sum(numbers.numel() for numbers in self.average.tensors().values()) if self.average else 0
        return 4 * ((1 + len(of_engine.MOMENTS)) * weights + averages)

    def numbers(self) -> dict[str, Any]:
        """The rest, which is the same on every rank."""
        values = {name: value.state_dict() for name, value in self.values.items()}
        return {"engines": {name: of_engine.values(engine) for name, engine in self.engines.items()}, "values": values}

    def restore(self, numbers: Mapping[str, Any], shards: Shards, random: list[dict[str, Any]]) -> None:
        """Goes on from what all ranks together gave; every rank must call it.

        Args:
            random: The `random_state` of each rank that there was; further ranks go on as they were seeded.
        """
        for model, engine in self.engines.items():

            def read(name: str, kind: str, start: int, length: int, model: str = model) -> Tensor:
                return shards.read(f"{model}.{kind}", name, start, length)

            of_engine.restore(engine, numbers["engines"][model], read)
        if self.average:
            self.average.restore(partial(shards.read, "average"))
        for name, value in self.values.items():
            value.load_state_dict(numbers["values"][name])
        if rank() < len(random):
            set_random_state(random[rank()])


class Snapshot:
    """Copies of tensors in CPU memory that is taken once and used again."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies that stay as they are while the training goes on."""
        pinned = torch.cuda.is_available()
        for name, tensor in tensors.items():
            if name not in self.buffers:
                self.buffers[name] = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=pinned)
            self.buffers[name].copy_(tensor, non_blocking=True)
        if pinned:
            torch.cuda.synchronize()
        return {name: self.buffers[name] for name in tensors}
