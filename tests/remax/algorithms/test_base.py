"""Clipping, discount, groups, aggregation and metrics, by hand and against slow loops."""

from __future__ import annotations

import pytest
import torch

from remax.algorithms.kl import KLPenalty
from remax.algorithms.remax import ReMax
from remax.algorithms.terms import (
    aggregate,
    clip,
    clipped_difference,
    discount,
    grouped,
    leave_one_out_mean,
    token_advantages,
)
from remax.core.logprobs import PolicyOutput
from remax.core.rollout import Rollout
from remax.core.sequences import Sequences, length_mask

MASK = length_mask(torch.tensor([3, 1]), 3)


def test_clip_and_where_it_acts():
    x = torch.tensor([-7.0, 2.0, 6.0])
    assert clip(x, 5.0).tolist() == [-5, 2, 5]
    assert clip(x, 0.0).tolist() == [-7, 2, 6]  # 0: no limit
    reward, baseline = torch.tensor([9.0]), torch.tensor([-1.0])
    assert clipped_difference(reward, baseline, 5.0, "difference").item() == 5.0  # clip(9 + 1)
    assert clipped_difference(reward, baseline, 5.0, "reward").item() == 6.0  # clip(9) - clip(-1)


def test_discount_counts_the_tokens_left():
    # exponent T - t + 1: 1 at the last token
    expected = [[0.9**3, 0.9**2, 0.9], [0.9, 0, 0]]
    torch.testing.assert_close(discount(MASK, 0.9, torch.float32), torch.tensor(expected))
    assert discount(MASK, 1.0, torch.float32).equal(MASK.float())


def test_token_advantages_by_hand():
    advantage, penalty = torch.tensor([[1.5], [-2.0]]), torch.full((2, 3), 0.03) * MASK
    expected = [[0.99**3 * 1.5 - 0.03, 0.99**2 * 1.5 - 0.03, 0.99 * 1.5 - 0.03], [0.99 * -2.0 - 0.03, 0, 0]]
    torch.testing.assert_close(token_advantages(advantage, MASK, 0.99, penalty), torch.tensor(expected))


def test_leave_one_out_against_a_loop():
    x = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 8.0])
    means = []
    for start in (0, 3):
        group = x[start : start + 3].tolist()
        means += [(sum(group) - own) / 2 for own in group]
    assert leave_one_out_mean(x, 3).tolist() == pytest.approx(means)
    with pytest.raises(ValueError, match="6 answers cannot be groups of 4"):
        grouped(x, 4)


@pytest.mark.parametrize(
    "aggregation, expected",
    [("sequence", (1 + 2 + 3 + 8) / 2), ("token", (1 + 2 + 3 + 8) / 4), ("sequence_mean", ((1 + 2 + 3) / 3 + 8) / 2)],
)
def test_aggregation_by_hand(aggregation, expected):
    x = torch.tensor([[1.0, 2.0, 3.0], [8.0, float("nan"), float("inf")]])  # what stands behind answers is ignored
    algorithm = ReMax(gamma=1.0, loss_aggregation=aggregation)
    sequences = Sequences(torch.zeros(2, 5, dtype=torch.long), torch.tensor([2, 1]), torch.tensor([3, 1]))
    assert aggregate(x, MASK, aggregation, algorithm.count(sequences)).item() == pytest.approx(expected)


def rollout_of_two() -> Rollout:
    sequences = Sequences(torch.ones(2, 5, dtype=torch.long), torch.tensor([2, 1]), torch.tensor([3, 1]))
    return Rollout(
        sequences,
        rewards=torch.tensor([2.0, 1.0]),
        baseline=torch.tensor([0.5, 4.0]),
        reference_logprobs=torch.tensor([[-1.0, -2.0, -1.5], [-0.7, 0.0, 0.0]]),
    )


def test_metrics_are_sums():
    logprobs = torch.tensor([[-0.5, -1.0, -2.0], [-0.2, 0.0, 0.0]], requires_grad=True)
    entropy = torch.tensor([[0.1, 0.2, 0.3], [0.4, 9.0, 9.0]])
    algorithm = ReMax(gamma=1.0, kl=KLPenalty(0.0))
    _, metrics = algorithm.loss(algorithm.prepare(rollout_of_two()), PolicyOutput(logprobs, entropy), 2)
    # (sum, what it is divided by): 2 answers, 4 answer tokens.
    found = {name: (float(figure.total), float(figure.count)) for name, figure in metrics.items() if name != "loss"}
    assert found["kl"] == pytest.approx((0.5 + 1.0 - 0.5 + 0.5, 2))
    assert found["entropy"] == pytest.approx((1.0, 4))
    assert found["advantage"] == pytest.approx((3 * 1.5 - 3.0, 4))
    assert found["advantage_square"] == pytest.approx((3 * 1.5**2 + 9.0, 4))
    assert metrics["loss"].count is None


def test_a_regulariser_without_gradient_is_refused():
    logprobs = torch.zeros(2, 3, requires_grad=True)
    with_entropy = ReMax(entropy_coef=0.1)
    batch = with_entropy.prepare(rollout_of_two())
    with pytest.raises(ValueError, match="entropy"):
        with_entropy.loss(batch, PolicyOutput(logprobs, torch.zeros(2, 3)), 2)
    with_full = ReMax(kl=KLPenalty(0.1, "full", "loss"))
    with pytest.raises(ValueError, match="gradient"):
        with_full.loss(batch, PolicyOutput(logprobs, None, torch.zeros(2, 3)), 2)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"clip_on": "value"}, "reward or difference"),
        ({"loss_aggregation": "mean"}, "sequence, token"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": 1.1}, "gamma"),
        ({"clip_reward_value": -1.0}, "clip_reward_value"),
    ],
)
def test_settings_out_of_range(settings, reason):
    with pytest.raises(ValueError, match=reason):
        ReMax(**settings)


def test_an_adaptive_coefficient_is_state_and_a_fixed_one_is_not():
    adaptive = ReMax(kl=KLPenalty(0.1, target=6.0))
    adaptive.update(12.0, 1000.0)
    assert adaptive.kl.coefficient == pytest.approx(0.1 * 1.02)
    resumed = ReMax(kl=KLPenalty(0.1, target=6.0))
    resumed.load_state_dict(adaptive.state_dict())
    assert resumed.kl.coefficient == adaptive.kl.coefficient
    fixed = ReMax(kl=KLPenalty(0.3))
    fixed.update(12.0, 1000.0)
    fixed.load_state_dict(adaptive.state_dict())
    assert fixed.kl.coefficient == 0.3


def test_a_constant_length_divides_the_sums():
    # Dr. GRPO: sums over tokens, divided by 2 answers of at most 5 tokens
    sequences = Sequences(torch.ones(2, 4, dtype=torch.long), torch.tensor([1, 1]), torch.tensor([3, 1]))
    algorithm = ReMax(loss_aggregation="constant", longest_answer=5)
    per_token = torch.tensor([[1.0, 2.0, 4.0], [8.0, 99.0, 99.0]])
    loss = aggregate(per_token, MASK, "constant", algorithm.count(sequences))
    assert loss.item() == pytest.approx((1 + 2 + 4 + 8) / 10)
    with pytest.raises(ValueError, match="longest_answer is 0"):
        ReMax(longest_answer=0)
