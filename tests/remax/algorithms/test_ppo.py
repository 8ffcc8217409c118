"""PPO: rewards per token, GAE against the recursion of the paper, both clips, whitening."""

from __future__ import annotations

import math

import pytest
import torch

from remax.algorithms.kl import KLPenalty
from remax.algorithms.ppo import PPO, clipped_policy_loss, clipped_value_loss, gae, token_rewards
from remax.core.logprobs import PolicyOutput
from remax.core.rollout import Rollout
from remax.core.sequences import Sequences, length_mask

LENGTHS = [4, 1, 3]
MASK = length_mask(torch.tensor(LENGTHS), 4)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rollout() -> Rollout:
    sequences = Sequences(torch.ones(3, 6, dtype=torch.long), torch.full((3,), 2), torch.tensor(LENGTHS))
    return Rollout(
        sequences,
        torch.tensor([1.0, -9.0, 2.0], dtype=torch.float64),
        reference_logprobs=random(3, 4, seed=1),
        old_logprobs=random(3, 4, seed=2),
        values=random(3, 4, seed=3),
    )


def test_the_score_is_paid_at_the_last_token():
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0]), MASK)
    assert rewards.tolist() == [[0, 0, 0, 1], [2, 0, 0, 0], [0, 0, 3, 0]]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.9, 0.0), (0.97, 0.5)])
def test_gae_against_the_recursion(gamma, lam):
    # A_t = delta_t + gamma lam A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t,  V and A zero behind the answer
    rewards, values = random(3, 4, seed=4), random(3, 4, seed=5)
    advantages, targets = gae(rewards, values, MASK, gamma, lam)
    for i, length in enumerate(LENGTHS):
        following_advantage = following_value = 0.0
        for t in reversed(range(length)):
            value = values[i, t].item()
            delta = rewards[i, t].item() + gamma * following_value - value
            following_advantage = delta + gamma * lam * following_advantage
            following_value = value
            assert advantages[i, t].item() == pytest.approx(following_advantage, abs=1e-12)
            assert targets[i, t].item() == pytest.approx(following_advantage + value, abs=1e-12)
        assert advantages[i, length:].eq(0).all() and targets[i, length:].eq(0).all()


def test_prepare_charges_each_token_its_kl_and_clips_the_reward():
    batch, algorithm = rollout(), PPO(kl=KLPenalty(0.1), lam=0.9)
    k1 = batch.old_logprobs - batch.reference_logprobs
    rewards = -0.1 * k1 + token_rewards(batch.rewards.clamp(-5, 5), MASK)
    advantages, returns = gae(rewards, batch.values, MASK, 1.0, 0.9)
    prepared = algorithm.prepare(batch)
    torch.testing.assert_close(prepared.advantages, advantages)
    torch.testing.assert_close(prepared.returns, returns)


def test_ratio_clip_by_hand():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    old = torch.zeros(5)
    logprobs = ratio.log().requires_grad_()
    loss, cut = clipped_policy_loss(logprobs, old, advantage, 0.2)
    # max(-A ratio, -A clip(ratio)): a gain is cut, a loss is not
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8, -1.1])
    assert cut.tolist() == [True, False, False, True, False]
    loss.sum().backward()
    assert logprobs.grad.eq(0).tolist() == cut.tolist()


def test_value_clip_by_hand():
    values = torch.tensor([1.5, 0.1, 1.5, 0.9], requires_grad=True)
    old, targets = torch.zeros(4), torch.tensor([1.0, 1.0, 3.0, 0.1])
    loss, cut = clipped_value_loss(values, old, targets, 0.2)
    # max((1.5-1)^2, (.2-1)^2)/2, (.1-1)^2/2, max((1.5-3)^2, (.2-3)^2)/2, max((.9-.1)^2, (.2-.1)^2)/2
    assert loss.tolist() == pytest.approx([0.32, 0.405, 3.92, 0.32])
    assert cut.tolist() == [True, False, True, False]
    loss.sum().backward()
    assert values.grad.eq(0).tolist() == cut.tolist()


def test_rounding_clips_no_value_within_the_range():
    old, values = (0.09 * random(1000, seed=seed).float().tanh() for seed in (8, 10))
    assert not torch.equal(old + (values - old), values)
    targets = random(1000, seed=9).float()
    loss, cut = clipped_value_loss(values, old, targets, 0.2)
    assert not cut.any() and torch.equal(loss, (values - targets).square() / 2)


