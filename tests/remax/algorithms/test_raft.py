"""RAFT and SuperHF by hand; test_enumeration.py has what they estimate."""

from __future__ import annotations

import pytest
import torch

from remax.algorithms.kl import KLPenalty
from remax.algorithms.raft import RAFT, SuperHF
from remax.core.logprobs import PolicyOutput
from remax.core.rollout import Rollout
from remax.core.sequences import Sequences

# Two prompts with three answers each; the best are rows 1 and 3, the latter one of two equals.
REWARDS = torch.tensor([1.0, 4.0, 2.0, 5.0, -1.0, 5.0])
LENGTHS = torch.tensor([2, 3, 1, 2, 2, 1])


def rollout() -> Rollout:
    sequences = Sequences(torch.arange(30).view(6, 5), torch.full((6,), 2), LENGTHS)
    return Rollout(sequences, REWARDS)


def test_the_best_answer_to_each_prompt_is_learned():
    # loss = -(1/5) (the sum of the log-probs of the 3 + 2 tokens) + c (1/5) (the sum of their KL)
    for algorithm, c in ((RAFT(samples_per_prompt=3), 0.0), (SuperHF(samples_per_prompt=3), 0.35)):
        batch = algorithm.learned(algorithm.prepare(rollout()))
        assert batch.sequences.input_ids.tolist() == [list(range(5, 10)), list(range(15, 20))]
        assert algorithm.count(batch.sequences) == 5
        logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, 9.0]], requires_grad=True)
        full_kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 9.0]], requires_grad=True)
        loss, figures = algorithm.loss(batch, PolicyOutput(logprobs, full_kl=full_kl if c else None), 5)
        assert loss.item() == pytest.approx((15 + c * 1.5) / 5)
        loss.backward()
        assert logprobs.grad.tolist() == [pytest.approx([-0.2] * 3), pytest.approx([-0.2, -0.2, 0.0])]
        assert figures["kept_reward"].total / figures["kept_reward"].count == pytest.approx(4.5)
        assert ("kept_kl" in figures) == bool(c) and "kl" not in figures
        if c:
            assert full_kl.grad.tolist() == [pytest.approx([0.07] * 3), pytest.approx([0.07, 0.07, 0.0])]
            assert figures["kept_kl"].total / figures["kept_kl"].count == pytest.approx(0.75)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="raft with samples_per_prompt 1: it takes the best of at least 2 answers"):
        RAFT(samples_per_prompt=1)
    with pytest.raises(ValueError, match="raft has no discount"):
        RAFT(gamma=0.9)
    with pytest.raises(ValueError, match="raft has no KL penalty; superhf is the same with one"):
        RAFT(kl=KLPenalty(0.1))
    with pytest.raises(ValueError, match="superhf holds the states of the best answers.*only full_kl_one_step"):
        SuperHF(kl=KLPenalty(0.1, "k3", where="loss", reach="one_step"))
    with pytest.raises(ValueError, match="superhf has a KL of fixed weight"):
        SuperHF(kl=KLPenalty(0.1, "full", where="loss", reach="one_step", normalize=True))
    assert not SuperHF().needs_reference and SuperHF().price_of_kl == 0.0
