"""GRPO by hand."""

from __future__ import annotations

import math

import pytest
import torch

from remax.algorithms.grpo import GRPO, grpo_advantages
from remax.core.logprobs import PolicyOutput
from remax.core.rollout import Rollout
from remax.core.sequences import Sequences


def test_advantages_by_hand():
    reward = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])
    std = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2)
    expected = [-2 / (std + 1e-4), -1 / (std + 1e-4), 3 / (std + 1e-4), 0, 0, 0]
    assert grpo_advantages(reward, 3).tolist() == pytest.approx(expected, abs=1e-6)
    assert grpo_advantages(reward, 3, scale_by_std=False).tolist() == pytest.approx([-2, -1, 3, 0, 0, 0])


def test_rounding_is_no_spread():
    # The same answer three times: its score's last digits are of no account, and divided by their own std they would be
    reward = torch.tensor([4.0, 4.0 + 1e-6, 4.0 - 1e-6, 4.0, 4.001, 4.0])
    alike, apart = grpo_advantages(reward, 3).view(2, 3)
    assert alike.tolist() == [0.0, 0.0, 0.0]
    assert apart.abs().min() > 0.4


def test_loss_by_hand():
    # -(1/2) sum_i (1/T_i) sum_t ( A_i log pi - 0.04 k3 ),  k3 = exp(-k1) - 1 + k1,  d k3 / d log pi = 1 - exp(-k1)
    sequences = Sequences(torch.ones(2, 4, dtype=torch.long), torch.tensor([2, 2]), torch.tensor([2, 1]))
    logprobs = torch.tensor([[-0.5, -1.0], [-2.0, 0.0]], requires_grad=True)
    reference = torch.tensor([[-1.0, -1.2], [-1.9, 0.0]])
    algorithm = GRPO(samples_per_prompt=2, advantage_scaling="none")
    batch = algorithm.prepare(Rollout(sequences, torch.tensor([2.0, 1.0]), reference_logprobs=reference))
    loss, _ = algorithm.loss(batch, PolicyOutput(logprobs), algorithm.count(sequences))
    loss.backward()

    total, advantage = 0.0, [0.5, -0.5]
    for i, length in enumerate([2, 1]):
        for t in range(length):
            k1 = (logprobs[i, t] - reference[i, t]).item()
            total -= (advantage[i] * logprobs[i, t].item() - 0.04 * (math.exp(-k1) - 1 + k1)) / length / 2
            grad = -(advantage[i] - 0.04 * (1 - math.exp(-k1))) / length / 2
            assert logprobs.grad[i, t].item() == pytest.approx(grad, abs=1e-6)
    assert loss.item() == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("clip_on, expected", [("reward", [0.5, -0.5]), ("difference", [1.0, -1.0])])
def test_clip(clip_on, expected):
    sequences = Sequences(torch.ones(2, 2, dtype=torch.long), torch.tensor([1, 1]), torch.tensor([1, 1]))
    algorithm = GRPO(samples_per_prompt=2, advantage_scaling="none", clip_on=clip_on, clip_reward_value=1.0)
    prepared = algorithm.prepare(Rollout(sequences, torch.tensor([9.0, 0.0])))
    assert prepared.advantages[:, 0].tolist() == expected


def test_one_answer_has_no_group():
    with pytest.raises(ValueError, match="at least 2"):
        GRPO(samples_per_prompt=1)


def test_scaled_over_the_batch():
    # Two groups, 1, 3 and 2, 8: r - mean = -1, 1, -3, 3 with variance 5, whatever the spread of a group of its own
    sequences = Sequences(torch.ones(4, 3, dtype=torch.long), torch.full((4,), 2), torch.ones(4, dtype=torch.long))
    algorithm = GRPO(samples_per_prompt=2, advantage_scaling="batch", clip_reward_value=0.0)
    prepared = algorithm.prepare(Rollout(sequences, torch.tensor([1.0, 3.0, 2.0, 8.0])))
    assert prepared.advantages[:, 0].tolist() == pytest.approx([x / 5**0.5 for x in (-1, 1, -3, 3)])
