"""Encoded rows -> one padded batch.

Prompts alone are padded on the left, since generation continues after them; everything else on the right.
"""

from typing import Any

import torch


def pad(rows: list[list[int]], pad_id: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids (B, T), lengths (B,)), T the longest row; padded on the right or on the left."""
    lengths = torch.tensor([len(row) for row in rows])  # (B,)
    ids = torch.full((len(rows), int(lengths.max())), pad_id)  # (B, T)
    for i, row in enumerate(rows):
        ids[i, ids.size(1) - len(row) if left else 0 :][: len(row)] = torch.tensor(row)
    return ids, lengths


def collate_supervised(rows: list[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids (B, T) right-padded, lengths (B,), prompt_lengths (B,), weight (B,).

    Where the data set has dialogues of several answers also loss_mask (B, A), A the longest answer: True on the tokens
    that are learned, of those behind the prompt.
    """
    ids, lengths = pad([row["input_ids"] for row in rows], pad_id)
    batch = {"input_ids": ids, "lengths": lengths, **shared(rows)}
    if "loss_mask" in rows[0]:
        answers = (lengths - batch["prompt_lengths"]).tolist()
        masks = [
            [True] * n if row["loss_mask"] is None else row["loss_mask"] for n, row in zip(answers, rows, strict=True)
        ]
        batch["loss_mask"] = pad(masks, False)[0].bool()
    return batch


def collate_ranking(rows: list[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """chosen_ids (B, T1), rejected_ids (B, T2) right-padded, their lengths (B,), prompt_lengths (B,), weight (B,).

    Where the data has margins also margin (B,), 0 for rows without one.
    """
    batch = shared(rows)
    if "margin" in rows[0]:
        batch["margin"] = torch.tensor([row["margin"] or 0.0 for row in rows])
    for name in ("chosen", "rejected"):
        batch[f"{name}_ids"], batch[f"{name}_lengths"] = pad([row[f"{name}_ids"] for row in rows], pad_id)
    return batch


def collate_ranked(rows: list[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """All N answers of the B rows, one row's after the other's, each with its prompt.

    input_ids (N, T) right-padded, lengths, prompt_lengths (N,), row (N,) the index of its row, ranks (N,) 1 for the
    best and equal for ties. weight (B,) is of the rows.
    """
    ids, lengths = pad([answer for row in rows for answer in row["answers_ids"]], pad_id)
    counts = torch.tensor([len(row["ranks"]) for row in rows])  # (B,)
    batch = shared(rows)
    return {
        "input_ids": ids,
        "lengths": lengths,
        "prompt_lengths": batch["prompt_lengths"].repeat_interleave(counts),
        "row": torch.arange(len(rows)).repeat_interleave(counts),
        "ranks": torch.tensor([rank for row in rows for rank in row["ranks"]]),
        "weight": batch["weight"],
    }


def collate_prompts(rows: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """input_ids (B, P) left-padded, lengths (B,), weight (B,), prompt: the B texts."""
    ids, lengths = pad([row["input_ids"] for row in rows], pad_id, left=True)
    weight = torch.tensor([row["weight"] for row in rows])
    return {"input_ids": ids, "lengths": lengths, "weight": weight, "prompt": [row["prompt"] for row in rows]}


def shared(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What every batch with answers has: prompt_lengths (B,), weight (B,)."""
    return {
        "prompt_lengths": torch.tensor([row["prompt_length"] for row in rows]),
        "weight": torch.tensor([row["weight"] for row in rows]),
    }
