"""Figures of many micro-batches and ranks: totals that carry what they are divided by.

A mean of means depends on how the rows are cut. So totals and counts are added up separately, over micro-batches and
then over ranks, and divided once at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from utils.distributed import sum_across_ranks


@dataclass(frozen=True)
class Figure:
    """A mean in the making.

    Attributes:
        total: Sum over some answers, tokens, or whatever is counted.
        count: Their number. None: `total` is one rank's share of a figure of the whole optimizer step, such as a loss
            with a global denominator.
    """

    total: float | Tensor
    count: float | Tensor | None = None

    def __add__(self, other: Figure) -> Figure:
        if self.count is None or other.count is None:
            return Figure(self.total + other.total)
        return Figure(self.total + other.total, self.count + other.count)


Figures = dict[str, Figure]


def add(figures: Figures, more: Figures) -> Figures:
    """The figures of both, name by name."""
    return figures | {name: figures[name] + value if name in figures else value for name, value in more.items()}


def reduce(
    figures: Figures,
    steps: int = 1,
    sum_across_ranks: Callable[[Mapping[str, float | Tensor]], dict[str, float]] = sum_across_ranks,
) -> dict[str, float]:
    """The means over all ranks, from one reduction.

    Args:
        steps: Optimizer steps whose figures were added; those without a count are divided by it.
    """
    counts = {name: figure.count for name, figure in figures.items() if figure.count is not None}
    totals = {f"total {name}": figure.total for name, figure in figures.items()}
    sums = sum_across_ranks(totals | {f"count {name}": count for name, count in counts.items()})
    return {
        name: sums[f"total {name}"] / (max(sums[f"count {name}"], 1.0) if name in counts else steps) for name in figures
    }
