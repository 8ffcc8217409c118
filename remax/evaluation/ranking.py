"""How well scores rank answers: figures of pairs, and of prompts with several ranked answers.

Sums are taken batch by batch and over the ranks, and divided at the end, so that the figures do not depend on how the
rows are cut; rows that only fill up a batch carry weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from remax.core.batches import to_device
from remax.core.losses import ordered_pairs
from remax.core.sequences import Sequences
from remax.models.loading import evaluating
from utils.data.batches import PairBatch, RankedBatch
from utils.distributed import device, sum_across_ranks

BINS, OF_BINS = 10, ("pairs", "confidence", "right")  # of the calibration, each 0.05 wide
SIDES = {"longer_chosen": 1, "shorter_chosen": -1, "equal_length": 0}  # sign of chosen length - rejected length


class Scorer(Protocol):
    """What gives answers scores: `Reward`, `TrainedReward`, `ImplicitReward`."""

    @property
    def model(self) -> nn.Module: ...

    def score(self, sequences: Sequences) -> Tensor: ...


@torch.no_grad()
def ranking_accuracy(
    scorer: Scorer,
    loader: Iterable[PairBatch] | Iterable[RankedBatch] | Iterable[PairBatch | RankedBatch],
    calibration: list[dict[str, float]] | None = None,
) -> dict[str, float]:
    """`pair_figures`, mean and spread of all scores, and for batches of several ranked answers `ranked_figures`.

    A ranking counts as all its pairs of answers of unequal rank.

    Args:
        calibration: Takes the pairs by how sure the scores are of them, see `calibration_bins`.
    """
    sums: dict[str, float] = {}
    bins = torch.zeros(3, BINS, dtype=torch.float64, device=device())
    with evaluating(scorer.model):
        for batch in map(to_device, loader):
            if isinstance(batch, RankedBatch):
                scored = scorer.score(Sequences.from_batch(batch))
                additions = ranked_sums(scored, batch.row, batch.ranks, batch.lengths, batch.weight)
                better, worse = ordered_pairs(batch.row, batch.ranks)
                bins += by_confidence(scored[better] - scored[worse], batch.weight[batch.row[better]])
            else:
                scores, lengths = pair_scores(scorer, batch), (batch.chosen_lengths, batch.rejected_lengths)
                additions = pair_sums(*scores, *lengths, batch.weight)
                additions |= score_sums(torch.cat(scores), batch.weight.repeat(2))
                bins += by_confidence(scores[0] - scores[1], batch.weight)
            for name, value in additions.items():
                sums[name] = sums.get(name, 0.0) + value
    names = [f"bin {i} of {what}" for what in OF_BINS for i in range(BINS)]
    sums |= dict(zip(names, bins.flatten().tolist(), strict=True))
    total = sum_across_ranks(sums)
    if calibration is not None:
        calibration[:] = calibration_bins([total[name] for name in names])
    answers = max(total["answers"], 1.0)
    mean = total["scores"] / answers
    spread = math.sqrt(max(total["squares"] / answers - mean**2, 0.0))
    return pair_figures(total) | ranked_figures(total) | {"score_mean": mean, "score_std": spread}


def pair_sums(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, weight: Tensor | None = None
) -> dict[str, float]:
    """What `pair_figures` are made of, from scores and lengths in tokens of n pairs, each (n,), and their weights."""
    weight = torch.ones_like(chosen) if weight is None else weight
    right, order = wins(chosen - rejected), (chosen_lengths - rejected_lengths).sign()
    terms = {
        "pairs": weight,
        "accuracy": weight * right,
        "longer_wins": weight * wins(order),
        "chosen_score": weight * chosen,
        "rejected_score": weight * rejected,
    }
    for name, sign in SIDES.items():
        terms[f"pairs_{name}"] = weight * (order == sign)
        terms[f"accuracy_{name}"] = terms[f"pairs_{name}"] * right
    return {name: float(values.double().sum()) for name, values in terms.items()}


def wins(difference: Tensor) -> Tensor:
    """1 above zero, 0 below it, and half of both where there is no difference."""
    return 0.5 + 0.5 * difference.sign()


def pair_figures(sums: dict[str, float]) -> dict[str, float]:
    """Figures of all pairs together, from their `pair_sums`.

    Returns:
        - `accuracy`: share of pairs whose chosen answer scores higher, a tie counting half;
        - `chosen_score`, `rejected_score`, `margin`: mean scores, and their difference;
        - `longer_wins`: what "the longer answer is the better one" would reach on the same pairs: an accuracy near it
          may be length alone;
        - `accuracy_longer_chosen`, `accuracy_shorter_chosen`, `accuracy_equal_length`: of the pairs whose chosen answer
          is the longer one, the shorter one, or as long; left out where there is none;
        - `pairs_...`: how many these are.
    """
    n = max(sums["pairs"], 1.0)
    figures = {name: sums[name] / n for name in ("accuracy", "longer_wins", "chosen_score", "rejected_score")}
    figures["margin"] = figures["chosen_score"] - figures["rejected_score"]
    for name in SIDES:
        count = figures[f"pairs_{name}"] = sums[f"pairs_{name}"]
        if count:
            figures[f"accuracy_{name}"] = sums[f"accuracy_{name}"] / count
    return figures


def by_confidence(difference: Tensor, weight: Tensor) -> Tensor:
    """Sums over pairs by the scores' confidence sigma(|d|), (len(OF_BINS), BINS).

    Args:
        difference: (n,) d, score of the chosen answer - score of the rejected one.
        weight: (n,).
    """
    confidence = difference.double().abs().sigmoid()  # (n,), 0.5 to 1
    place = ((confidence - 0.5) * 2 * BINS).long().clamp(0, BINS - 1)
    terms = torch.stack([torch.ones_like(confidence), confidence, wins(difference).double()]) * weight
    return confidence.new_zeros(len(OF_BINS), BINS).index_add_(1, place, terms)


def calibration_bins(sums: Sequence[float]) -> list[dict[str, float]]:
    """How often the scores are right where they are so sure, from the sums of all batches and ranks, bin by bin.

    Returns:
        For each bin that has any: its `pairs`, their mean `confidence` sigma(|d|), with which Bradley-Terry prefers the
        answer of the higher score, and the `accuracy`, the share of them whose chosen answer that is.
    """
    of_bins = zip(*(sums[i * BINS : (i + 1) * BINS] for i in range(len(OF_BINS))), strict=True)
    return [{"pairs": n, "confidence": sure / n, "accuracy": right / n} for n, sure, right in of_bins if n]


def score_sums(scores: Tensor, weight: Tensor) -> dict[str, float]:
    """Number, sum and sum of squares of (N,) weighted scores."""
    terms = {"answers": weight, "scores": weight * scores, "squares": weight * scores**2}
    return {name: float(values.double().sum()) for name, values in terms.items()}


def ranked_sums(scores: Tensor, row: Tensor, ranks: Tensor, lengths: Tensor, weight: Tensor) -> dict[str, float]:
    """The sums of B rankings with N answers: scores, row, ranks and lengths (N,) as of a `RankedBatch`, weight (B,)."""
    better, worse = ordered_pairs(row, ranks)
    pairs = pair_sums(scores[better], scores[worse], lengths[better], lengths[worse], weight[row[better]])
    of_rows = torch.zeros_like(weight)  # (B,)
    highest = scores == scores.new_full(weight.shape, -math.inf).scatter_reduce(0, row, scores, "amax")[row]  # (N,)
    best = ranks == 1

    def count(answers: Tensor) -> Tensor:
        return of_rows.index_add(0, row, answers.to(of_rows.dtype))

    terms = {
        "rankings": weight,
        "best_of_k_accuracy": weight * count(highest & best) / count(highest),
        "best_of_k_chance": weight * count(best) / count(torch.ones_like(best)),
    }
    return pairs | score_sums(scores, weight[row]) | {name: float(v.double().sum()) for name, v in terms.items()}


def ranked_figures(sums: dict[str, float]) -> dict[str, float]:
    """The best-of-K figures from `ranked_sums`; none from sums of pairs.

    Returns:
        - `best_of_k_accuracy`: share of prompts whose best answer has the highest score; among n answers of the same
          highest score each counts 1 / n;
        - `best_of_k_chance`: what blind choice reaches: the share of each prompt's answers that are its best.
    """
    if "rankings" not in sums:
        return {}
    return {name: sums[name] / max(sums["rankings"], 1.0) for name in ("best_of_k_accuracy", "best_of_k_chance")}


def pair_scores(scorer: Scorer, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """(B,) scores of the chosen and of the rejected answers, from one forward over 2B rows."""
    chosen, rejected = scorer.score(Sequences.from_pairs(batch)).chunk(2)
    return chosen, rejected
