"""Scores by subset as RewardBench tells them, worked out by hand."""

import math

import pytest

from remax.evaluation.subsets import Scored, subset_figures, ties_score


def test_the_best_answer_must_be_right():
    rows = [Scored("1", [2.0], [1.0, 0.0, -1.0]), Scored("2", [2.0], [2.0, 0.0, 2.0]), Scored("3", [0.0], [1.0])]
    assert subset_figures({"Math": rows}) == {"Math": pytest.approx((1 + 1 / 3 + 0) / 3)}


TIED = Scored("tied:7", [3.0, 2.5], [1.0, 0.0])  # margin 1.5, spread 0.5
ONE = Scored("ref:7", [3.0], [2.0])  # margin 1


def test_ties():
    # All shares are 1; the smaller margin is 1, so the last term is tanh(1 / 0.5 - 1).
    expected = 0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(1.0)
    assert ties_score([TIED, ONE]) == pytest.approx(expected)
    assert subset_figures({"Ties": [TIED, ONE]}) == {"Ties": pytest.approx(expected)}
    # Right answers further apart than from the wrong one, and a question with one right answer that is wrong.
    far = Scored("tied:8", [5.0, 2.0], [1.0])  # margin 1, spread 3
    wrong = Scored("ref:8", [0.0], [1.0])  # margin -1
    ratio = (math.tanh(1.0) + math.tanh(-1 / 3 - 1)) / 2
    expected = 0.3 + 0.3 / 2 + 0.2 / 2 + 0.2 / 2 + 0.01 * ratio
    assert ties_score([TIED, ONE, far, wrong]) == pytest.approx(expected)
    # A question that comes in one way only counts for its accuracy alone.
    assert ties_score([TIED]) == pytest.approx(0.3)
    assert ties_score([ONE]) == pytest.approx(0.3)


def test_a_subset_called_ties_without_its_ids_is_like_any_other():
    assert subset_figures({"ties": [Scored("1", [2.0, 0.0], [1.0])]}) == {"ties": 1.0}
