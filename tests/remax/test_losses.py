"""Supervised, ranking and direct preference losses by hand."""

from __future__ import annotations

import math

import pytest
import torch

from remax.losses import answer_logprob, dpo_losses, ranking_loss, ranking_losses, supervised_loss
from remax.sequences import length_mask

MASK = length_mask(torch.tensor([3, 1]), 3)
LOGPROBS = torch.tensor([[-0.5, -1.0, -1.5], [-2.0, float("nan"), -9.0]])


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_supervised_loss_is_the_mean_over_answer_tokens():
    # -(-0.5 - 1 - 1.5 - 2) / 4
    logprobs = LOGPROBS.clone().requires_grad_()
    loss = supervised_loss(logprobs, MASK, MASK.sum())
    assert loss.item() == pytest.approx(5 / 4)
    loss.backward()
    assert logprobs.grad.tolist() == [[-0.25, -0.25, -0.25], [-0.25, 0, 0]]


def test_supervised_loss_does_not_depend_on_the_cut():
    rows = [supervised_loss(LOGPROBS[i : i + 1], MASK[i : i + 1], 4) for i in range(2)]
    assert sum(rows).item() == pytest.approx(5 / 4)


def test_answer_logprob():
    assert answer_logprob(LOGPROBS, MASK).tolist() == [-3.0, -2.0]


def test_ranking_loss_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.2, 3.0])
    expected = [-log_sigmoid(0.8), -log_sigmoid(-3.0)]
    assert ranking_losses(chosen, rejected).tolist() == pytest.approx(expected)
    assert ranking_loss(chosen, rejected).item() == pytest.approx(sum(expected) / 2)
    assert ranking_loss(chosen, rejected, denominator=8).item() == pytest.approx(sum(expected) / 8)
    margin = torch.tensor([0.5, 1.0])
    with_margin = [-log_sigmoid(0.3), -log_sigmoid(-4.0)]
    assert ranking_losses(chosen, rejected, margin).tolist() == pytest.approx(with_margin)


def test_ranking_loss_of_far_apart_scores_is_finite():
    assert ranking_losses(torch.tensor([-500.0]), torch.tensor([500.0])).item() == pytest.approx(1000.0)


def test_label_smoothing_and_centring_by_hand():
    chosen, rejected = torch.tensor([1.0]), torch.tensor([0.2])
    # .9 * -log sigmoid(.8) + .1 * -log sigmoid(-.8)
    smoothed = -0.9 * log_sigmoid(0.8) - 0.1 * log_sigmoid(-0.8)
    assert ranking_losses(chosen, rejected, label_smoothing=0.1).item() == pytest.approx(smoothed)
    # -log sigmoid(.8) + .5 * (1 + .2)^2
    centred = -log_sigmoid(0.8) + 0.5 * 1.44
    assert ranking_losses(chosen, rejected, centring=0.5).item() == pytest.approx(centred)


def test_dpo_by_hand():
    # -log sigmoid( 0.5 * ((-3 + 4) - (-6 + 5)) ), the second pair reversed
    args = [torch.tensor(x) for x in ([-3.0, -6.0], [-6.0, -3.0], [-4.0, -5.0], [-5.0, -4.0])]
    expected = [-log_sigmoid(0.5 * 2), -log_sigmoid(-0.5 * 2)]
    assert dpo_losses(*args, beta=0.5).tolist() == pytest.approx(expected)


def test_dpo_of_the_reference_itself_is_log_two():
    same = torch.tensor([-3.0]), torch.tensor([-7.0])
    assert dpo_losses(*same, *same).item() == pytest.approx(math.log(2))


def test_r_dpo_adds_the_length_difference():
    # -log sigmoid( 0.5 * 2 + 0.1 * (30 - 10) ): of a longer chosen answer less is asked
    args = [torch.tensor([x]) for x in (-3.0, -6.0, -4.0, -5.0)]
    lengths = {"chosen_lengths": torch.tensor([30]), "rejected_lengths": torch.tensor([10])}
    loss = dpo_losses(*args, beta=0.5, alpha=0.1, **lengths)
    assert loss.item() == pytest.approx(-log_sigmoid(0.5 * 2 + 0.1 * 20))
    assert dpo_losses(*args, beta=0.5, alpha=0.0, **lengths).item() == pytest.approx(-log_sigmoid(1.0))
    with pytest.raises(ValueError, match="lengths"):
        dpo_losses(*args, alpha=0.1)
