"""What the loaders give: one class for each kind of rows, all tensors. Padding is told by the lengths alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

SomeBatch = TypeVar("SomeBatch", bound="Batch")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows."""

    weight: Tensor  # (B,) 1, and 0 for rows that only fill up the last batch of an evaluation

    def __len__(self) -> int:
        return len(self.weight)

    def to(self: SomeBatch, device: torch.device | str) -> SomeBatch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


@dataclass(frozen=True, kw_only=True)
class PromptBatch(Batch):
    """Prompts to be answered."""

    input_ids: Tensor  # (B, P) left-padded
    lengths: Tensor  # (B,) tokens
    prompts: list[str]  # B texts
    columns: dict[str, list[Any]] = field(default_factory=dict)  # of the data, those that are kept; each of B values


@dataclass(frozen=True, kw_only=True)
class SupervisedBatch(Batch):
    """Prompts with the answers to learn."""

    input_ids: Tensor  # (B, T) right-padded: the prompt, then the answer
    lengths: Tensor  # (B,) tokens of both together
    prompt_lengths: Tensor  # (B,)
    loss_mask: Tensor | None = None  # (B, A) of the tokens after the prompt: True where learned; None: everywhere


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """Prompts with a chosen and a rejected answer each."""

    chosen_ids: Tensor  # (B, T1) right-padded: the prompt, then the answer
    chosen_lengths: Tensor  # (B,) tokens of both together
    rejected_ids: Tensor  # (B, T2)
    rejected_lengths: Tensor  # (B,)
    prompt_lengths: Tensor  # (B,)
    margin: Tensor | None = None  # (B,) by how much the chosen answer is better, 0 where unknown; None: nowhere known

    @property
    def of_chosen(self) -> SupervisedBatch:
        """The prompts with their chosen answers, as rows to learn."""
        lengths = {"lengths": self.chosen_lengths, "prompt_lengths": self.prompt_lengths}
        return SupervisedBatch(input_ids=self.chosen_ids, **lengths, weight=self.weight)


@dataclass(frozen=True, kw_only=True)
class RankedBatch(Batch):
    """Prompts with several ranked answers each: N answers in all, one row's after the other's."""

    input_ids: Tensor  # (N, T) right-padded: the prompt, then the answer
    lengths: Tensor  # (N,) tokens of both together
    prompt_lengths: Tensor  # (N,)
    row: Tensor  # (N,) which of the B rows an answer belongs to
    ranks: Tensor  # (N,) 1 for the best answer of a row, equal for ties
