"""Scored answers: what an algorithm learns from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from remax.core.sequences import Sequences


@dataclass(frozen=True)
class Rollout:
    """Scored answers: what an algorithm learns from. Rows of one prompt are adjacent.

    Attributes:
        sequences: B prompts with their answers.
        rewards: (B,) score of each answer by the reward model.
        baseline: (B,) reward of the greedy answer to the same prompt.
        reference_logprobs: (B, A) log-probs under the frozen reference.
        old_logprobs: (B, A) log-probs under the policy that sampled.
        values: (B, A) the critic's estimates before each answer token.
        greedy_cost: (B,) what the greedy answer to the same prompt would be charged for its KL, in reward.
        expected: (B,) what the algorithm compares the reward with: its baseline, where it has one for the whole answer.
        advantages: (B, A), or (B, 1) when equal for all tokens of an answer.
        returns: (B, A) what the critic learns.
        reference_hidden: (B, A, H) the reference's hidden states, for the full-vocabulary KL only.
    """

    sequences: Sequences
    rewards: Tensor
    baseline: Tensor | None = None
    reference_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    reference_hidden: Tensor | None = None
    greedy_cost: Tensor | None = None
    expected: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    def select(self, rows: Tensor | slice, numbers: Sequence[int] | None = None) -> Rollout:
        """Some of the rows; per-token tensors are cut to the width of the longest answer among them.

        Args:
            numbers: See `Sequences.select`.
        """
        sequences = self.sequences.select(rows, numbers)
        width = sequences.answer_width

        def pick(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x[rows]
            return x[:, :width] if x.dim() > 1 and x.shape[1] > 1 else x

        rest = {f.name: pick(getattr(self, f.name)) for f in fields(self) if f.name not in ("sequences", "rewards")}
        return Rollout(sequences, self.rewards[rows], **rest)

    def split(self, size: int, *, group: int = 1, packed: bool = False) -> Iterator[Rollout]:
        """Micro-batches of `size` rows; the same number of them on every rank, from the same number of rows.

        Rows of similar length come together, so that little of them is padding.

        Args:
            size: Most rows of a micro-batch.
            group: How many adjacent rows (the answers to one prompt) stay together and adjacent; it divides `size`.
            packed: Rows are read without padding, and `size` is a mean: each micro-batch has about as many tokens.

        Raises:
            ValueError: `size` or the number of rows would cut a group.
        """
        if size % group or len(self) % group:
            raise ValueError(f"{len(self)} rows in micro-batches of {size} cannot keep groups of {group} together")
        lengths = list(map(sum, zip(*self.sequences.counts, strict=True)))
        groups = [lengths[start : start + group] for start in range(0, len(self), group)]
        if packed:
            parts = balanced(list(map(sum, groups)), math.ceil(len(self) / size))
        else:
            order = sorted(range(len(groups)), key=lambda k: max(groups[k]))
            parts = [order[start : start + size // group] for start in range(0, len(order), size // group)]
        cut = [[k * group + i for k in part for i in range(group)] for part in parts]
        rows = torch.tensor(sum(cut, []), device=self.rewards.device)
        for of_part, numbers in zip(rows.split(list(map(len, cut))), cut, strict=True):
            yield self.select(of_part, numbers)

    @staticmethod
    def concatenate(parts: Sequence[Rollout], pad_id: int) -> Rollout:
        """Rows of several rollouts as one; all must have the same fields set."""
        if len(parts) == 1:
            return parts[0]
        sequences = Sequences.concatenate([part.sequences for part in parts], pad_id)
        width = sequences.answer_width

        def join(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            if values[0] is None:
                return None
            if values[0].dim() > 1 and max(v.shape[1] for v in values) > 1:
                tail = (0, 0) * (values[0].dim() - 2)
                values = [torch.nn.functional.pad(v, (*tail, 0, width - v.shape[1])) for v in values]
            return torch.cat(values)

        rest = {f.name: join(f.name) for f in fields(Rollout) if f.name not in ("sequences", "rewards")}
        return Rollout(sequences, torch.cat([part.rewards for part in parts]), **rest)


def balanced(weights: Sequence[float], parts: int) -> list[list[int]]:
    """Places of the weights in so many parts of about equal sums: the heaviest first, each to the lightest part."""
    found: list[list[int]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    for k in sorted(range(len(weights)), key=lambda k: -weights[k]):
        lightest = sums.index(min(sums))
        found[lightest].append(k)
        sums[lightest] += weights[k]
    return found
