"""The KL costs, how they enter advantage and loss, the adaptive coefficient, and the flags' names for all of it."""

from __future__ import annotations

import math

import pytest
import torch

from remax.algorithms import ALGORITHMS
from remax.algorithms.kl import ESTIMATORS, PENALTIES, KLPenalty, build_penalty, reverse_cumsum, token_kl
from remax.core.sequences import length_mask

LENGTHS = torch.tensor([3, 1])
MASK = length_mask(LENGTHS, 3)
COSTS = torch.tensor([[0.3, -0.1, 0.5], [0.2, 99.0, 99.0]])  # what stands behind an answer must not matter


def test_token_kl_by_hand():
    logp, logq = torch.tensor([[-1.0]]), torch.tensor([[-1.5]])  # k1 = 0.5
    assert token_kl(logp, logq, "k1").item() == pytest.approx(0.5)
    assert token_kl(logp, logq, "k2").item() == pytest.approx(0.125)
    assert token_kl(logp, logq, "k3").item() == pytest.approx(math.exp(-0.5) - 1 + 0.5)
    assert token_kl(logp, logq, "bregman").item() == pytest.approx(math.exp(0.5) - 1 - 0.5)
    pi, rho, m = math.exp(-1.0), math.exp(-1.5), (math.exp(-1.0) + math.exp(-1.5)) / 2
    js = (math.log(pi / m) + rho / pi * math.log(rho / m)) / 2
    assert token_kl(logp, logq, "js").item() == pytest.approx(js, abs=1e-7)
    for x, y in [(logp, logq), (logq, logp)]:  # the larger probability is above the mean, the other is not
        assert token_kl(x, y, "clamped_js").item() == pytest.approx(math.log(pi / m) / 2, abs=1e-7)
    full = torch.tensor([[0.7]])
    assert token_kl(logp, None, "full", full) is full


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_cost_nothing_and_far_ones_a_number(estimator):
    k1 = torch.tensor([[0.0, 30.0, -30.0]], requires_grad=True)
    costs = token_kl(k1, torch.zeros(1, 3), estimator, k1.abs())
    assert costs[0, 0].item() == 0 and costs.isfinite().all()
    (gradient,) = torch.autograd.grad(costs.sum(), k1)
    assert gradient.isfinite().all()
    if estimator != "k1":
        assert gradient[0, 0].item() == pytest.approx(0, abs=1e-6) and (costs > -1e-6).all()
    if estimator == "clamped_js":
        assert costs.max().item() == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "full"])
def test_a_penalty_without_reference_says_so(estimator):
    with pytest.raises(ValueError, match="reference"):
        token_kl(torch.zeros(1, 1), None, estimator)
    with pytest.raises(ValueError, match="full_kl"):
        token_kl(torch.zeros(1, 1), torch.zeros(1, 1), "full")


def test_reverse_cumsum_against_a_loop():
    x = torch.randn(3, 5)
    for b in range(3):
        for t in range(5):
            assert reverse_cumsum(x)[b, t].item() == pytest.approx(sum(x[b, t:].tolist()), abs=1e-6)


@pytest.mark.parametrize(
    "kl, expected",
    [
        # 2 * c_t
        (KLPenalty(2.0, reach="one_step"), [[0.6, -0.2, 1.0], [0.4, 0, 0]]),
        # 2 * (0.3 - 0.1 + 0.5), 2 * (-0.1 + 0.5), 2 * 0.5
        (KLPenalty(2.0, reach="full_step"), [[1.4, 0.8, 1.0], [0.4, 0, 0]]),
        # the same without c_t itself: -0.1 + 0.5, 0.5, 0
        (KLPenalty(2.0, "full", "loss", "full_step"), [[0.8, 1.0, 0.0], [0, 0, 0]]),
        (KLPenalty(2.0, "k3", "loss", "full_step"), [[1.4, 0.8, 1.0], [0.4, 0, 0]]),
        (KLPenalty(2.0, "k3", "loss", "one_step"), [[0, 0, 0], [0, 0, 0]]),
        # 2 * c_t / T
        (KLPenalty(2.0, reach="one_step", normalize=True), [[0.2, -0.2 / 3, 1 / 3], [0.4, 0, 0]]),
        # 2 * (1 + 0.7) / 3 for every token, and 2 * (1 + 0.2) / 1
        (KLPenalty(2.0, reach="full_step", normalize=True), [[3.4 / 3, 3.4 / 3, 3.4 / 3], [2.4, 0, 0]]),
        # no 1 for the others, whose local term is in the loss
        (KLPenalty(2.0, "full", "loss", "full_step", normalize=True), [[1.4 / 3, 1.4 / 3, 1.4 / 3], [0.4, 0, 0]]),
    ],
    ids=lambda x: f"{x.estimator}-{x.where}-{x.reach}-{x.normalize}" if isinstance(x, KLPenalty) else "",
)
def test_what_the_advantage_loses(kl, expected):
    costs = COSTS.clone().requires_grad_()
    penalty = kl.in_advantage(costs, MASK)
    torch.testing.assert_close(penalty, torch.tensor(expected, dtype=torch.float32))
    assert not penalty.requires_grad


