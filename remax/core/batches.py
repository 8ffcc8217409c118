"""Batches of a loader on their way into a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from torch import Tensor

from remax.core.sequences import Sequences
from utils.distributed import device

Batch = dict[str, Tensor]  # a loader's batch; prompts also carry their text, a list


class First:
    """The first `limit` batches of a loader, every time it is iterated; all of them when 0."""

    def __init__(self, loader: Iterable[Batch], limit: int):
        self.loader, self.limit = loader, limit

    def __iter__(self) -> Iterator[Batch]:
        return islice(self.loader, self.limit or None)


def to_device(batch: Batch) -> Batch:
    return {k: v.to(device()) if isinstance(v, Tensor) else v for k, v in batch.items()}


def paired(batch: Batch) -> Sequences:
    """The chosen answers' B rows, then the rejected ones'."""
    chosen, rejected = Sequences.from_batch(batch, "chosen"), Sequences.from_batch(batch, "rejected")
    return Sequences.concatenate([chosen, rejected], pad_id=0)  # what stands behind a row's end is never read


T = TypeVar("T")


def groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
