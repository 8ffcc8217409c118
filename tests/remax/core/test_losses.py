"""Supervised, ranking and direct preference losses by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from remax.core.losses import (
    answer_logprob,
    dpo_losses,
    ordered_pairs,
    pairwise_losses,
    plackett_luce_losses,
    ranking_loss,
    ranking_losses,
    supervised_loss,
)
from remax.core.sequences import length_mask

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


RANKINGS = [[1, 2, 3, 4], [1, 2], [1, 1, 2, 3, 3], [2, 1, 3], [1, 2, 2]]
ROW = torch.tensor([i for i, ranks in enumerate(RANKINGS) for _ in ranks])
RANKS = torch.tensor([rank for ranks in RANKINGS for rank in ranks])


def random_scores(scale: float = 2.0) -> torch.Tensor:
    noise = torch.randn(len(ROW), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return scale * noise


def by_row(scores: torch.Tensor):
    """The scores and ranks of one row after the other."""
    for i, ranks in enumerate(RANKINGS):
        yield scores[ROW == i].tolist(), ranks


def test_ordered_pairs_are_all_pairs_of_a_row_without_its_ties():
    better, worse = ordered_pairs(ROW, RANKS)
    found = sorted(zip(better.tolist(), worse.tolist(), strict=True))
    n = range(len(ROW))
    assert found == [(i, j) for i in n for j in n if ROW[i] == ROW[j] and RANKS[i] < RANKS[j]]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("centring", [0.0, 0.3])
def test_pairwise_losses_are_means_over_a_rows_pairs(label_smoothing, centring):
    # 1 / pairs * sum over ordered pairs of (1 - e) * -log s(d) + e * -log s(-d) + c * (r_i + r_j)^2, d = r_i - r_j
    scores, expected = random_scores(), []
    for row, ranks in by_row(scores):
        terms = [
            -(1 - label_smoothing) * log_sigmoid(row[i] - row[j])
            - label_smoothing * log_sigmoid(row[j] - row[i])
            + centring * (row[i] + row[j]) ** 2
            for i in range(len(row))
            for j in range(len(row))
            if ranks[i] < ranks[j]
        ]
        expected.append(sum(terms) / len(terms))
    found = pairwise_losses(scores, ROW, RANKS, len(RANKINGS), label_smoothing=label_smoothing, centring=centring)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def choices(scores: list[float], order: list[int]) -> float:
    """Probability that Plackett-Luce draws the answers in this order: each among those that are left."""
    probability, left = 1.0, list(order)
    while left:
        weights = [math.exp(scores[k]) for k in left]
        probability *= weights[0] / sum(weights)
        left = left[1:]
    return probability


def test_plackett_luce_is_the_likelihood_of_the_ranking():
    scores = random_scores()
    found = plackett_luce_losses(scores, ROW, RANKS, len(RANKINGS))
    for loss, (row, ranks) in zip(found.tolist(), by_row(scores), strict=True):
        if len(set(ranks)) == len(ranks):
            order = sorted(range(len(row)), key=lambda k: ranks[k])
            assert loss == pytest.approx(-math.log(choices(row, order)), abs=1e-12)
    # The orders of all answers are everything that can happen.
    row = [0.3, -1.0, 2.0, 0.7]
    every = [
        plackett_luce_losses(torch.tensor(row).double(), torch.zeros(4, dtype=torch.long), torch.tensor(ranks), 1)
        for ranks in itertools.permutations([1, 2, 3, 4])
    ]
    assert sum(math.exp(-loss.item()) for loss in every) == pytest.approx(1.0)


def test_tied_answers_do_not_compete_with_one_another():
    # Ranks 1 1 2 2: each of the two best against itself and both others; the worst have nothing below them.
    a, b, c, d = scores = [0.5, 2.0, -0.3, 0.1]
    loss = plackett_luce_losses(torch.tensor(scores), torch.zeros(4, dtype=torch.long), torch.tensor([1, 1, 2, 2]), 1)
    below = math.exp(c) + math.exp(d)
    expected = -math.log(math.exp(a) / (math.exp(a) + below)) - math.log(math.exp(b) / (math.exp(b) + below))
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("losses", [pairwise_losses, plackett_luce_losses])
@pytest.mark.parametrize("centring", [0.0, 0.3])
def test_two_answers_have_the_loss_of_a_pair(losses, centring):
    chosen, rejected = torch.tensor([1.0, 0.0, -2.5, 300.0]), torch.tensor([0.2, 3.0, -2.5, -300.0])
    scores = torch.stack([chosen, rejected], 1).reshape(-1)
    row, ranks = torch.arange(4).repeat_interleave(2), torch.tensor([1, 2] * 4)
    found = losses(scores, row, ranks, 4, centring=centring)
    torch.testing.assert_close(found, ranking_losses(chosen, rejected, centring=centring), rtol=1e-6, atol=1e-6)
    if losses is pairwise_losses:  # to the last bit
        assert torch.equal(found, ranking_losses(chosen, rejected, centring=centring))


@pytest.mark.parametrize("losses", [pairwise_losses, plackett_luce_losses])
def test_gradients_of_the_ranked_losses(losses):
    scores = random_scores().requires_grad_()
    assert torch.autograd.gradcheck(lambda r: losses(r, ROW, RANKS, len(RANKINGS), centring=0.1), scores)
    far = random_scores(500.0).requires_grad_()
    losses(far, ROW, RANKS, len(RANKINGS)).sum().backward()
    assert far.grad.isfinite().all()


def test_dpo_by_hand():
    # -log sigmoid( 0.5 * ((-3 + 4) - (-6 + 5)) ), the second pair reversed
    args = [torch.tensor(x) for x in ([-3.0, -6.0], [-6.0, -3.0], [-4.0, -5.0], [-5.0, -4.0])]
    expected = [-log_sigmoid(0.5 * 2), -log_sigmoid(-0.5 * 2)]
    assert dpo_losses(*args, beta=0.5).tolist() == pytest.approx(expected)


def test_conservative_dpo_by_hand():
    # -(1 - e) log sigmoid(z) - e log sigmoid(-z), with z = 0.5 * 2 + 0.1 * 20 and e = 0.2
    args = [torch.tensor([x]) for x in (-3.0, -6.0, -4.0, -5.0)]
    lengths = {"chosen_lengths": torch.tensor([30]), "rejected_lengths": torch.tensor([10])}
    loss = dpo_losses(*args, beta=0.5, alpha=0.1, **lengths, label_smoothing=0.2)
    assert loss.item() == pytest.approx(-0.8 * log_sigmoid(3.0) - 0.2 * log_sigmoid(-3.0))
    # Its minimum is where sigmoid(z) = 1 - e: there the gradient is 0.
    policy = torch.tensor([math.log(0.8 / 0.2)], requires_grad=True)
    zero = torch.zeros(1)
    dpo_losses(policy, zero, zero, zero, beta=1.0, label_smoothing=0.2).sum().backward()
    assert policy.grad.item() == pytest.approx(0.0, abs=1e-7)


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