def test_what_the_loss_gains():
    costs = COSTS.clone().requires_grad_()
    assert KLPenalty(2.0).in_loss(costs, MASK).eq(0).all()
    in_loss = KLPenalty(2.0, "k2", "loss").in_loss(costs, MASK)
    torch.testing.assert_close(in_loss[MASK], 2 * COSTS[MASK])
    assert in_loss.requires_grad
    per_length = KLPenalty(2.0, "k2", "loss", normalize=True).in_loss(costs, MASK)
    torch.testing.assert_close(per_length[0], 2 * COSTS[0] / 3)


def test_per_answer_sums():
    torch.testing.assert_close(KLPenalty(2.0).per_answer(COSTS, MASK), torch.tensor([1.4, 0.4]))
    torch.testing.assert_close(KLPenalty(2.0, normalize=True).per_answer(COSTS, MASK), torch.tensor([3.4 / 3, 2.4]))


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"estimator": "k1", "where": "loss"}, "k1 in the loss"),
        ({"estimator": "full", "where": "reward", "reach": "one_step"}, "full-vocabulary"),
        ({"estimator": "k4"}, "k1, k2, k3, bregman, js, clamped_js, full"),
        ({"where": "critic"}, "reward, loss"),
        ({"reach": "two_step"}, "one_step, full_step"),
        ({"coefficient": -0.1}, "negative"),
        ({"coefficient": 0.0, "target": 6.0}, "starting coefficient"),
        ({"target": -1.0}, "target"),
        ({"target": 6.0, "horizon": 0}, "horizon"),
    ],
)
def test_penalties_that_cannot_act_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        KLPenalty(**settings)


def test_adaptive_coefficient_moves_towards_its_target():
    # beta * (1 + clip(kl / target - 1, -.2, .2) * answers / horizon)
    kl = KLPenalty(0.1, target=6.0, horizon=1000)
    kl.update(6.6, 100)
    assert kl.coefficient == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    kl.coefficient = 0.1
    kl.update(60.0, 100)
    assert kl.coefficient == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    kl.coefficient = 0.1
    kl.update(0.0, 100)
    assert kl.coefficient == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    fixed = KLPenalty(0.1)
    fixed.update(60.0, 100)
    assert fixed.coefficient == 0.1


@pytest.mark.parametrize(
    "algo, flags, estimator, where, reach, coefficient",
    [
        ("remax", {}, "k1", "reward", "one_step", 0.1),  # the authors' code
        ("remax", {"penalty": "full_step", "kl_ctl": 0.01}, "k1", "reward", "full_step", 0.01),
        ("remax", {"penalty": "none"}, "k1", "reward", "one_step", 0.0),
        ("remax", {"penalty": "full_kl_one_step"}, "full", "loss", "one_step", 0.1),
        ("remax", {"penalty": "full_kl_full_step"}, "full", "loss", "full_step", 0.1),
        ("remax", {"penalty": "full_kl_full_step", "kl_in": "reward"}, "full", "reward", "full_step", 0.1),
        ("remax", {"kl_estimator": "k3"}, "k3", "loss", "one_step", 0.1),
        ("remax", {"kl_estimator": "js", "penalty": "full_step"}, "js", "loss", "full_step", 0.1),
        ("ppo", {"kl_estimator": "clamped_js", "kl_in": "reward"}, "clamped_js", "reward", "full_step", 0.1),
        ("rloo", {}, "k1", "reward", "full_step", 0.1),
        ("grpo", {}, "k3", "loss", "one_step", 0.04),
        ("grpo", {"kl_estimator": "k1"}, "k1", "reward", "one_step", 0.04),
        ("grpo", {"penalty": "full_step"}, "k3", "loss", "full_step", 0.04),
        ("ppo", {}, "k1", "reward", "full_step", 0.1),
    ],
)
def test_flags_to_penalty(algo, flags, estimator, where, reach, coefficient):
    kl = build_penalty(ALGORITHMS[algo]().kl, **flags)
    assert (kl.estimator, kl.where, kl.reach, kl.coefficient) == (estimator, where, reach, coefficient)


def test_older_names_mean_what_they_say():
    names = {"kl": "full_step", "kl_onestep": "one_step", "full_kl": "full_step", "full_kl_onestep": "one_step"}
    for name, reach in names.items():
        assert PENALTIES[name] == ("full" if "full" in name else "k1", reach)


@pytest.mark.parametrize(
    "flags, reason",
    [
        ({"penalty": "two_step"}, "one_step"),
        ({"penalty": "full_kl_one_step", "kl_estimator": "k3"}, "full"),
        ({"kl_estimator": "k1", "kl_in": "loss"}, "expected gradient zero"),
    ],
)
def test_contradicting_flags_are_refused(flags, reason):
    with pytest.raises(ValueError, match=reason):
        build_penalty(KLPenalty(), **flags)


def test_adaptive_flags_arrive():
    kl = build_penalty(KLPenalty(), kl_target=4.0, kl_horizon=77, normalize_kl=True)
    assert (kl.target, kl.horizon, kl.normalize) == (4.0, 77, True)
