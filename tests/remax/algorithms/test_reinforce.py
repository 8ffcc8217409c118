"""REINFORCE, plain and with a moving average that must not contain the answer it judges."""

from __future__ import annotations

import pytest
import torch

from remax.algorithms.reinforce import Reinforce
from remax.core.rollout import Rollout
from remax.core.sequences import Sequences


def rollout(*rewards: float) -> Rollout:
    n = len(rewards)
    sequences = Sequences(torch.ones(n, 3, dtype=torch.long), torch.full((n,), 2), torch.ones(n, dtype=torch.long))
    return Rollout(sequences, torch.tensor(rewards))


def advantages(algorithm: Reinforce, *rewards: float) -> list[float]:
    return algorithm.prepare(rollout(*rewards)).advantages[:, 0].tolist()


def test_plain():
    assert advantages(Reinforce(), 1.0, -2.0, 7.0) == [1.0, -2.0, 5.0]  # clipped at 5


def test_moving_average_is_of_earlier_steps():
    algorithm = Reinforce(baseline_decay=0.8, clip_reward_value=0.0)
    # First step: each against the mean of the others, (2+6)/2, (1+6)/2, (1+2)/2.
    assert advantages(algorithm, 1.0, 2.0, 6.0) == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])
    assert algorithm.moving_average == pytest.approx(3.0)
    assert advantages(algorithm, 5.0, 7.0) == pytest.approx([5 - 3, 7 - 3])
    assert algorithm.moving_average == pytest.approx(0.8 * 3 + 0.2 * 6)


def test_a_single_first_answer_has_nothing_to_be_compared_with():
    assert advantages(Reinforce(baseline_decay=0.8), 2.0) == [2.0]


def test_the_average_is_over_ranks():
    other = {"reward": 12.0, "rows": 2.0}  # what the second rank adds
    algorithm = Reinforce(
        baseline_decay=0.5,
        clip_reward_value=0.0,
        sum_across_ranks=lambda mine: {name: float(value) + other[name] for name, value in mine.items()},
    )
    # (1 + 3 + 12 - own) / 3
    assert advantages(algorithm, 1.0, 3.0) == pytest.approx([1 - 15 / 3, 3 - 13 / 3])
    assert algorithm.moving_average == pytest.approx(4.0)


def test_the_average_is_state():
    algorithm = Reinforce(baseline_decay=0.5)
    advantages(algorithm, 1.0, 2.0)
    resumed = Reinforce(baseline_decay=0.5)
    resumed.load_state_dict(algorithm.state_dict())
    assert resumed.moving_average == algorithm.moving_average == 1.5


def test_clip_on_the_reward():
    algorithm = Reinforce(baseline_decay=0.5, clip_on="reward", clip_reward_value=2.0)
    algorithm.moving_average = 3.0
    assert advantages(algorithm, 5.0, 1.0) == [0.0, -1.0]  # clip(5) - clip(3), 1 - clip(3)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="baseline_decay"):
        Reinforce(baseline_decay=decay)


def test_scaled_over_the_batch():
    # (r - mean) / deviation of the answers' tokens, here one each: 1, 2, 6 have mean 3 and variance 14/3
    scaled = advantages(Reinforce(advantage_scaling="batch", clip_reward_value=0.0), 1.0, 2.0, 6.0)
    assert scaled == pytest.approx([x / (14 / 3) ** 0.5 for x in (-2, -1, 3)])
