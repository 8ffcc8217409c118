"""The variance meter: advantages under several baselines, and the gradient's variance from random projections."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import count
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch

from remax.core.rollout import Rollout
from remax.core.sampling import Sampling
from remax.models.policy import load_policy
from remax.training import variance
from remax.training.variance import (
    VarianceMeter,
    advantage_variances,
    answer_projections,
    baseline_advantages,
    gradient_variance,
    project,
)
from utils.tokenizer import load_tokenizer

REWARDS = torch.tensor([1.0, 3.0, 2.0, 2.0])  # two prompts, two answers each
GREEDY = torch.tensor([1.0, 1.0, 2.0, 2.0])


def test_baselines_by_hand():
    figures = advantage_variances(REWARDS, GREEDY, samples_per_prompt=2, moving_average=1.5)
    assert figures == pytest.approx(
        {
            "variance/none": (1 + 9 + 4 + 4) / 4,
            "variance/mean": (1 + 1 + 0 + 0) / 4,  # around 2
            "variance/greedy": (0 + 4 + 0 + 0) / 4,
            "variance/leave_one_out": (4 + 4 + 0 + 0) / 4,
            "variance/moving_average": (0.25 + 2.25 + 0.25 + 0.25) / 4,
            "no_signal/greedy": 1 / 2,  # of the second prompt all answers score as the greedy one
            "no_signal/group": 1 / 2,
        }
    )


def test_only_what_is_at_hand_is_reported():
    assert set(advantage_variances(REWARDS)) == {"variance/none", "variance/mean"}
    assert set(advantage_variances(REWARDS, GREEDY)) == {
        "variance/none",
        "variance/mean",
        "variance/greedy",
        "no_signal/greedy",
    }


def test_two_ranks_give_the_figures_of_one():
    ranks, told = Barrier(2), {}

    def figures(rank: int) -> dict[str, float]:
        rows, call = slice(2 * rank, 2 * rank + 2), count()

        def sum_across_ranks(totals):
            step = next(call)
            told[step, rank] = {name: float(value) for name, value in totals.items()}
            ranks.wait(timeout=10)
            return {name: told[step, 0][name] + told[step, 1][name] for name in totals}

        return advantage_variances(REWARDS[rows], GREEDY[rows], 2, 1.5, sum_across_ranks)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(figures, range(2))
    assert first == second == pytest.approx(advantage_variances(REWARDS, GREEDY, 2, 1.5))


def test_a_projection_is_linear_and_repeatable():
    a = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    b = [torch.randn(3, 4, dtype=torch.float64), None]
    both = [a[0] + b[0], a[1]]
    torch.testing.assert_close(project(both, 6, seed=1), project(a, 6, seed=1) + project(b, 6, seed=1))
    assert not torch.allclose(project(a, 6, seed=1), project(a, 6, seed=2))
    assert project([None, None], 6, seed=1).tolist() == [0.0] * 6


def test_a_missing_gradient_counts_as_zeros():
    a = torch.randn(5)
    torch.testing.assert_close(project([None, a], 4, seed=1), project([torch.zeros(2), a], 4, seed=1))


def test_gradient_variance_against_the_covariance():
    # E|g - E g|^2 of 60 estimates, over 150 projections
    generator = torch.Generator().manual_seed(0)
    gradients = 0.5 + torch.randn(60, 7, generator=generator) * torch.tensor([1.0, 2, 0.1, 0, 1, 3, 0.5])
    exact = gradients.var(0).sum().item()
    projections = torch.stack([project([g[:3], g[3:]], 150, seed=3) for g in gradients])
    measured = gradient_variance(projections)
    assert measured.variance == pytest.approx(exact, rel=0.1)
    assert 0 < measured.standard_error < 0.5 * exact
    signal = gradients.mean(0).square().sum().item() - exact / 60
    assert measured.signal == pytest.approx(signal, abs=0.5)


def test_gradient_variance_by_hand():
    # Projections 0 and 2: mean 1, variance (1 + 1) / (2 - 1) = 2, squared mean minus variance / 2 = 0.
    measured = gradient_variance(torch.tensor([[0.0], [2.0]], dtype=torch.float64))
    assert (measured.variance, measured.signal) == (2.0, 0.0)


def test_equal_gradients_have_no_variance_and_full_signal():
    projections = project([torch.tensor([3.0, 4.0])], 2000, seed=0).repeat(3, 1)
    measured = gradient_variance(projections)
    assert measured.variance == 0
    assert measured.signal == pytest.approx(25, rel=0.15)
    with pytest.raises(ValueError, match="at least 2"):
        gradient_variance(projections[:1])


# -------------------------------------------------------------------------------------------------------- as a watcher


@pytest.fixture
def actor(make_policy):
    """What the meter needs of an actor: the model itself, tempered, in chunks smaller than an answer."""
    folder = str(make_policy("llama"))
    model = load_policy(folder, "--a", dtype=torch.float32, tokenizer=load_tokenizer(folder)).eval()
    return SimpleNamespace(model=model, sampling=Sampling(0.7), chunk_size=4, generating=lambda: nullcontext(False))


def answer_gradient(model, sequences, i: int, gamma: float) -> list[torch.Tensor]:
    """grad sum_t gamma^(T-t+1) log pi(y_t) of row i, from the model's plain logits at temperature 0.7."""
    start, end = int(sequences.prompt_lengths[i]), int(sequences.lengths[i])
    ids = sequences.input_ids[i, :end]
    logp = (model.hf(ids[None]).logits[0] / 0.7).log_softmax(-1)
    tokens = logp[torch.arange(start - 1, end - 1), ids[start:]]  # (T,)
    exponents = torch.arange(end - start, 0, -1)  # T, T-1, ..., 1
    return torch.autograd.grad((gamma**exponents * tokens).sum(), list(model.parameters()))