def test_losses_and_metrics_against_a_loop():
    algorithm = PPO(kl=KLPenalty(0.1), cliprange=0.2, cliprange_value=0.3)
    batch = algorithm.prepare(rollout())
    logprobs = (batch.old_logprobs + 0.3 * random(3, 4, seed=6)).requires_grad_()
    values = (batch.values + 0.4 * random(3, 4, seed=7)).requires_grad_()
    tokens = algorithm.count(batch.sequences)
    assert tokens == 8  # `token` aggregation
    loss, metrics = algorithm.loss(batch, PolicyOutput(logprobs), tokens)
    value_loss, value_metrics = algorithm.value_loss(batch, values, tokens)

    policy = value = cut = 0.0
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            a, ratio = batch.advantages[i, t].item(), math.exp((logprobs - batch.old_logprobs)[i, t].item())
            clipped = min(max(ratio, 0.8), 1.2)
            policy += max(-a * ratio, -a * clipped) / 8
            cut += -a * clipped > -a * ratio
            v, old, target = values[i, t].item(), batch.values[i, t].item(), batch.returns[i, t].item()
            value += max((v - target) ** 2, (min(max(v, old - 0.3), old + 0.3) - target) ** 2) / 2 / 8
    assert loss.item() == pytest.approx(policy)
    assert value_loss.item() == pytest.approx(value)
    assert float(metrics["ratio_clipped"].total) == cut > 0
    ratios = (logprobs - batch.old_logprobs).exp()[MASK]
    assert float(metrics["ratio"].total) == pytest.approx(ratios.sum().item()) and int(metrics["ratio"].count) == 8
    assert not set(metrics) & set(value_metrics)  # they are added up in one dict


def test_kl_in_the_loss_stays_out_of_the_rewards():
    batch = rollout()
    plain = PPO(kl=KLPenalty(0.0)).prepare(batch)
    algorithm = PPO(kl=KLPenalty(0.1, "k2", "loss", "one_step"))
    prepared = algorithm.prepare(batch)
    torch.testing.assert_close(prepared.advantages, plain.advantages)
    logprobs = batch.old_logprobs.clone().requires_grad_()
    loss, _ = algorithm.loss(prepared, PolicyOutput(logprobs), 1)
    without, _ = PPO(kl=KLPenalty(0.0)).loss(prepared, PolicyOutput(logprobs), 1)
    k1 = (batch.old_logprobs - batch.reference_logprobs)[MASK]
    assert (loss - without).item() == pytest.approx(0.1 * (k1**2 / 2).sum().item())


def test_whitening_is_over_all_answer_tokens_of_all_ranks():
    batch = rollout()
    plain = PPO(kl=KLPenalty(0.0)).prepare(batch).advantages[MASK]
    white = PPO(kl=KLPenalty(0.0), advantage_scaling="batch").prepare(batch).advantages
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-9)
    assert white[MASK].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert white[~MASK].eq(0).all()

    other = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)  # advantages of a second rank
    sums = {"x": other.sum(), "xx": other.square().sum(), "n": torch.tensor(3)}
    on_two = PPO(
        kl=KLPenalty(0.0),
        advantage_scaling="batch",
        sum_across_ranks=lambda mine: {name: float(value + sums[name]) for name, value in mine.items()},
    )
    both = torch.cat([plain, other])
    expected = (plain - both.mean()) / both.std(correction=0)
    torch.testing.assert_close(on_two.prepare(batch).advantages[MASK], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"clip_on": "difference"}, "clip on the reward"),
        ({"kl": KLPenalty(0.1, reach="one_step")}, "full_step"),
        ({"kl": KLPenalty(0.1, "full", "loss", "full_step")}, "one_step or k1"),
        ({"lam": 1.1}, "lam"),
        ({"epochs": 0}, "epoch"),
        ({"cliprange": 0.0}, "clip"),
    ],
)
def test_refusals(settings, reason):
    with pytest.raises(ValueError, match=reason):
        PPO(**settings)


def test_defaults_are_deepspeed_chats():
    ppo = PPO()
    assert (ppo.kl.coefficient, ppo.clip_reward_value, ppo.gamma, ppo.lam) == (0.1, 5.0, 1.0, 0.95)
    assert (ppo.cliprange, ppo.cliprange_value, ppo.epochs, ppo.loss_aggregation) == (0.2, 0.2, 1, "token")
    assert ppo.critic and ppo.needs_old_logprobs and not ppo.greedy
