"""One rollout gives one update: however it is cut, ordered, padded or spread over ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from remax.algorithms import ALGORITHMS, KLPenalty, build_algorithm
from remax.algorithms.base import on_one_rank
from remax.core.logprobs import PolicyOutput, token_stats
from remax.core.rollout import Rollout
from remax.core.sequences import Sequences

VOCABULARY, WIDTH, PAD = 6, 5, 0
PROMPTS, ANSWERS = [3, 1, 4, 2, 2, 5, 1, 3], [4, 1, 2, 6, 3, 1, 5, 2]
SETTINGS = {
    "remax": {"gamma": 0.95},
    "remax, calibrated": {"baseline": "calibrated", "samples_per_prompt": 2, "clip_reward_value": 1.0},
    "reinforce": {"baseline_decay": 0.9},
    "rloo": {"samples_per_prompt": 4},
    "rloo, by tokens": {"samples_per_prompt": 2, "baseline": "token_weighted", "advantage_scaling": "batch"},
    "grpo": {"samples_per_prompt": 2},
    "ppo": {"advantage_scaling": "batch"},
    "raft": {"samples_per_prompt": 2},
    "superhf": {"samples_per_prompt": 2},
    "inpo": {"samples_per_prompt": 4, "entropy_coef": 0.0},
}
KL = {"grpo": KLPenalty(0.1, "full", "loss", "full_step"), "remax, calibrated": KLPenalty(0.1)}


class Policy(torch.nn.Module):
    """A model of running means, so that each token depends on all before it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding, self.head_weight = (
            torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64))
            for _ in range(2)
        )

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embedding[ids]  # (B, T, H)
        return torch.tanh(x + x.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None])

    def forward(self, sequences: Sequences) -> tuple[PolicyOutput, Tensor]:
        mask = sequences.answer_mask
        hidden = sequences.at(self.hidden(sequences.input_ids), sequences.predictor_columns)
        stats = token_stats(
            hidden[mask],
            lambda h: h @ self.head_weight.T,
            sequences.answer_ids[mask],
            entropy=True,
            stats_grad=True,
            reference_hidden=hidden[mask].detach(),
            reference_head=lambda h: h @ self.head_weight.T.detach().roll(1, 0),
        )
        zeros = torch.zeros(mask.shape, dtype=torch.float64)
        return PolicyOutput(*(zeros.masked_scatter(mask, x) for x in stats)), hidden.sum(-1)  # a critic's values


def rollout() -> Rollout:
    generator = torch.Generator().manual_seed(1)
    total = max(p + a for p, a in zip(PROMPTS, ANSWERS, strict=True))
    ids = torch.randint(1, VOCABULARY, (8, total), generator=generator)
    sequences = Sequences(ids, torch.tensor(PROMPTS), torch.tensor(ANSWERS))
    sequences = replace(sequences, input_ids=ids.masked_fill(~sequences.mask, PAD))

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scored = Rollout(sequences, noise(8), noise(8), noise(8, 6), noise(8, 6), noise(8, 6))
    return replace(scored, greedy_cost=noise(8))


def build(name: str, aggregation: str | None = None, **more):
    settings = {"entropy_coef": 0.01} | SETTINGS[name] | more
    algorithm = build_algorithm(name.split(",")[0], kl=KL.get(name), loss_aggregation=aggregation, **settings)
    if "calibrated" in name:  # which an earlier rollout was for
        before = replace(algorithm, sum_across_ranks=on_one_rank)
        before.prepare(rollout())
        algorithm.load_state_dict(before.state_dict())
    return algorithm


def learned(algorithm, rows: Rollout) -> Rollout:
    """What the update reads."""
    return algorithm.learned(algorithm.prepare(rows))


def gradient(algorithm, parts: list[Rollout], denominator: Tensor) -> Tensor:
    """Of policy and value loss, accumulated over micro-batches as an optimizer sees it."""
    policy = Policy()
    for batch in parts:
        output, values = policy(batch.sequences)
        loss, _ = algorithm.loss(batch, output, denominator)
        if algorithm.critic:
            loss = loss + algorithm.value_loss(batch, values, denominator)[0]
        loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def pair(name: str) -> int:
    """Rows that stay together."""
    kind = ALGORITHMS[name.split(",")[0]]
    return kind.kept if kind.compares_answers else 1


def in_order(prepared: Rollout, size: int, group: int) -> list[Rollout]:
    return [prepared.select(slice(start, start + size)) for start in range(0, len(prepared), size)]


def whole(algorithm) -> Tensor:
    prepared = learned(algorithm, rollout())
    return gradient(algorithm, [prepared], algorithm.count(prepared.sequences))


HOW = ("sequence", "token", "sequence_mean")
AGGREGATED = [(name, how) for name in SETTINGS for how in (HOW if name != "inpo" else HOW[:1])]


@pytest.mark.parametrize("name, aggregation", AGGREGATED)
def test_cut_in_any_way(name, aggregation):
    expected = whole(build(name, aggregation))
    assert expected.norm() > 1e-3
    group = pair(name)
    for size in {group * -(-size // group) for size in (8, 4, 3, 1)}:
        for cut_up in (Rollout.split, in_order):
            algorithm = build(name, aggregation)
            prepared = learned(algorithm, rollout())
            parts = list(cut_up(prepared, size, group=group))
            assert len(parts) == -(-len(prepared) // size)
            cut = gradient(algorithm, parts, algorithm.count(prepared.sequences))
            torch.testing.assert_close(cut, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_in_any_order(name):
    for order in ([4, 5, 6, 7, 0, 1, 2, 3], [3, 2, 1, 0, 7, 6, 5, 4]):  # answers of a group stay together
        algorithm = build(name)
        prepared = learned(algorithm, rollout().select(torch.tensor(order)))
        parts = in_order(prepared, 4 if pair(name) > 1 else 3, group=pair(name))
        permuted = gradient(algorithm, parts, algorithm.count(prepared.sequences))
        torch.testing.assert_close(permuted, whole(build(name)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_padded_or_trimmed(name):
    algorithm, plain = build(name), rollout()
    ids = torch.nn.functional.pad(plain.sequences.input_ids, (0, 7), value=PAD)
    prepared = learned(algorithm, replace(plain, sequences=replace(plain.sequences, input_ids=ids)))
    padded = gradient(algorithm, [prepared], algorithm.count(prepared.sequences))
    torch.testing.assert_close(padded, whole(build(name)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_on_two_ranks(name):
    """Each rank holds half of the rows; sums over ranks are those of both halves, gradients are added."""
    halves = [rollout().select(torch.arange(start, start + 4)) for start in (0, 4)]
    told: list[dict[str, float]] = []

    def record(totals):
        told.append({key: float(value) for key, value in totals.items()})
        return told[-1]

    for half in halves:
        build(name, sum_across_ranks=record).prepare(half)
    both = {key: sum(part[key] for part in told) for key in told[0]} if told else {}

    parts, count = [], torch.tensor(0)
    for half in halves:
        algorithm = build(name, sum_across_ranks=lambda totals: both)
        prepared = learned(algorithm, half)
        count = count + algorithm.count(prepared.sequences)
        parts += prepared.split(2, group=pair(name))
    torch.testing.assert_close(gradient(algorithm, parts, count), whole(build(name)), atol=1e-12, rtol=0)


def test_every_algorithm_is_here():
    assert {name.split(",")[0] for name in SETTINGS} == set(ALGORITHMS)
