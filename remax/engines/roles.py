"""What all roles have in common. A role asks an engine for something; several roles may hold the same engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from remax.engines.base import Engine, StepResult


class Role:
    """A use that a model is put to."""

    def __init__(self, engine: Engine):
        self.engine: Any = engine  # a TrainedEngine where the role learns

    @property
    def model(self) -> Any:
        """The `PolicyModel` or `RewardModel`: weights, configuration, generation settings."""
        return self.engine.model

    @property
    def zero3(self) -> bool:
        """See `Engine.zero3`."""
        return self.engine.zero3


class Learner(Role):
    """A role that can learn, on a `TrainedEngine`."""

    def train(self, mode: bool = True) -> None:
        """Dropout on, or off."""
        self.engine.train(mode)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates the gradient of this rank's share of the loss; `last` on the micro-batch before `step`."""
        self.engine.backward(loss, last)

    def step(self) -> StepResult:
        """One optimizer step."""
        return self.engine.step()
