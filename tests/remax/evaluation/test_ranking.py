"""Figures of pairs and of several ranked answers, by hand and by loops."""

from __future__ import annotations

import math
import random

import pytest
import torch

from remax.core.sequences import Sequences
from remax.evaluation.ranking import pair_figures, pair_sums, ranking_accuracy
from utils.data.batches import PairBatch, RankedBatch


class FixedScores:
    """A reward engine that gives the rows of each call the next of the given scores."""

    model = torch.nn.Module()

    def __init__(self, *calls: list[float]):
        self.calls = iter(calls)

    def score(self, sequences: Sequences) -> torch.Tensor:
        return torch.tensor(next(self.calls))


def pairs(weight: list[float], chosen_lengths: list[int], rejected_lengths: list[int]) -> PairBatch:
    n = len(weight)
    return PairBatch(
        chosen_ids=torch.ones(n, max(chosen_lengths), dtype=torch.long),
        chosen_lengths=torch.tensor(chosen_lengths),
        rejected_ids=torch.ones(n, max(rejected_lengths), dtype=torch.long),
        rejected_lengths=torch.tensor(rejected_lengths),
        prompt_lengths=torch.ones(n, dtype=torch.long),
        weight=torch.tensor(weight),
    )


def test_pairs_are_scored_without_dropout():
    class Dropping:
        model = torch.nn.Dropout(0.5)

        def score(self, sequences: Sequences) -> torch.Tensor:
            return self.model(torch.ones(len(sequences)))

    Dropping.model.train()
    figures = ranking_accuracy(Dropping(), [pairs([1.0] * 20, [3] * 20, [3] * 20)])
    assert (figures["score_mean"], figures["score_std"]) == (1.0, 0.0)
    assert Dropping.model.training


def test_ranking_accuracy_by_hand():
    # Scores chosen / rejected: 2 / 1 right, 0 / 1 wrong, 3 / 3 a tie; 9 / -9 is a filler.
    # The longer answer: chosen, neither, rejected -> (1 + 0.5 + 0) / 3.
    loader = [pairs([1.0, 1.0], [5, 3], [4, 3]), pairs([1.0, 0.0], [3, 9], [6, 2])]
    figures = ranking_accuracy(FixedScores([2.0, 0.0, 1.0, 1.0], [3.0, 9.0, 3.0, -9.0]), loader)
    scores = torch.tensor([2.0, 0.0, 3.0, 1.0, 1.0, 3.0])
    assert figures == pytest.approx(
        {
            "accuracy": 1.5 / 3,
            "longer_wins": 1.5 / 3,
            "chosen_score": 5 / 3,
            "rejected_score": 5 / 3,
            "margin": 0.0,
            "score_mean": scores.mean().item(),
            "score_std": scores.std(correction=0).item(),
            "accuracy_longer_chosen": 1.0,
            "accuracy_equal_length": 0.0,
            "accuracy_shorter_chosen": 0.5,
            "pairs_longer_chosen": 1,
            "pairs_equal_length": 1,
            "pairs_shorter_chosen": 1,
        },
        abs=1e-6,
    )


def test_calibration_by_hand():
    # sigma(|d|): d = 0 -> 0.5, a tie, which counts half; log 3 -> 0.75 twice, one of them wrong; 9 -> 0.9999.
    # -9 is a filler; of three ranked answers the pairs are 1-2 and 1-3, d = log 3 and 9.
    third, sure = math.log(3) + 1e-6, 1 / (1 + math.exp(-9))
    scores = [[0.0, third, 0.0, 9.0, 0.0, 0.0, 0.0, third, 0.0, 9.0], [9.0, 9.0 - third, 0.0]]
    loader = [pairs([1.0, 1.0, 1.0, 1.0, 0.0], [3] * 5, [3] * 5), rankings([1.0], [[1, 2, 2]], [[3, 3, 3]])]
    bins = [{"of": "an earlier evaluation"}]
    ranking_accuracy(FixedScores(*scores), loader, bins)
    expected = [(1, 0.5, 0.5), (3, 0.75, 2 / 3), (2, sure, 1.0)]
    assert [tuple(row.values()) for row in bins] == [pytest.approx(row, abs=1e-5) for row in expected]
    assert list(bins[0]) == ["pairs", "confidence", "accuracy"]


