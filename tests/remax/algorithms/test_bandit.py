"""Two answers of one token with rewards r1 > r2 and p = pi(first): the gradient's variance, by formula and enumeration.

A baseline b gives the variance p (1 - p) (d - b)^2 with d = r1 (1 - p) + r2 p, so b helps over b = 0 iff 0 < b < 2d.
"""

from __future__ import annotations

import pytest
import torch

from remax.algorithms.kl import KLPenalty
from remax.algorithms.reinforce import Reinforce
from remax.algorithms.remax import ReMax
from remax.core.logprobs import PolicyOutput
from remax.core.rollout import Rollout
from remax.core.sequences import Sequences

SEQUENCES = Sequences(torch.tensor([[2, 0], [2, 1]]), torch.tensor([1, 1]), torch.tensor([1, 1]))


def variance(algorithm, p: float, r1: float, r2: float) -> float:
    """Of d loss / d theta over the two answers; pi = softmax(theta, 0)."""
    rewards = torch.tensor([r1, r2], dtype=torch.float64)
    greedy = rewards[0 if p >= 0.5 else 1].repeat(2)
    prepared = algorithm.prepare(Rollout(SEQUENCES, rewards, greedy))
    theta = torch.tensor(p / (1 - p), dtype=torch.float64).log().requires_grad_()
    logpi = torch.stack([theta, torch.zeros_like(theta)]).log_softmax(0)
    grads = []
    for arm in range(2):
        batch = prepared.select(torch.tensor([arm]))
        loss, _ = algorithm.loss(batch, PolicyOutput(logpi[arm].view(1, 1)), 1)
        grads.append(torch.autograd.grad(loss, theta, retain_graph=True)[0].item())
    mean = p * grads[0] + (1 - p) * grads[1]
    assert mean == pytest.approx(-p * (1 - p) * (r1 - r2), abs=1e-12)  # of any baseline: the gradient of -E[r]
    return p * grads[0] ** 2 + (1 - p) * grads[1] ** 2 - mean**2


def reinforce() -> Reinforce:
    return Reinforce(gamma=1.0, kl=KLPenalty(0.0), clip_reward_value=0.0)


def remax() -> ReMax:
    return ReMax(gamma=1.0, kl=KLPenalty(0.0), clip_reward_value=0.0)


def centred(baseline: float) -> Reinforce:
    algorithm = Reinforce(gamma=1.0, kl=KLPenalty(0.0), clip_reward_value=0.0, baseline_decay=0.9)
    algorithm.moving_average = baseline
    return algorithm


GRID = [
    (p, r1, r2) for p in (0.05, 0.3, 0.49, 0.51, 0.6, 0.75, 0.95) for r1, r2 in ((1.0, 0.1), (1.0, 0.6), (3.0, 2.9))
]


@pytest.mark.parametrize("p, r1, r2", GRID)
def test_closed_form(p, r1, r2):
    d, greedy = r1 * (1 - p) + r2 * p, r1 if p >= 0.5 else r2
    for algorithm, b in [(reinforce(), 0.0), (remax(), greedy), (centred(0.7), 0.7)]:
        assert variance(algorithm, p, r1, r2) == pytest.approx(p * (1 - p) * (d - b) ** 2, abs=1e-12)


@pytest.mark.parametrize("p, r1, r2", GRID)
def test_when_the_greedy_baseline_helps(p, r1, r2):
    helps = p < 0.5 or p < 0.5 + 0.5 * r2 / (r1 - r2)
    assert (variance(remax(), p, r1, r2) < variance(reinforce(), p, r1, r2)) == helps


def test_it_can_hurt_eighteenfold():
    # p = .9, r = (1, .1): d = .19, so (.19 - 1)^2 / .19^2 = 18.2
    ratio = variance(remax(), 0.9, 1.0, 0.1) / variance(reinforce(), 0.9, 1.0, 0.1)
    assert ratio == pytest.approx((0.19 - 1) ** 2 / 0.19**2) and 18 < ratio < 19


def test_a_constant_added_to_the_reward_moves_only_reinforce():
    p, r1, r2 = 0.7, 1.0, 0.1
    plain, greedy, mean = ([], [], [])
    for constant in (0.0, 3.0, 30.0):
        a, b = r1 + constant, r2 + constant
        plain.append(variance(reinforce(), p, a, b))
        greedy.append(variance(remax(), p, a, b))
        mean.append(variance(centred(p * a + (1 - p) * b), p, a, b))  # the control
    assert plain[0] < plain[1] < plain[2]
    assert greedy == pytest.approx([greedy[0]] * 3, rel=1e-9)
    assert mean == pytest.approx([mean[0]] * 3, rel=1e-9)
