"""Encoded rows -> one padded batch.

Prompts alone are padded on the left, since generation continues after them; everything else on the right.
"""

import json
from collections.abc import Sequence

import torch

from utils.data.batches import PairBatch, PromptBatch, RankedBatch, SupervisedBatch
from utils.data.preferences import KEPT
from utils.data.shapes import Row


def pad(rows: Sequence[Sequence[int]], pad_id: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids (B, T), lengths (B,)), T the longest row; padded on the right or on the left."""
    lengths = torch.tensor([len(row) for row in rows])  # (B,)
    ids = torch.full((len(rows), int(lengths.max())), pad_id)  # (B, T)
    for i, row in enumerate(rows):
        ids[i, ids.size(1) - len(row) if left else 0 :][: len(row)] = torch.tensor(row)
    return ids, lengths


def collate_supervised(rows: list[Row], pad_id: int) -> SupervisedBatch:
    """Rows {input_ids, prompt_length, weight}, some with a loss_mask."""
    ids, lengths = pad([row["input_ids"] for row in rows], pad_id)
    prompt_lengths, weight = column(rows, "prompt_length"), column(rows, "weight")
    mask = None
    if "loss_mask" in rows[0]:
        answers = zip((lengths - prompt_lengths).tolist(), rows, strict=True)
        learned = [[True] * n if row["loss_mask"] is None else row["loss_mask"] for n, row in answers]
        mask = pad(learned, False)[0].bool()
    return SupervisedBatch(input_ids=ids, lengths=lengths, prompt_lengths=prompt_lengths, loss_mask=mask, weight=weight)


def collate_ranking(rows: list[Row], pad_id: int) -> PairBatch:
    """Rows {chosen_ids, rejected_ids, prompt_length, weight}, some with a margin."""
    chosen, rejected = (pad([row[name] for row in rows], pad_id) for name in ("chosen_ids", "rejected_ids"))
    return PairBatch(
        chosen_ids=chosen[0],
        chosen_lengths=chosen[1],
        rejected_ids=rejected[0],
        rejected_lengths=rejected[1],
        prompt_lengths=column(rows, "prompt_length"),
        margin=torch.tensor([row["margin"] or 0.0 for row in rows]) if "margin" in rows[0] else None,
        weight=column(rows, "weight"),
    )


def collate_ranked(rows: list[Row], pad_id: int) -> RankedBatch:
    """Rows {answers_ids, ranks, prompt_length, weight}."""
    ids, lengths = pad([answer for row in rows for answer in row["answers_ids"]], pad_id)
    counts = torch.tensor([len(row["ranks"]) for row in rows])  # (B,)
    return RankedBatch(
        input_ids=ids,
        lengths=lengths,
        prompt_lengths=column(rows, "prompt_length").repeat_interleave(counts),
        row=torch.arange(len(rows)).repeat_interleave(counts),
        ranks=torch.tensor([rank for row in rows for rank in row["ranks"]]),
        weight=column(rows, "weight"),
    )


def collate_prompts(rows: list[Row], pad_id: int) -> PromptBatch:
    """Rows {input_ids, prompt, weight}, and the columns that are kept, as JSON or None."""
    ids, lengths = pad([row["input_ids"] for row in rows], pad_id, left=True)
    columns = {
        name.removeprefix(KEPT): [None if row[name] is None else json.loads(row[name]) for row in rows]
        for name in rows[0]
        if name.startswith(KEPT)
    }
    return PromptBatch(
        input_ids=ids,
        lengths=lengths,
        prompts=[row["prompt"] for row in rows],
        columns=columns,
        weight=column(rows, "weight"),
    )


def column(rows: list[Row], name: str) -> torch.Tensor:
    """(B,) the number that each row has under this name."""
    return torch.tensor([row[name] for row in rows])