def test_pair_figures():
    chosen, rejected = torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([0.0, 2.0, 1.5, 1.5])
    figures = pair_figures(pair_sums(chosen, rejected, torch.tensor([3, 3, 9, 4]), torch.tensor([4, 5, 2, 2])))
    assert figures == {
        "accuracy": (1 + 0.5 + 0 + 1) / 4,
        "longer_wins": (0 + 0 + 1 + 1) / 4,
        "chosen_score": 2.0,
        "rejected_score": 1.25,
        "margin": 0.75,
        "accuracy_longer_chosen": (0 + 1) / 2,
        "accuracy_shorter_chosen": (1 + 0.5) / 2,
        "pairs_longer_chosen": 2.0,
        "pairs_shorter_chosen": 2.0,
        "pairs_equal_length": 0.0,  # and no accuracy of none
    }


def rankings(weight: list[float], ranks: list[list[int]], lengths: list[list[int]]) -> RankedBatch:
    flat = [n for row in lengths for n in row]
    return RankedBatch(
        input_ids=torch.ones(len(flat), max(flat), dtype=torch.long),
        lengths=torch.tensor(flat),
        prompt_lengths=torch.ones(len(flat), dtype=torch.long),
        row=torch.tensor([i for i, row in enumerate(ranks) for _ in row]),
        ranks=torch.tensor([rank for row in ranks for rank in row]),
        weight=torch.tensor(weight),
    )


def test_rankings_by_hand():
    # Row 1, ranks 1 2 2, scores 3 1 4: pairs 3 > 1 right, 3 > 4 wrong; its best answer is not the highest.
    # Row 2, ranks 1 2, scores 2 2: a tie, half; two highest, of which one is the best: half.
    # Row 3, ranks 1 1 2, scores 5 0 1: 5 > 1 right, 0 > 1 wrong; the highest is one of its two best.
    # The filler's scores count nowhere. Lengths: the better answer is longer, equal; shorter; longer, longer.
    loader = [
        rankings([1.0, 1.0], [[1, 2, 2], [1, 2]], [[4, 3, 4], [2, 5]]),
        rankings([1.0, 0.0], [[1, 1, 2], [1, 2, 3]], [[6, 5, 4], [2, 3, 9]]),
    ]
    scores = [[3.0, 1.0, 4.0, 2.0, 2.0], [5.0, 0.0, 1.0, -99.0, 99.0, 7.0]]
    figures = ranking_accuracy(FixedScores(*scores), loader)
    counted = torch.tensor([3.0, 1, 4, 2, 2, 5, 0, 1])
    assert figures == pytest.approx(
        {
            "accuracy": (1 + 0 + 0.5 + 1 + 0) / 5,
            "longer_wins": (1 + 0.5 + 0 + 1 + 1) / 5,
            "chosen_score": (3 + 3 + 2 + 5 + 0) / 5,
            "rejected_score": (1 + 4 + 2 + 1 + 1) / 5,
            "margin": (2 - 1 + 0 + 4 - 1) / 5,
            "score_mean": counted.mean().item(),
            "score_std": counted.std(correction=0).item(),
            "best_of_k_accuracy": (0 + 0.5 + 1) / 3,
            "best_of_k_chance": (1 / 3 + 1 / 2 + 2 / 3) / 3,
            "accuracy_longer_chosen": (1 + 1 + 0) / 3,
            "accuracy_shorter_chosen": 0.5,
            "accuracy_equal_length": 0.0,
            "pairs_longer_chosen": 3,
            "pairs_shorter_chosen": 1,
            "pairs_equal_length": 1,
        },
        abs=1e-6,
    )


def test_rankings_of_two_answers_have_the_figures_of_pairs():
    draw = random.Random(0)
    chosen, rejected = ([draw.choice([0.0, 1.0, 2.0]) for _ in range(20)] for _ in range(2))
    lengths = [[draw.randint(2, 5), draw.randint(2, 5)] for _ in range(20)]
    weight = [1.0] * 19 + [0.0]
    as_pairs = ranking_accuracy(FixedScores(chosen + rejected), [pairs(weight, *map(list, zip(*lengths, strict=True)))])
    flat = [score for both in zip(chosen, rejected, strict=True) for score in both]
    as_rankings = ranking_accuracy(FixedScores(flat), [rankings(weight, [[1, 2]] * 20, lengths)])
    assert as_rankings.pop("best_of_k_chance") == pytest.approx(0.5)
    assert as_rankings.pop("best_of_k_accuracy") == pytest.approx(as_pairs["accuracy"])
    assert as_rankings == pytest.approx(as_pairs)
