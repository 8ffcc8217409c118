"""Scored answers: what an algorithm learns from."""

from __future__ import annotations

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

    def select(self, rows: Tensor | slice) -> Rollout:
        """Some of the rows; per-token tensors are cut to the width of the longest answer among them."""
        sequences = self.sequences.select(rows)
        width = sequences.answer_width

        def pick(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x[rows]
            return x[:, :width] if x.dim() > 1 and x.shape[1] > 1 else x

        rest = {f.name: pick(getattr(self, f.name)) for f in fields(self) if f.name not in ("sequences", "rewards")}
        return Rollout(sequences, self.rewards[rows], **rest)

    def split(self, size: int, *, group: int = 1) -> Iterator[Rollout]:
        """Micro-batches of at most `size` rows; rows of similar length together, so that little of them is padding.

        Every rank cuts the same number of micro-batches from the same number of rows.

        Args:
            size: Most rows of a micro-batch.
            group: How many adjacent rows (the answers to one prompt) stay together and adjacent; it divides `size`.

        Raises:
            ValueError: `size` or the number of rows would cut a group.
        """
        if size % group or len(self) % group:
            raise ValueError(f"{len(self)} rows in micro-batches of {size} cannot keep groups of {group} together")
        longest = self.sequences.lengths.view(-1, group).amax(1)  # (B / group,)
        within = torch.arange(group, device=longest.device)
        order = (longest.argsort(stable=True)[:, None] * group + within).flatten()  # (B,)
        for start in range(0, len(self), size):
            yield self.select(order[start : start + size])

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
