"""RLOO by hand; where its KL acts."""

from __future__ import annotations

import pytest
import torch

from remax.algorithms.kl import KLPenalty
from remax.algorithms.rloo import RLOO, rloo_advantages
from remax.core.logprobs import PolicyOutput
from remax.core.rollout import Rollout
from remax.core.sequences import Sequences

OLD = torch.tensor([[-0.5, -1.0], [-2.0, 0.0]])
REFERENCE = torch.tensor([[-1.0, -1.2], [-1.9, 0.0]])  # k1: 0.5, 0.2 and -0.1


def rollout() -> Rollout:
    sequences = Sequences(torch.ones(2, 4, dtype=torch.long), torch.tensor([2, 2]), torch.tensor([2, 1]))
    return Rollout(sequences, torch.tensor([2.0, 9.0]), reference_logprobs=REFERENCE, old_logprobs=OLD)


def test_advantages_by_hand():
    returns = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    expected = [1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3.0]
    assert rloo_advantages(returns, 3).tolist() == pytest.approx(expected)


def test_kl_is_part_of_the_return():
    # R = (2 - 0.1 * 0.7, clip(9) + 0.1 * 0.1)
    algorithm = RLOO(samples_per_prompt=2)
    assert algorithm.needs_old_logprobs
    prepared = algorithm.prepare(rollout())
    difference = (2 - 0.07) - (5 + 0.01)
    assert prepared.advantages[:, 0].tolist() == pytest.approx([difference, -difference])

    logprobs = OLD.clone().requires_grad_()
    loss, metrics = algorithm.loss(prepared, PolicyOutput(logprobs), 2)
    loss.backward()
    expected = torch.tensor([[-difference, -difference], [difference, 0.0]]) / 2  # the same for every token
    torch.testing.assert_close(logprobs.grad, expected)
    assert float(metrics["kl"].total) == pytest.approx(0.6)


def test_one_step_kl_acts_on_its_token_instead():
    algorithm = RLOO(kl=KLPenalty(0.1, reach="one_step"), samples_per_prompt=2)
    assert not algorithm.needs_old_logprobs
    logprobs = OLD.clone().requires_grad_()
    loss, _ = algorithm.loss(algorithm.prepare(rollout()), PolicyOutput(logprobs), 2)
    loss.backward()
    expected = -torch.tensor([[2 - 5 - 0.05, 2 - 5 - 0.02], [5 - 2 + 0.01, 0.0]]) / 2
    torch.testing.assert_close(logprobs.grad, expected)


def test_clip_on_the_difference():
    algorithm = RLOO(kl=KLPenalty(0.0), samples_per_prompt=2, clip_on="difference")
    assert algorithm.prepare(rollout()).advantages[:, 0].tolist() == [-5.0, 5.0]  # clip(2 - 9), clip(9 - 2)


def test_refusals():
    with pytest.raises(ValueError, match="at least 2"):
        RLOO(samples_per_prompt=1)
    with pytest.raises(ValueError, match="use k1"):
        RLOO(kl=KLPenalty(0.1, "full", "reward", "full_step"))


def three(lengths: list[int], rewards: list[float], old: torch.Tensor | None = None) -> Rollout:
    sequences = Sequences(torch.ones(3, 2 + max(lengths), dtype=torch.long), torch.full((3,), 2), torch.tensor(lengths))
    return Rollout(sequences, torch.tensor(rewards), old_logprobs=old)


def test_others_by_their_lengths():
    # Against (T_j R_j + T_k R_k) / (T_j + T_k), here with T = 1, 3, 2
    algorithm = RLOO(kl=KLPenalty(0.0), samples_per_prompt=3, baseline="length_weighted", clip_reward_value=0.0)
    assert not algorithm.needs_old_logprobs
    expected = [2 - (3 * 8 + 2 * 4) / 5, 8 - (2 + 2 * 4) / 3, 4 - (2 + 3 * 8) / 4]
    advantages = algorithm.prepare(three([1, 3, 2], [2.0, 8.0, 4.0])).advantages
    assert advantages[:, 0].tolist() == pytest.approx(expected)
    algorithm.clip_reward_value, algorithm.clip_on = 1.0, "difference"
    assert algorithm.prepare(three([1, 3, 2], [2.0, 8.0, 4.0])).advantages[:, 0].tolist() == [-1, 1, -1]


def test_others_by_how_unsure_they_were_up_to_a_token():
    # 1 - p = 1/2 | 1/4, 3/4 | 1, 0;  W = 1/2, 1/2 | 1/4, 1 | 1, 1: the first has ended, and keeps its weight
    old = torch.tensor([[0.5, 0.9], [0.75, 0.25], [1e-30, 1.0]]).log()
    algorithm = RLOO(kl=KLPenalty(0.0), samples_per_prompt=3, baseline="token_weighted", clip_reward_value=0.0)
    assert algorithm.needs_old_logprobs
    advantages = algorithm.prepare(three([1, 2, 2], [2.0, 8.0, 4.0], old)).advantages
    expected = [
        [2 - (8 / 4 + 4) / (5 / 4), 2 - (8 + 4) / 2],
        [8 - (2 / 2 + 4) / (3 / 2), 8 - (2 / 2 + 4) / (3 / 2)],
        [4 - (2 / 2 + 8 / 4) / (3 / 4), 4 - (2 / 2 + 8) / (3 / 2)],
    ]
    torch.testing.assert_close(advantages, torch.tensor(expected), atol=1e-5, rtol=0)
    sure = algorithm.prepare(three([1, 1, 1], [2.0, 8.0, 4.0], torch.zeros(3, 1))).advantages
    assert sure[:, 0].tolist() == pytest.approx([2 - 6, 8 - 3, 4 - 5])  # no weight at all: the plain mean


def test_scaled_over_the_batch():
    # Advantages 3/2 (r - mean): -4, 5, -1 of answers of 1, 3, 2 tokens; over 6 tokens mean 3/2, mean square 93/6
    algorithm = RLOO(kl=KLPenalty(0.0), samples_per_prompt=3, advantage_scaling="batch", clip_reward_value=0.0)
    advantages = algorithm.prepare(three([1, 3, 2], [2.0, 8.0, 4.0])).advantages
    deviation = (93 / 6 - 1.5**2) ** 0.5
    assert advantages[:, 0].tolist() == pytest.approx([(x - 1.5) / deviation for x in (-4, 5, -1)])
    for settings, words in (
        ({"baseline": "greedy"}, "choose others, length_weighted or token_weighted"),
        ({"advantage_scaling": "group"}, "rloo with advantage_scaling 'group'; choose none or batch"),
    ):
        with pytest.raises(ValueError, match=words):
            RLOO(**settings)
