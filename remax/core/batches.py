"""Batches of a loader on their way into a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Generic, TypeVar

from utils.data.batches import SomeBatch
from utils.distributed import device

T = TypeVar("T")


class First(Generic[T]):
    """The first `limit` batches of a loader, every time it is iterated; all of them when 0 or None."""

    def __init__(self, loader: Iterable[T], limit: int | None):
        self.loader, self.limit = loader, limit

    def __iter__(self) -> Iterator[T]:
        return islice(self.loader, self.limit or None)


def to_device(batch: SomeBatch) -> SomeBatch:
    """The batch on this process's device."""
    return batch.to(device())


def groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
