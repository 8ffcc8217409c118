"""Accuracy by subset, as RewardBench tells it: of pairs (version 1), of the best of several answers (version 2)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

TIES = "ties"  # the subset of RewardBench 2 that has several right answers, and a rule of its own


@dataclass(frozen=True)
class Scored:
    """A row: which it is, the scores of its right answers, and those of its wrong ones; at least one of each."""

    name: str
    right: Sequence[float]
    wrong: Sequence[float]

    @property
    def best_is_right(self) -> float:
        """1 when a right answer scores highest; among answers of the same highest score each counts alike."""
        best = max(*self.right, *self.wrong)
        right, wrong = (sum(score == best for score in scores) for scores in (self.right, self.wrong))
        return right / (right + wrong)

    @property
    def margin(self) -> float:
        """By how much the worst right answer is above the best wrong one."""
        return min(self.right) - max(self.wrong)

    @property
    def spread(self) -> float:
        """How far apart the right answers are."""
        return max(self.right) - min(self.right)


def subset_figures(rows: Mapping[str, Sequence[Scored]]) -> dict[str, float]:
    """The score of each subset: `ties_score` of RewardBench 2's Ties, of the others the share of rows decided right."""
    return {
        name: ties_score(found)
        if name.lower() == TIES and all(row.name.partition(":")[0] in ("ref", "tied") for row in found)
        else fmean(row.best_is_right for row in found)
        for name, found in rows.items()
    }


def ties_score(rows: Sequence[Scored]) -> float:
    """RewardBench 2's score of questions with several right answers ("tied:N"), and of the same with one ("ref:N").

    Three tenths each are the shares of both kinds whose right answers are all above the wrong ones. Two tenths each, of
    the questions that come both ways, are the shares in which the margin over the wrong answers exceeds the spread
    of the right ones, and in which that of the other kind does so, too; a hundredth is by how much, through tanh.
    """
    kinds: dict[str, dict[str, Scored]] = defaultdict(dict)
    for row in rows:
        kind, _, number = row.name.partition(":")
        kinds[kind][number] = row
    both = [(kinds["tied"][number], kinds["ref"][number]) for number in kinds["tied"] if number in kinds["ref"]]
    both = [(tied, one) for tied, one in both if len(tied.right) > 1]
    ratios = [min(tied.margin, one.margin) / tied.spread for tied, one in both if tied.spread > 0]

    def share(found: Sequence[bool | float]) -> float:
        return fmean(found) if found else 0.0

    return (
        0.3 * share([row.margin > 0 for row in kinds["tied"].values()])
        + 0.3 * share([row.margin > 0 for row in kinds["ref"].values()])
        + 0.2 * share([tied.margin > tied.spread for tied, _ in both])
        + 0.2 * share([min(tied.margin, one.margin) > tied.spread for tied, one in both])
        + 0.01 * share([math.tanh(ratio - 1) for ratio in ratios])
    )
