"""Typed batches of token ids; every mask, alignment and off-by-one of the project lives here.

Layout. A `Sequences` row holds its prompt and then its answer from column 0 on, and padding only after them. So
positions count from zero in every model family, a causal model needs no attention mask, and a batch can be cut to its
longest row. Per-token tensors of an answer have shape (B, A): column j belongs to answer token j, and padding follows
a short answer. Left padding exists only in `Prompts`, because generation needs all prompts to end in the same column.

All masks come from lengths, never from `ids != pad`: the pad token may be EOS, and EOS may stand inside a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from utils.data.batches import PairBatch, RankedBatch, SupervisedBatch


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """(B,) lengths -> (B, width) bool, True in the first `lengths[i]` columns of row i."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def places(lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(B,) lengths that add up to `total` -> (total,) rows and (total,) columns where their `length_mask` is True.

    They are in the mask's order. An index by the mask itself would wait for a GPU to count, and once more backward.
    """
    device = lengths.device
    rows = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=total)
    return rows, torch.arange(total, device=device) - (lengths.cumsum(0) - lengths)[rows]


def among(ids: Tensor, some: Sequence[int]) -> Tensor:
    """Ids -> bool of the same shape: whether each is one of `some`, a few that need not be copied to a GPU."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for one in some:
        found |= ids == one
    return found


def learned_mask(batch: SupervisedBatch, sequences: Sequences) -> Tensor:
    """(B, A) bool: the answer tokens that supervised learning counts: all, or those of the batch's `loss_mask` (B, A).

    The mask comes with dialogues, where the text after the first prompt holds the user's later turns as well.
    """
    mask = sequences.answer_mask
    return mask if batch.loss_mask is None else mask & batch.loss_mask


@dataclass(frozen=True)
class Prompts:
    """Prompts as generation takes them.

    Attributes:
        input_ids: (B, P), left-padded.
        lengths: (B,) tokens of each prompt, at least 1.
    """

    input_ids: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def attention_mask(self) -> Tensor:
        """(B, P) int64, 1 on the prompt's tokens, which are the last `lengths[i]` columns."""
        return length_mask(self.lengths, self.input_ids.shape[1]).flip(1).long()

    def to(self, device: torch.device | str) -> Prompts:
        """The same prompts on a device."""
        return Prompts(self.input_ids.to(device), self.lengths.to(device))

    def repeat(self, times: int) -> Prompts:
        """Each prompt `times` times, copies adjacent: (B * times, P)."""
        return Prompts(self.input_ids.repeat_interleave(times, 0), self.lengths.repeat_interleave(times, 0))


