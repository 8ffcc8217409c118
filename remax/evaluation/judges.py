"""Who says which of two answers is better: a reward model, a causal language model, or annotations of AlpacaEval."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from remax.core.batches import groups
from remax.core.sequences import Sequences
from remax.engines.policy import Actor
from remax.engines.scorer import Reward
from remax.evaluation.answers import write_answer
from remax.evaluation.texts import EncodedText, encode_texts, score_texts
from remax.evaluation.winrates import Comparison
from utils.data.chat import template_of
from utils.data.sources import json_objects
from utils.run import UserError

FIRST, SECOND = "A", "B"  # what a language model calls the answers
CASE = """Here are a question and two answers to it.

[Question]
{question}

[Answer A]
{first}

[Answer B]
{second}

Which answer is the better one: more correct, more helpful and to the point, whatever its length? Reply with its \
letter alone, A or B."""


def reward_scores(
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    max_len: int,
    batch_size: int,
    flag: str,
) -> tuple[Tensor, int]:
    """(n,) scores of answers, and how many of these were cut at `max_len` tokens.

    Raises:
        UserError: A question alone fills that, or the chat template refuses it; `flag` names the model.
    """
    template = template_of(tokenizer)
    written = [write_answer(q, answer, template, flag) for q, answer in zip(questions, answers, strict=True)]
    texts = encode_texts(tokenizer, [prompt for prompt, _ in written], [answer for _, answer in written], max_len)
    for question, text in zip(questions, texts, strict=True):
        if text.prompt_length >= max_len:
            raise UserError(f"--max_seq_len {max_len}: is filled by a question alone: {question[:60]!r} ...; raise it")
    scores = score_texts(reward, texts, batch_size=batch_size, pad_id=tokenizer.pad_token_id)
    return scores, sum(text.cut for text in texts)


@dataclass(frozen=True)
class Positions:
    """How much a language model's verdicts follow the places of the answers.

    Attributes:
        first: Mean probability that it gives the answer shown first; 0.5 for a fair judge.
        disagreements: Share of the comparisons on which the two orders disagree, which count as ties.
        left_out: Comparisons too long for it.
    """

    first: float
    disagreements: float
    left_out: int


class _LogProbs:
    """Gives sequences the log-prob of their answer."""

    def __init__(self, actor: Actor):
        self.actor = actor

    def score(self, sequences: Sequences) -> Tensor:
        """(B,) sums over the answer's tokens."""
        return self.actor.old_logprobs(sequences).sum(1)


def judge_pairs(
    actor: Actor,
    tokenizer: PreTrainedTokenizerBase,
    comparisons: Sequence[Comparison],
    *,
    max_len: int,
    batch_size: int,
    flag: str,
) -> tuple[list[Comparison], Positions]:
    """The comparisons with a language model's verdicts; it sees each in both orders.

    Asked for a letter, the model gives A and B the probabilities P(A) and P(B), and A then has P(A) / (P(A) + P(B)).
    `p` is the mean of both orders. Where they decide differently, the verdict is a tie.
    """
    template = template_of(tokenizer)
    replies: list[tuple[str, str]] = []  # of each comparison: the model's answer first, then second; for each, A and B
    for one in comparisons:
        for first, second in ((one.second, one.first), (one.first, one.second)):
            case = CASE.format(question=one.prompt.strip(), first=first, second=second)
            replies += [write_answer(case, letter, template, flag) for letter in (FIRST, SECOND)]
    encoded = encode_texts(tokenizer, [prompt for prompt, _ in replies], [reply for _, reply in replies], sys.maxsize)
    texts = [text for both in groups(encoded, 2) for text in _up_to_the_difference(both)]
    fits = [all(len(text.ids) <= max_len for text in texts[4 * i : 4 * i + 4]) for i in range(len(comparisons))]
    kept = [text for i, fit in enumerate(fits) if fit for text in texts[4 * i : 4 * i + 4]]
    if not kept:
        raise UserError(f"{flag}: every comparison is longer than the {max_len} tokens that the judge reads")
    found = score_texts(_LogProbs(actor), kept, batch_size=batch_size, pad_id=tokenizer.pad_token_id)
    shown_first = torch.softmax(found.double().view(-1, 2, 2), -1)[..., 0]  # (n, 2) probability of A, in both orders
    wins = torch.stack([shown_first[:, 0], 1 - shown_first[:, 1]], 1)  # (n, 2) of the model's answer
    decided = 0.5 + 0.5 * (wins - 0.5).sign()
    agree = decided[:, 0] == decided[:, 1]
    verdicts = iter(zip(wins.mean(1).tolist(), torch.where(agree, decided[:, 0], 0.5).tolist(), strict=True))
    judged = []
    for one, fit in zip(comparisons, fits, strict=True):
        p, verdict = next(verdicts) if fit else (None, None)
        judged.append(replace(one, p=p, verdict=verdict))
    return judged, Positions(float(shown_first.mean()), 1 - float(agree.double().mean()), fits.count(False))


def _up_to_the_difference(texts: Sequence[EncodedText]) -> list[EncodedText]:
    """Two answers to one prompt, cut behind the first token that tells them apart."""
    a, b = (text.ids for text in texts)
    end = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)) - 1) + 1
    return [replace(text, ids=text.ids[:end]) for text in texts]


def read_annotations(file: str, flag: str) -> list[Comparison]:
    """The comparisons of a file of alpaca_eval's annotations.

    Raises:
        UserError: No such file, or rows that are none.
    """
    texts = ("instruction", "output_1", "output_2", "generator_1", "generator_2")
    expected = f"annotations of alpaca_eval: rows with {', '.join(texts)} and preference"
    found = []
    for i, (place, row) in enumerate(json_objects(file, flag, expected)):
        if wrong := [name for name in texts if not isinstance(row.get(name), str)]:
            raise UserError(f"{flag} {file}: {place} has no text in {', '.join(wrong)}; expected {expected}")
        preference = row.get("preference")
        if preference is not None and (
            not isinstance(preference, (int, float)) or not (preference == 0 or 1 <= preference <= 2)
        ):
            raise UserError(f"{flag} {file}: {place} has the preference {preference!r}; expected 1 to 2, or null")
        p = None if preference is None else (preference or 1.5) - 1  # 0 is a draw
        verdict = row.get("verdict")  # ours: of a judge that is asked twice, see `judge_pairs`
        if p is None or verdict not in (0, 0.5, 1):
            verdict = None if p is None else (p > 0.5) + 0.5 * (p == 0.5)
        models = (row["generator_1"], row["generator_2"])
        answers = (row["instruction"], row["output_1"], row["output_2"])
        found.append(Comparison(*answers, models, p, verdict, row["index"] if isinstance(row.get("index"), int) else i))
    if not found:
        raise UserError(f"{flag} {file}: holds no annotation; expected {expected}")
    return found
