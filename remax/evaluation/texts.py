"""Scores of texts by a reward model, without training, in one process or on several ranks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from remax.core.batches import groups
from remax.core.sequences import Sequences
from utils.data.collate import pad
from utils.data.tokens import beginning, encode_answers, end_ids, join, plain_ids, with_beginning
from utils.distributed import device, gather_objects, rank, world_size
from utils.metrics import progress


@dataclass(frozen=True)
class EncodedText:
    """Prompt, answer and end token as ids, cut at the limit; an answer that was `cut` has no end token."""

    ids: list[int]
    prompt_length: int
    cut: bool


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str], max_len: int
) -> list[EncodedText]:
    """The texts as step 2 trains on them; a prompt of `max_len` tokens or more leaves no room for its answer."""
    encoded = []
    first, ends = beginning(tokenizer), end_ids(tokenizer)
    for texts in groups(zip(prompts, answers, strict=True), 1000):
        batch_prompts, batch_answers = (list(column) for column in zip(*texts, strict=True))
        plain = plain_ids(tokenizer, batch_prompts)
        tails = encode_answers(tokenizer, batch_prompts, plain, batch_answers)
        for head, tail in zip(with_beginning(first, plain), tails, strict=True):
            whole = join(head, tail, len(head) + len(tail) + 1, ends)
            encoded.append(EncodedText(whole[:max_len], min(len(head), max_len), len(whole) > max_len))
    return encoded


def as_sequences(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]) -> Sequences:
    """B prompts with their answers and end tokens, whole and on this process's device: what every role takes."""
    return _padded(encode_texts(tokenizer, prompts, answers, sys.maxsize), tokenizer.pad_token_id)


def _padded(texts: Sequence[EncodedText], pad_id: int) -> Sequences:
    ids, lengths = pad([text.ids for text in texts], pad_id)  # (B, T), (B,)
    prompt_lengths = torch.tensor([text.prompt_length for text in texts])
    return Sequences(ids, prompt_lengths, lengths - prompt_lengths).to(device())


class Scoring(Protocol):
    """What gives sequences a number each: a `Reward`, or a judge."""

    def score(self, sequences: Sequences) -> Tensor: ...


def score_texts(reward: Scoring, texts: Sequence[EncodedText], *, batch_size: int, pad_id: int) -> Tensor:
    """(n,) float32 scores in the order of `texts`, on every rank; the ranks share the work.

    Texts of similar length are scored together, the longest first: where memory is too small, that shows at once.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
    mine = order[rank() :: world_size()]
    scores: list[float] = []
    with progress(len(mine), "scoring", "texts") as bar:
        for rows in groups(mine, batch_size):
            scores += reward.score(_padded([texts[i] for i in rows], pad_id)).tolist()
            bar.update(len(rows))
    result = torch.empty(len(texts))
    for share, part in enumerate(gather_objects(scores)):
        result[order[share :: world_size()]] = torch.tensor(part)
    return result
