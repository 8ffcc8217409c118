"""Means over micro-batches and ranks: totals and counts are added up apart, and divided once."""

from __future__ import annotations

import pytest
import torch

from remax.core.sums import Figure, add, reduce


def test_a_mean_does_not_depend_on_the_cut():
    # Rewards 1, 2, 3 and 10 in parts of 3 and 1: (1 + 2 + 3 + 10) / 4, and not (2 + 10) / 2.
    first = {"reward": Figure(torch.tensor(6.0), 3), "loss": Figure(torch.tensor(0.5))}
    second = {
        "reward": Figure(torch.tensor(10.0), torch.tensor(1)),
        "loss": Figure(torch.tensor(1.5)),
        "new": Figure(2, 4),
    }
    both = add(first, second)
    assert reduce(both, steps=1) == {"reward": 4.0, "loss": 2.0, "new": 0.5}
    assert reduce(both, steps=4)["loss"] == 0.5 and reduce(both, steps=4)["reward"] == 4.0  # a share of each step
    assert first["reward"].total == 6.0  # the parts are left as they were


def test_ranks_are_added_before_the_division():
    # This rank has 1 answer of reward 8, the other one 3 of reward 0: the mean is 2, not 4.
    def two_ranks(values):
        other = {"total reward": 0.0, "count reward": 3.0, "total loss": 0.25}
        return {name: float(value) + other[name] for name, value in values.items()}

    found = reduce({"reward": Figure(8.0, 1), "loss": Figure(0.5)}, sum_across_ranks=two_ranks)
    assert found == {"reward": 2.0, "loss": 0.75}


def test_nothing_counted_is_zero():
    assert reduce({"kl": Figure(0.0, 0)}) == {"kl": 0.0}
    assert Figure(1.0, 2) + Figure(3.0, 4) == Figure(4.0, 6)
    assert (Figure(1.0) + Figure(3.0)).total == pytest.approx(4.0)
