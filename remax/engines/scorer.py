"""The roles of models that score: the reward model, and one that learns (step 2, or a critic)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from remax.core.sequences import Sequences
from remax.engines.roles import Learner, Role

ROWS_OF_FORWARD, MOST_FORWARDS = 4, 4  # of a padded batch while it is learned: fewer rows would leave a GPU idle


class Reward(Role):
    """The frozen reward model."""

    part_names: tuple[str, ...] = ()  # see `CompositeReward`

    @torch.no_grad()
    def score(self, sequences: Sequences, forwards: int = 1) -> Tensor:
        """(B,) float32 reward of each answer, read at its last token.

        Args:
            forwards: How many micro-batches the rows are cut into, see `Role.in_forwards`.
        """
        with self.reading():
            return self.in_forwards(sequences, forwards, self.ask)

    def score_parts(
        self,
        sequences: Sequences,
        forwards: int = 1,
        columns: Mapping[str, Sequence[Any]] | None = None,
        of_trunk: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `score`, and the scores of the parts that it is made of: none. See `CompositeReward.score_parts`.

        A model reads no `columns` of the data.
        """
        return self.score(sequences, forwards) if of_trunk is None else of_trunk, {}


class TrainedReward(Learner):
    """The reward model while it learns (step 2), or a critic (PPO)."""

    def score(self, sequences: Sequences) -> Tensor:
        """(B,) float32 with gradient; padded rows are read in several forwards, see `Role.in_forwards`."""
        return self.in_forwards(sequences, self._forwards(sequences), self.ask)

    def slots(self, sequences: Sequences) -> int:
        """See `Learner.slots`."""
        forwards = self._forwards(sequences)
        if forwards == 1:
            return super().slots(sequences)
        return sum(sequences.select(rows).input_ids.numel() for rows in sequences.balanced(forwards))

    def _forwards(self, sequences: Sequences) -> int:
        """How many forwards read the rows: with rows of similar length in each, less of them is padding."""
        if self.model.packing or self.zero3:  # where all ranks must read equally often, of unequal numbers of answers
            return 1
        return max(1, min(MOST_FORWARDS, len(sequences) // ROWS_OF_FORWARD))

    def values(self, sequences: Sequences) -> Tensor:
        """(B, A) float32 with gradient: the value before each answer token."""
        return self.ask(sequences, every_token=True)

    @torch.no_grad()
    def old_values(self, sequences: Sequences, forwards: int = 1) -> Tensor:
        """(B, A) values at rollout time: without gradient, in eval mode; see `Role.in_forwards`."""
        with self.reading():
            return self.in_forwards(sequences, forwards, self.values)
