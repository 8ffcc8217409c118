"""INPO by hand; test_enumeration.py has what it estimates."""

from __future__ import annotations

import pytest
import torch

from remax.algorithms.inpo import INPO
from remax.algorithms.kl import KLPenalty
from remax.core.logprobs import PolicyOutput
from remax.core.rollout import Rollout
from remax.core.sequences import Sequences

# Two prompts with three answers each: rows 1 and 0 are a pair, and three equals are none.
REWARDS = torch.tensor([1.0, 4.0, 2.0, 5.0, 5.0, 5.0])


def test_loss_by_hand():
    sequences = Sequences(torch.arange(30).view(6, 5), torch.full((6,), 2), torch.tensor([2, 3, 1, 2, 2, 1]))
    reference = torch.arange(18.0).view(6, 3) / -10
    old = torch.arange(18.0).view(6, 3) / -5
    algorithm = INPO(samples_per_prompt=3, eta=0.05, tau=0.0125)
    batch = algorithm.learned(
        algorithm.prepare(Rollout(sequences, REWARDS, reference_logprobs=reference, old_logprobs=old))
    )
    assert batch.sequences.input_ids[:2].tolist() == [list(range(5, 10)), list(range(5))]
    assert len(batch) == 4 and algorithm.count(batch.sequences) == 2

    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, 9.0], [-1.0, -1.0, 9.0], [-2.0, -2.0, 9.0]])
    logprobs.requires_grad_()
    loss, figures = algorithm.loss(batch, PolicyOutput(logprobs), 2)
    # D = -6 + 9, of the reference -(.3 + .4 + .5) + (0 + .1), of the old policy twice that; 1 / (2 eta) = 10
    h = 3 - 0.25 * -1.1 - 0.75 * -2.2
    assert loss.item() == pytest.approx((h - 10) ** 2 / 2)
    loss.backward()
    slope = pytest.approx(h - 10)
    assert logprobs.grad[:2].tolist() == [[slope] * 3, [pytest.approx(10 - h)] * 2 + [0.0]]
    assert not logprobs.grad[2:].any()
    assert figures["kept_reward"].total == 9.0


def test_the_authors_tau_is_a_third_of_eta():
    assert INPO().share_of_reference == pytest.approx(1 / 3) and INPO().needs_reference
    assert INPO(eta=0.3, tau=0.3).share_of_reference == 1.0


def test_what_it_cannot_do_is_refused():
    for settings, message in (
        ({"samples_per_prompt": 1}, "inpo with samples_per_prompt 1: it compares at least 2 answers"),
        ({"kl": KLPenalty(0.1)}, "inpo has no KL penalty and no entropy bonus; tau pulls to the reference"),
        ({"entropy_coef": 0.1}, "inpo has no KL penalty and no entropy bonus"),
        ({"gamma": 0.9}, "inpo compares whole answers"),
        ({"loss_aggregation": "token"}, "inpo compares whole answers"),
        ({"eta": 0.1, "tau": 0.2}, "inpo with eta 0.1 and tau 0.2: 0 < eta, and tau from 0 to eta"),
    ):
        with pytest.raises(ValueError, match=message):
            INPO(**settings)
