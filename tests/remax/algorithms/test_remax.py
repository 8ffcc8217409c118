"""ReMax by hand, and against a slow loop over answers and tokens."""

from __future__ import annotations

import pytest
import torch

from remax.algorithms.kl import KLPenalty, token_kl
from remax.algorithms.remax import ReMax, remax_advantages
from remax.algorithms.rloo import RLOO
from remax.core.logprobs import PolicyOutput
from remax.core.rollout import Rollout
from remax.core.sequences import Sequences


def rollout(lengths: list[int], prompt_length: int = 2, seed: int = 0) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    n, width = len(lengths), max(lengths)
    sequences = Sequences(
        torch.ones(n, prompt_length + width, dtype=torch.long), torch.full((n,), prompt_length), torch.tensor(lengths)
    )
    return Rollout(
        sequences,
        4 * torch.randn(n, generator=generator),
        4 * torch.randn(n, generator=generator),
        reference_logprobs=-torch.rand(n, width, generator=generator),
    )


@pytest.mark.parametrize("kl", [KLPenalty(reach="one_step"), KLPenalty(0.2, "k3", "loss"), KLPenalty(0.0)])
def test_answers_that_are_only_looked_at_are_weighed_as_those_that_are_learned_from(kl):
    batch, logprobs = rollout([3, 1, 5]), -torch.rand(3, 5)
    algorithm = ReMax(gamma=0.9, kl=kl)
    costs = token_kl(logprobs, batch.reference_logprobs, kl.estimator)
    penalty = kl.in_advantage(costs, batch.sequences.answer_mask)
    learned = algorithm.token_advantages(algorithm.prepare(batch), penalty)
    torch.testing.assert_close(algorithm.against_greedy(batch, logprobs), learned)
    assert (learned != 0).sum() == 9


def test_the_same_by_hand_for_another_algorithm():
    # A_t = clip(r - greedy) - 0.5 * k1_t; of the KL over the whole vocabulary: k1 of the drawn token, and of later ones
    one = Rollout(
        Sequences(torch.ones(1, 4, dtype=torch.long), torch.tensor([2]), torch.tensor([2])),
        torch.tensor([9.0]),
        torch.tensor([1.0]),
        reference_logprobs=torch.tensor([[-1.0, -2.0]]),
    )
    group = RLOO(samples_per_prompt=2, kl=KLPenalty(0.5, reach="one_step"), clip_reward_value=3.0, clip_on="difference")
    logprobs = torch.tensor([[-0.5, -2.2]])
    assert group.against_greedy(one, logprobs).tolist() == [pytest.approx([3 - 0.25, 3 + 0.1])]
    group.kl = KLPenalty(0.5, "full", "reward")
    assert group.against_greedy(one, logprobs).tolist() == [pytest.approx([3 - 0.15, 3 + 0.1])]


def test_one_token_by_hand():
    # loss = -A log pi,  A = 0.99 * (2 - 0.5) - 0.1 * 0.3
    one = Rollout(
        Sequences(torch.tensor([[7, 0]]), torch.tensor([1]), torch.tensor([1])),
        torch.tensor([2.0]),
        torch.tensor([0.5]),
        reference_logprobs=torch.tensor([[-1.5]]),
    )
    logprobs = torch.tensor([[-1.2]], requires_grad=True)
    algorithm = ReMax(gamma=0.99)
    loss, _ = algorithm.loss(algorithm.prepare(one), PolicyOutput(logprobs), 1)
    advantage = 0.99 * (2 - 0.5) - 0.1 * 0.3
    assert loss.item() == pytest.approx(advantage * 1.2)
    loss.backward()
    assert logprobs.grad.item() == pytest.approx(-advantage)


def test_advantages_by_hand():
    # A_t = gamma^(T-t+1) * clip(r - b) - penalty_t, nothing behind the answers (of 2, 1 and 2 tokens).
    reward, greedy = torch.tensor([2.0, 9.0, -8.0]), torch.tensor([0.5, 1.0, -1.0])
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    penalty = torch.tensor([[0.1, 0.2], [0.3, 0.0], [0.0, 0.4]])

    def advantages(gamma: float, limit: float, clip_on: str) -> torch.Tensor:
        options = {"gamma": gamma, "clip_value": limit, "clip_on": clip_on}
        return remax_advantages(reward, greedy, penalty, mask, **options)

    for limit, clip_on, clipped in (
        (5.0, "difference", [1.5, 5.0, -5.0]),
        (5.0, "reward", [1.5, 4.0, -4.0]),
        (0.0, "difference", [1.5, 8.0, -7.0]),
    ):
        a, b, c = clipped
        expected = torch.tensor([[0.81 * a - 0.1, 0.9 * a - 0.2], [0.9 * b - 0.3, 0.0], [0.81 * c, 0.9 * c - 0.4]])
        torch.testing.assert_close(advantages(0.9, limit, clip_on), expected)
    assert advantages(1.0, 5.0, "difference")[:, 0].tolist() == pytest.approx([1.4, 4.7, -5.0])


@pytest.mark.parametrize("reach", ["one_step", "full_step"])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_against_a_slow_loop(reach, aggregation):
    beta, gamma, limit = 0.2, 0.9, 3.0
    batch = rollout([4, 1, 3])
    logprobs = (-torch.rand(3, 4, generator=torch.Generator().manual_seed(1))).requires_grad_()
    algorithm = ReMax(
        kl=KLPenalty(beta, reach=reach), gamma=gamma, clip_reward_value=limit, loss_aggregation=aggregation
    )
    denominator = algorithm.count(batch.sequences)
    loss, _ = algorithm.loss(algorithm.prepare(batch), PolicyOutput(logprobs), denominator)
    loss.backward()

    total = 0.0
    for i, length in enumerate([4, 1, 3]):
        difference = min(max((batch.rewards[i] - batch.baseline[i]).item(), -limit), limit)
        k = (logprobs.detach()[i] - batch.reference_logprobs[i]).tolist()
        for t in range(length):
            reached = k[t : t + 1] if reach == "one_step" else k[t:length]
            advantage = gamma ** (length - t) * difference - beta * sum(reached)
            total -= advantage * logprobs[i, t].item()
            assert logprobs.grad[i, t].item() == pytest.approx(-advantage / denominator, abs=1e-6)
        assert logprobs.grad[i, length:].eq(0).all()
    assert denominator == {"sequence": 3, "token": 8}[aggregation]
    assert loss.item() == pytest.approx(total / denominator, abs=1e-5)


def test_what_the_trainer_reads():
    assert ReMax.greedy and not ReMax.critic
    assert (ReMax().samples_per_prompt, ReMax().epochs, ReMax().needs_old_logprobs) == (1, 1, False)
    with pytest.raises(ValueError, match="greedy"):
        ReMax().prepare(Rollout(rollout([1]).sequences, torch.zeros(1)))