def test_projections_of_answers_are_those_of_their_gradients(actor, sequences_of):
    sequences = sequences_of(0, rows=3, vocabulary=200)
    products = answer_projections(actor, sequences, gamma=0.9, count=5, seed=7)  # (3, 5)
    for i in range(3):
        expected = project(answer_gradient(actor.model, sequences, i, 0.9), 5, seed=7)
        torch.testing.assert_close(products[i], expected, rtol=1e-4, atol=1e-3)
    assert all(p.grad is None for p in actor.model.parameters())  # nothing reaches the update


def test_the_meter_measures_every_baseline_on_the_same_answers(actor, sequences_of):
    sequences, rewards = sequences_of(1, rows=8, vocabulary=200), torch.randn(8)
    rollout = Rollout(sequences, rewards, baseline=torch.randn(8))
    meter = VarianceMeter(actor, samples_per_prompt=2, gradient_steps=2, prompts=3, projections=6)
    first = meter(1, rollout, {"reward": 0.5})
    assert first == advantage_variances(rewards, rollout.baseline, 2)  # no past yet, and no gradients at step 1
    second = meter(2, rollout, {"reward": 0.9})
    assert second["variance/moving_average"] == pytest.approx(float((rewards.double() - 0.5).square().mean()))
    assert meter.moving_average == pytest.approx(0.9 * 0.5 + 0.1 * 0.9)

    # 3 prompts of 2 answers; a prompt's share of the gradient is the mean of (r - b) S over its two answers
    gradients = [answer_gradient(actor.model, sequences, i, 1.0) for i in range(6)]
    products = torch.stack([project(gradient, 6, seed=2) for gradient in gradients])
    for name, advantage in baseline_advantages(rewards, rollout.baseline, 2, 0.5).items():
        scaled = advantage[:6, None] * products
        expected = gradient_variance((scaled[0::2] + scaled[1::2]) / 2)
        assert second[f"gradient_variance/{name}"] == pytest.approx(expected.variance, rel=1e-3)
    assert set(second) - set(first) == {"variance/moving_average", "gradient_signal"} | {
        f"gradient_variance/{name}" for name in ("none", "mean", "greedy", "leave_one_out", "moving_average")
    }


def test_the_gradients_of_all_ranks_are_measured_together(actor, sequences_of, monkeypatch):
    shares: list[torch.Tensor] = []
    monkeypatch.setattr(variance, "gather_objects", lambda mine: shares.append(mine) or [mine, 3 * mine])
    rollout = Rollout(sequences_of(1, rows=2, vocabulary=200), torch.randn(2))
    figures = VarianceMeter(actor, gradient_steps=1, projections=5)(1, rollout, {"reward": 0.0})
    both = gradient_variance(torch.cat([shares[0], 3 * shares[0]]))
    assert figures["gradient_variance/none"] == pytest.approx(both.variance)


def test_one_prompt_has_no_gradient_variance(actor, sequences_of):
    rollout = Rollout(sequences_of(1, rows=2, vocabulary=200), torch.randn(2))
    figures = VarianceMeter(actor, samples_per_prompt=2, gradient_steps=1)(1, rollout, {"reward": 0.0})
    assert not any("gradient" in name for name in figures)
