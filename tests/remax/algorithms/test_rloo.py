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
