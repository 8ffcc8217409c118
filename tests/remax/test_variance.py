"""The variance meter: advantages under several baselines, and the gradient's variance from random projections."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Barrier

import pytest
import torch

from remax.variance import advantage_variances, gradient_variance, project

REWARDS = torch.tensor([1.0, 3.0, 2.0, 2.0])  # two prompts, two answers each
GREEDY = torch.tensor([1.0, 1.0, 2.0, 2.0])


def test_baselines_by_hand():
    figures = advantage_variances(REWARDS, GREEDY, samples_per_prompt=2, moving_average=1.5)
    assert figures == pytest.approx(
        {
            "variance/none": (1 + 9 + 4 + 4) / 4,
            "variance/mean": (1 + 1 + 0 + 0) / 4,  # around 2
            "variance/greedy": (0 + 4 + 0 + 0) / 4,
            "variance/leave_one_out": (4 + 4 + 0 + 0) / 4,
            "variance/moving_average": (0.25 + 2.25 + 0.25 + 0.25) / 4,
            "no_signal/greedy": 1 / 2,  # of the second prompt all answers score as the greedy one
            "no_signal/group": 1 / 2,
        }
    )


def test_only_what_is_at_hand_is_reported():
    assert set(advantage_variances(REWARDS)) == {"variance/none", "variance/mean"}
    assert set(advantage_variances(REWARDS, GREEDY)) == {
        "variance/none",
        "variance/mean",
        "variance/greedy",
        "no_signal/greedy",
    }


def test_two_ranks_give_the_figures_of_one():
    ranks, told = Barrier(2), {}

    def figures(rank: int) -> dict[str, float]:
        rows, call = slice(2 * rank, 2 * rank + 2), count()

        def sum_across_ranks(totals):
            step = next(call)
            told[step, rank] = {name: float(value) for name, value in totals.items()}
            ranks.wait(timeout=10)
            return {name: told[step, 0][name] + told[step, 1][name] for name in totals}

        return advantage_variances(REWARDS[rows], GREEDY[rows], 2, 1.5, sum_across_ranks)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(figures, range(2))
    assert first == second == pytest.approx(advantage_variances(REWARDS, GREEDY, 2, 1.5))


def test_a_projection_is_linear_and_repeatable():
    a, b = [torch.randn(3, 4), torch.randn(5)], [torch.randn(3, 4), None]
    both = [a[0] + b[0], a[1]]
    torch.testing.assert_close(project(both, 6, seed=1), project(a, 6, seed=1) + project(b, 6, seed=1))
    assert not torch.allclose(project(a, 6, seed=1), project(a, 6, seed=2))
    assert project([None, None], 6, seed=1).tolist() == [0.0] * 6


def test_a_missing_gradient_counts_as_zeros():
    a = torch.randn(5)
    torch.testing.assert_close(project([None, a], 4, seed=1), project([torch.zeros(2), a], 4, seed=1))


def test_gradient_variance_against_the_covariance():
    # E|g - E g|^2 of 60 estimates, over 150 projections
    generator = torch.Generator().manual_seed(0)
    gradients = 0.5 + torch.randn(60, 7, generator=generator) * torch.tensor([1.0, 2, 0.1, 0, 1, 3, 0.5])
    exact = gradients.var(0).sum().item()
    projections = torch.stack([project([g[:3], g[3:]], 150, seed=3) for g in gradients])
    measured = gradient_variance(projections)
    assert measured.variance == pytest.approx(exact, rel=0.1)
    assert 0 < measured.standard_error < 0.5 * exact
    signal = gradients.mean(0).square().sum().item() - exact / 60
    assert measured.signal == pytest.approx(signal, abs=0.5)


def test_equal_gradients_have_no_variance_and_full_signal():
    projections = project([torch.tensor([3.0, 4.0])], 2000, seed=0).repeat(3, 1)
    measured = gradient_variance(projections)
    assert measured.variance == 0
    assert measured.signal == pytest.approx(25, rel=0.15)
    with pytest.raises(ValueError, match="at least 2"):
        gradient_variance(projections[:1])
