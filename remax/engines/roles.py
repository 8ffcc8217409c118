"""What all roles have in common. A role asks an engine for something; several roles may hold the same engine.

Where that engine's model is a `Trunk`, a role says what it uses of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from remax.core.onednn import for_many_rows
from remax.core.sequences import Sequences
from remax.engines.base import Engine, StepResult
from remax.models.loading import evaluating
from remax.models.packing import shares_prompts
from remax.models.trunk import Use


class Role:
    """A use that a model is put to."""

    def __init__(self, engine: Engine, use: Use | None = None):
        """Gives an engine the role.

        Args:
            use: Of a `Trunk`.
        """
        self.engine: Any = engine  # a TrainedEngine where the role learns
        self.use = use

    def ask(self, *args: Any, **options: Any) -> Any:
        """The model's forward, as the role uses it."""
        return self.engine(*args, **options, **({} if self.use is None else {"use": self.use}))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, the model reads without gradient: in eval mode, by the products that are fastest so."""
        with evaluating(self.model), for_many_rows(self.model):
            yield

    def in_forwards(self, sequences: Sequences, forwards: int, read: Callable[[Sequences], Tensor]) -> Tensor:
        """What `read` says of the rows, by several forwards of about as many tokens each.

        Answers to one prompt are read together where the model shares it.

        Args:
            forwards: At most B; at ZeRO-3 the same number on every rank.
            read: Gives (b,), or (b, a, ...) with a the longest answer of the b rows.

        Returns:
            (B,) or (B, A, ...), 0 in columns beyond the longest answer of a forward.
        """
        if forwards == 1:
            return read(sequences)
        rows = sequences.balanced(forwards, together=shares_prompts(self.model))
        found, width = [read(sequences.select(some)) for some in rows], sequences.answer_width
        if found[0].dim() > 1:
            found = [pad(x, (*(0, 0) * (x.dim() - 2), 0, width - x.shape[1])) for x in found]
        joined = torch.cat(found)
        return joined[torch.tensor(sum(rows, []), device=joined.device).argsort()]

    def switched(self) -> AbstractContextManager[None]:
        """Inside, what asks the model itself finds the role's adapters on."""
        return nullcontext() if self.use is None else self.engine.model.switched(self.use.adapters)

    @property
    def model(self) -> Any:
        """The `PolicyModel` or `RewardModel`: weights, configuration, generation settings."""
        return self.engine.model if self.use is None else self.engine.model.reader

    @property
    def zero3(self) -> bool:
        """See `Engine.zero3`."""
        return self.engine.zero3


class Learner(Role):
    """A role that can learn, on a `TrainedEngine`."""

    def train(self, mode: bool = True) -> None:
        """Dropout on, or off."""
        self.engine.train(mode)

    def slots(self, sequences: Sequences) -> int:
        """Tokens that the model computes for these sequences, padding included."""
        return self.engine.slots(sequences)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates the gradient of this rank's share of the loss; `last` on the micro-batch before `step`."""
        self.engine.backward(loss, last)

    def step(self) -> StepResult:
        """One optimizer step."""
        return self.engine.step()
