"""The fit of a baseline to earlier rollouts, by hand and against a slow least squares over every token."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from remax.algorithms.calibration import PAPER, Calibration, answer_cost, past_cost, token_weights
from remax.algorithms.kl import KLPenalty
from remax.algorithms.remax import ReMax
from remax.core.rollout import Rollout
from remax.core.sequences import Sequences

HALF = float(np.log(0.5))


def rollout(rewards: list[float], greedy: list[float], lengths: list[int] | None = None, seed: int = 0) -> Rollout:
    """Answers of one token unless said otherwise; log-probs are of the seed, but half for single tokens."""
    lengths = lengths or [1] * len(rewards)
    n, width, noise = len(lengths), max(lengths), torch.Generator().manual_seed(seed)
    sequences = Sequences(torch.ones(n, 2 + width, dtype=torch.long), torch.full((n,), 2), torch.tensor(lengths))
    old = -2 * torch.rand(n, width, generator=noise) if width > 1 else torch.full((n, 1), HALF)
    return Rollout(
        sequences,
        torch.tensor(rewards),
        torch.tensor(greedy),
        reference_logprobs=-2 * torch.rand(n, width, generator=noise),
        old_logprobs=old,
        greedy_cost=torch.rand(n, generator=noise),
    )


def calibrated(**settings) -> ReMax:
    return ReMax(**{"gamma": 1.0, "clip_reward_value": 0.0, "kl": KLPenalty(0.0), "baseline": "calibrated"} | settings)


def expected(algorithm: ReMax, *rows: list[float]) -> list[float]:
    return algorithm.prepare(rollout(*rows)).expected.tolist()


def test_the_first_rollout_has_the_paper_s_baseline_and_the_next_one_what_it_taught():
    algorithm = calibrated()
    assert expected(algorithm, [1.0, 2.0], [0.0, 2.0]) == [0.0, 2.0]
    # d = r - greedy = 1, 0: mean 1/2, variance 1/4; greedy: mean 1, variance 1; covariance -1/2. Of n = 2 answers
    # slope = -(2/2) / (2 + 1/4) = -4/9,  constant = 1/2 * 2/3 + 4/9 = 7/9,  b = 7/9 + (1 - 4/9) greedy
    assert expected(algorithm, [9.0, 9.0], [0.0, 9.0]) == pytest.approx([7 / 9, 7 / 9 + 5])
    found = {"constant": 7 / 9, "greedy": 5 / 9, "kl": 0.0, "others": 0.0, "past": 0.0}
    logged = {f"calibration/{name}": c for name, c in found.items()}
    assert algorithm.figures() == pytest.approx({"kl_coefficient": 0.0} | logged, abs=1e-12)


def test_earlier_rollouts_count_less():
    # All answers of a rollout alike: the constant is the mean d = r - greedy, held by one answer's worth.
    algorithm = calibrated()
    expected(algorithm, [3.0, 3.0], [1.0, 1.0])  # d = 2, twice
    expected(algorithm, [2.0], [1.0])  # d = 1, once; before it 0.9 * 2 answers
    n, mean = 0.9 * 2 + 1, (0.9 * 2 * 2 + 1) / (0.9 * 2 + 1)
    assert expected(algorithm, [0.0], [1.0]) == pytest.approx([1 + mean * n / (n + 1)])


def test_the_greedy_answer_may_be_charged():
    one = rollout([2.0], [0.5])
    cost = one.greedy_cost.item()
    algorithm = ReMax(baseline="greedy_kl")
    assert algorithm.needs_greedy_cost and not algorithm.needs_old_logprobs
    assert algorithm.prepare(one).expected.item() == pytest.approx(0.5 - cost)
    free = ReMax(baseline="greedy_kl", kl=KLPenalty(0.0))
    assert not free.needs_greedy_cost and free.prepare(one).expected.item() == 0.5


def test_what_a_kl_costs_an_answer_by_hand():
    # w = 1 - p = 1/2, 1/4, 3/4;  g = 1/8, 1/4, 1/2;  p = 3, 2, 1 and nothing behind the answer
    mask = torch.tensor([[True, True, True, False]])
    weights = token_weights(torch.tensor([[0.5, 0.75, 0.25, 0.9]]).log(), mask)
    assert weights.tolist() == [pytest.approx([0.5, 0.25, 0.75, 0.0], abs=1e-7)]
    assert token_weights(None, mask).tolist() == [[1.0, 1.0, 1.0, 0.0]]
    penalty, discounts = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[0.125, 0.25, 0.5, 0.0]])
    top = 0.5 * 0.125 * 3 + 0.25 * 0.25 * 2 + 0.75 * 0.5 * 1
    bottom = 0.5 * 0.125**2 + 0.25 * 0.25**2 + 0.75 * 0.5**2
    assert answer_cost(penalty, weights, discounts).item() == pytest.approx(top / bottom)
    assert past_cost(penalty, mask).tolist() == [[0.0, 1.0, 2.0, 0.0]]


def slow_coefficients(algorithm: ReMax, seen: list[Rollout]) -> dict[str, float]:
    """The argmin at the top of calibration.py, a row of least squares for every token."""
    beta, gamma, k, limit = 0.3, algorithm.gamma, algorithm.samples_per_prompt, algorithm.clip_reward_value
    lines, answers = [], 0.0
    for age, batch in enumerate(reversed(seen)):
        lengths, expected = batch.sequences.answer_lengths.tolist(), batch.expected.double().tolist()
        rewards, greedy, cost = (x.double().tolist() for x in (batch.rewards, batch.baseline, batch.greedy_cost))
        kl = (batch.old_logprobs - batch.reference_logprobs).double().tolist()
        drawn = batch.old_logprobs.double().exp().tolist()
        returns = []
        for i, length in enumerate(lengths):
            w, g = [1 - drawn[i][t] for t in range(length)], [gamma ** (length - t) for t in range(length)]
            p = [beta * sum(kl[i][t:length]) for t in range(length)]
            top, bottom = (sum(w[t] * g[t] * x[t] for t in range(length)) for x in (p, g))
            returns.append(rewards[i] - top / bottom)
        answers += 0.9**age * len(lengths)
        for i, length in enumerate(lengths):
            group = [j for j in range(i - i % k, i - i % k + k) if j != i]
            others = sum(returns[j] for j in group) / (k - 1)
            learned = expected[i] + min(max(rewards[i] - expected[i], -limit), limit)
            for t in range(length):
                g, past = gamma ** (length - t), beta * sum(kl[i][:t])
                target = g * (learned - greedy[i]) - beta * sum(kl[i][t:length])
                w = 0.9**age * (1 - drawn[i][t])
                lines.append([w, g, g * greedy[i], g * cost[i], g * others, past, target])
    table = np.array(lines)
    w, columns, target = table[:, 0], table[:, 1:-1], table[:, -1]
    per_g = columns / columns[:, :1]
    share = w * columns[:, 0] ** 2 / (w * columns[:, 0] ** 2).sum()
    means = share @ per_g[:, 1:]
    noise = share @ (target / columns[:, 0]) ** 2 - (share @ (target / columns[:, 0])) ** 2
    centred = np.concatenate([columns[:, :1], columns[:, 1:] - columns[:, :1] * means], 1)
    weight = np.sqrt(w * answers / (w * columns[:, 0] ** 2).sum())[:, None]
    held = np.diag([1.0] + [np.sqrt(noise)] * 4)
    left, right = np.concatenate([weight * centred, held]), np.concatenate([weight[:, 0] * target, np.zeros(5)])
    found = np.linalg.lstsq(left, right, rcond=None)[0]
    found[0] -= found[1:] @ means
    found[1] += 1.0
    return dict(zip(("constant", "greedy", "kl", "others", "past"), found.tolist(), strict=True))


def test_against_a_slow_least_squares():
    algorithm = calibrated(gamma=0.9, clip_reward_value=1.5, samples_per_prompt=2, kl=KLPenalty(0.3))
    seen = []
    for seed, lengths in enumerate(([3, 1, 4, 2, 2, 5], [2, 6, 1, 1], [4, 4, 3, 2, 1, 3])):
        noise = torch.Generator().manual_seed(10 + seed)
        greedy = (1 + 2 * torch.randn(len(lengths) // 2, generator=noise)).repeat_interleave(2)
        rewards = 0.5 * greedy + 1 + torch.randn(len(lengths), generator=noise)
        batch = rollout(rewards.tolist(), greedy.tolist(), lengths, seed)
        cost = batch.greedy_cost[::2].repeat_interleave(2)
        seen.append(algorithm.prepare(replace(batch, greedy_cost=cost)))
    assert any(((x.rewards - x.expected).abs() > 1.5).any() for x in seen)  # the clip has acted
    assert algorithm.calibration.coefficients() == pytest.approx(slow_coefficients(algorithm, seen), rel=1e-5)


def test_an_earlier_token_s_cost_is_charged_in_shares():
    # One answer of two tokens: p = (k_1 + k_2, k_2), q = (0, k_1), A = r - b - p - share q
    algorithm = calibrated(kl=KLPenalty(0.5))
    batch = algorithm.prepare(rollout([2.0], [0.5], [2]))
    algorithm.coefficients = algorithm.coefficients | {"past": 0.25}
    advantages = algorithm.token_advantages(batch, torch.tensor([[0.7, 0.3]]))
    assert advantages.tolist() == [pytest.approx([1.5 - 0.7, 1.5 - 0.3 - 0.25 * 0.4])]


def test_constants_and_scales_of_the_reward_change_nothing():
    def run(shift: float, scale: float) -> torch.Tensor:
        algorithm = calibrated(samples_per_prompt=2)
        for seed in range(3):
            noise = torch.Generator().manual_seed(seed)
            greedy = torch.randn(4, generator=noise, dtype=torch.float64).repeat_interleave(2)
            rewards = greedy + torch.randn(8, generator=noise, dtype=torch.float64)
            batch = rollout([0.0] * 8, [0.0] * 8)
            found = algorithm.prepare(
                replace(batch, rewards=scale * (rewards + shift), baseline=scale * (greedy + shift))
            )
        return found.advantages / scale

    torch.testing.assert_close(run(100.0, 1.0), run(0.0, 1.0), atol=1e-8, rtol=0)
    torch.testing.assert_close(run(0.0, 0.01), run(0.0, 1.0), atol=1e-8, rtol=0)


def test_a_feature_without_spread_keeps_its_coefficient():
    # The KL of a policy that is still its reference: numbers about 1e-6 say nothing about a KL of 1.
    algorithm = calibrated(kl=KLPenalty(0.1))
    noise = torch.Generator().manual_seed(0)
    rewards, greedy = torch.randn(2, 32, generator=noise).tolist()
    batch = rollout(rewards, greedy)
    near = {"reference_logprobs": batch.old_logprobs, "greedy_cost": batch.greedy_cost * 1e-6}
    algorithm.prepare(replace(batch, **near))
    assert abs(algorithm.calibration.coefficients()["kl"]) < 1e-3
    equal = calibrated()
    expected(equal, [2.0, 2.0], [2.0, 2.0])  # nothing to learn at all
    assert expected(equal, [2.0], [5.0]) == [5.0]


def test_numbers_that_are_none_are_not_learned():
    algorithm = calibrated()
    expected(algorithm, [1.0, 2.0], [0.0, 2.0])
    before = dict(algorithm.calibration.sums)
    expected(algorithm, [float("inf"), 2.0], [0.0, 2.0])
    assert algorithm.calibration.sums == before


def test_the_fit_is_over_all_ranks_and_is_state():
    halves = [rollout([1.0, 2.0, 0.5], [0.0, 2.0, 1.0]), rollout([3.0, -1.0], [1.0, 0.0])]
    told = []
    for half in halves:
        calibrated(sum_across_ranks=lambda own: told.append({k: float(x) for k, x in own.items()}) or told[-1]).prepare(
            half
        )
    both = {name: told[0][name] + told[1][name] for name in told[0]}
    ranks = [calibrated(sum_across_ranks=lambda own: both) for _ in halves]
    alone = calibrated()
    alone.prepare(rollout([1.0, 2.0, 0.5, 3.0, -1.0], [0.0, 2.0, 1.0, 1.0, 0.0]))
    for algorithm, half in zip(ranks, halves, strict=True):
        algorithm.prepare(half)
        assert algorithm.calibration.coefficients() == pytest.approx(alone.calibration.coefficients(), rel=1e-12)
    resumed = calibrated()
    resumed.load_state_dict(json.loads(json.dumps(alone.state_dict())))
    assert resumed.calibration.coefficients() == alone.calibration.coefficients() != PAPER
    assert "calibration" not in ReMax().state_dict()


def test_what_it_asks_for():
    one_step = ReMax(baseline="calibrated", samples_per_prompt=2)
    assert one_step.needs_greedy_cost and one_step.needs_old_logprobs
    for _ in range(2):
        one_step.prepare(rollout([1.0, 2.0, 4.0, 1.0], [0.5, 0.5, 2.0, 2.0], [2, 3, 1, 2]))
    assert one_step.coefficients["past"] == 0.0 not in (one_step.coefficients["others"], one_step.coefficients["kl"])
    for kl in (KLPenalty(0.0), KLPenalty(0.1, "k3", "loss", "one_step")):  # nothing is charged before the update
        assert not calibrated(kl=kl).needs_greedy_cost and not calibrated(kl=kl).needs_old_logprobs
    assert not (ReMax().needs_greedy_cost or ReMax().needs_old_logprobs)
    for settings in ({"baseline": "mean"}, {"samples_per_prompt": 0}):
        with pytest.raises(ValueError, match="choose greedy, greedy_kl or calibrated|at least 1 answer"):
            ReMax(**settings)
    for settings in ({"forgetting": 1.0}, {"ridge": 0.0}):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\)|must be positive"):
            Calibration(**settings)