@dataclass(frozen=True)
class Sequences:
    """Prompts with their answers.

    Attributes:
        input_ids: (B, T), right-padded: prompt, then answer.
        prompt_lengths: (B,) tokens of each prompt, at least 1.
        answer_lengths: (B,) tokens of each answer, its EOS included; an empty answer that ended is EOS alone, so 1.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    answer_lengths: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of prompt and answer together."""
        return self.prompt_lengths + self.answer_lengths

    @property
    def mask(self) -> Tensor:
        """(B, T) bool: True on every real token."""
        return length_mask(self.lengths, self.input_ids.shape[1])

    @property
    def end_index(self) -> Tensor:
        """(B,) column of each row's last token, where the reward is read."""
        return self.lengths - 1

    @cached_property
    def counts(self) -> list[list[int]]:
        """The B prompt lengths and the B answer lengths, as numbers. Kept, since reading them waits for a GPU."""
        return torch.stack([self.prompt_lengths, self.answer_lengths]).tolist()

    @cached_property
    def first_rows(self) -> list[int]:
        """B numbers: of the first row with the same prompt, which is each row's own where none before it has it."""
        first: dict[tuple[int, ...], int] = {}
        prompts = zip(self.input_ids[:, : max(self.counts[0])].tolist(), self.counts[0], strict=True)
        return [first.setdefault(tuple(ids[:length]), i) for i, (ids, length) in enumerate(prompts)]

    @property
    def rows_of_prompts(self) -> dict[int, list[int]]:
        """The numbers of the rows with the same prompt, by the first of them, in order."""
        rows: dict[int, list[int]] = {}
        for i, first in enumerate(self.first_rows):
            rows.setdefault(first, []).append(i)
        return rows

    def _knowing(self, counts: list[list[int]]) -> Sequences:
        """The same object, with `counts` that need not be read."""
        self.__dict__["counts"] = counts
        return self

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and answers."""
        return sum(map(sum, self.counts))

    @property
    def answer_tokens(self) -> int:
        """N, the tokens of all answers."""
        return sum(self.counts[1])

    @property
    def answer_width(self) -> int:
        """A, the longest answer of the batch, at least 1."""
        return max(*self.counts[1], 1)

    @property
    def answer_places(self) -> tuple[Tensor, Tensor]:
        """(N,) rows and (N,) columns of the answer tokens in tensors of shape (B, A), see `places`."""
        return places(self.answer_lengths, self.answer_tokens)

    @property
    def answer_mask(self) -> Tensor:
        """(B, A) bool: True on answer tokens, EOS included."""
        return length_mask(self.answer_lengths, self.answer_width)

    def answer(self, values: Tensor) -> Tensor:
        """(B, T, ...) per-token values -> (B, A, ...) of the answer tokens.

        Columns beyond the end of an answer repeat the values of some other token.
        """
        columns = self.prompt_lengths[:, None] + torch.arange(self.answer_width, device=values.device)  # (B, A)
        return self.at(values, columns)

    @staticmethod
    def at(values: Tensor, columns: Tensor) -> Tensor:
        """(B, T, ...) values at some columns of each row: (B, ...) for columns (B,), (B, A, ...) for (B, A)."""
        columns = columns.clamp(max=values.shape[1] - 1)
        rows = torch.arange(len(values), device=values.device)
        return values[rows[:, None] if columns.dim() > 1 else rows, columns]

    @property
    def predictor_columns(self) -> Tensor:
        """(B, A) columns of the positions that predict the answer tokens; beyond the end of an answer they go on."""
        return self.prompt_lengths[:, None] - 1 + torch.arange(self.answer_width, device=self.prompt_lengths.device)

    @property
    def answer_ids(self) -> Tensor:
        """(B, A) ids of the answer tokens; those beyond the end of an answer are arbitrary, see `answer_mask`."""
        return self.answer(self.input_ids)

    def of_answers(self, values: Tensor) -> Tensor:
        """(B, at least A) values of generated tokens -> (B, A), 0 beyond an answer's end."""
        return values[:, : self.answer_width].masked_fill(~self.answer_mask, 0.0)

    def ended(self, eos_ids: Sequence[int]) -> Tensor:
        """(B,) bool: whether each answer reached an end token within its limit."""
        last = self.at(self.input_ids, self.end_index)
        return among(last, eos_ids)

    def trim(self) -> Sequences:
        """The same rows, cut to the longest of them."""
        longest = max(map(sum, zip(*self.counts, strict=True)))
        return replace(self, input_ids=self.input_ids[:, :longest])._knowing(self.counts)

    def select(self, rows: Tensor | slice | list[int], numbers: Sequence[int] | None = None) -> Sequences:
        """Some of the rows, trimmed.

        Args:
            numbers: The `rows` once more, where they are a tensor that need not be read then.
        """
        some = Sequences(self.input_ids[rows], self.prompt_lengths[rows], self.answer_lengths[rows])
        numbers = rows if isinstance(rows, list) else numbers
        if isinstance(rows, slice):
            some._knowing([lengths[rows] for lengths in self.counts])
        elif numbers is not None:
            some._knowing([[lengths[k] for k in numbers] for lengths in self.counts])
        return some.trim()

    def in_parts(self, parts: int) -> list[Sequences]:
        """The rows in order, in `parts` parts of nearly equal size, each trimmed."""
        bounds = [(int(rows[0]), int(rows[-1]) + 1) for rows in torch.arange(len(self)).tensor_split(parts)]
        return [self.select(slice(*bound)) for bound in bounds]

    def balanced(self, parts: int, *, together: bool = False) -> list[list[int]]:
        """The numbers of the rows in `parts` parts with about as many tokens each, rows of similar length together.

        Args:
            parts: At most the number of rows.
            together: Rows with the same prompt stay together, where there are enough prompts for all parts.
        """
        sizes = [sum(lengths) for lengths in zip(*self.counts, strict=True)]
        groups = list(self.rows_of_prompts.values()) if together else []
        if len(groups) < parts:
            groups = [[i] for i in range(len(self))]
        groups.sort(key=lambda rows: max(sizes[i] for i in rows))
        found: list[list[int]] = [[] for _ in range(parts)]
        total, done, part = sum(sizes), 0, 0
        for place, rows in enumerate(groups):
            size = sum(sizes[i] for i in rows)
            full = done + size / 2 > total * (part + 1) / parts  # more than half of it would lie in the next part
            last_chance = len(groups) - place == parts - part - 1  # each of the parts to come gets one
            if found[part] and part < parts - 1 and (full or last_chance):
                part += 1
            found[part] += rows
            done += size
        return found

    def to(self, device: torch.device | str) -> Sequences:
        """The same rows on a device."""
        return Sequences(self.input_ids.to(device), self.prompt_lengths.to(device), self.answer_lengths.to(device))

    @classmethod
    def from_batch(cls, batch: SupervisedBatch | RankedBatch) -> Sequences:
        """The rows of a loader's batch."""
        return cls(batch.input_ids, batch.prompt_lengths, batch.lengths - batch.prompt_lengths)

    @classmethod
    def from_pairs(cls, batch: PairBatch) -> Sequences:
        """The chosen answers' B rows, then the rejected ones'."""
        sides = ((batch.chosen_ids, batch.chosen_lengths), (batch.rejected_ids, batch.rejected_lengths))
        both = [cls(ids, batch.prompt_lengths, lengths - batch.prompt_lengths) for ids, lengths in sides]
        return cls.concatenate(both, pad_id=0)  # padding is never read

    @classmethod
    def from_generation(cls, prompts: Prompts, answers: Tensor, eos_ids: Sequence[int], pad_id: int) -> Sequences:
        """Rows of a prompt without its left padding, then its answer without what was generated after EOS.

        Args:
            answers: (B, A) ids as generated. An answer ends with its first EOS, which belongs to it; without one it is
                all A tokens long.
            pad_id: What the rows are filled up with.
        """
        is_eos = among(answers, eos_ids)
        before_or_at_first_eos = (is_eos.cumsum(1) - is_eos.long()) == 0  # (B, A)
        answer_lengths = before_or_at_first_eos.sum(1)
        joined = torch.cat([prompts.input_ids, answers], 1)  # (B, P + A)
        start = prompts.input_ids.shape[1] - prompts.lengths  # (B,) columns of left padding
        columns = start[:, None] + torch.arange(joined.shape[1], device=joined.device)
        shifted = cls.at(joined, columns)
        keep = length_mask(prompts.lengths + answer_lengths, joined.shape[1])
        return cls(shifted.masked_fill(~keep, pad_id), prompts.lengths, answer_lengths).trim()

    @classmethod
    def concatenate(cls, parts: Sequence[Sequences], pad_id: int) -> Sequences:
        """The rows of all parts, padded to the widest of them."""
        width = max(part.input_ids.shape[1] for part in parts)
        ids = [
            torch.nn.functional.pad(part.input_ids, (0, width - part.input_ids.shape[1]), value=pad_id)
            for part in parts
        ]
        joined = cls(
            torch.cat(ids),
            torch.cat([part.prompt_lengths for part in parts]),
            torch.cat([part.answer_lengths for part in parts]),
        )
        if all("counts" in part.__dict__ for part in parts):
            joined._knowing([sum((part.counts[side] for part in parts), []) for side in (0, 1)])
        return joined
