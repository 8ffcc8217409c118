"""Rows with the scores of their answers: which texts are scored, the rows that are written, and figures to read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from remax.evaluation.ranking import SIDES, pair_figures, pair_sums, ranked_figures, ranked_sums
from remax.evaluation.subsets import Scored, subset_figures
from remax.evaluation.texts import EncodedText, encode_texts
from utils.data.rows import TextRow
from utils.data.shapes import Example, dense, usable_texts


@dataclass(frozen=True)
class Texts:
    """The texts of all rows, one after the other, and where they belong.

    The `place` of a text is its row, and "chosen" or "rejected", or which of the row's several ranked answers it is.
    """

    encoded: list[EncodedText]
    place: list[tuple[int, str | int]]
    reasons: list[str | None]  # for each row why it is not scored
    pairs: bool  # whether some row has two answers

    def index(self) -> dict[tuple[int, str | int], int]:
        """Place -> number of the text."""
        return {place: i for i, place in enumerate(self.place)}


def answers_of(example: Example) -> dict[str | int, str]:
    """The answers of a row by their place in it, see `Texts`."""
    if example.answers is not None:
        return dict(enumerate(example.answers))
    pair = {"chosen": example.chosen, "rejected": example.rejected}
    return {column: answer for column, answer in pair.items() if answer is not None}


def encode_rows(rows: Sequence[TextRow], tokenizer: PreTrainedTokenizerBase, max_len: int) -> Texts:
    """Every answer of every row, except where the prompt alone fills `max_len`."""
    reasons = [row.skipped or (None if answers_of(row.example) else "without an answer") for row in rows]
    place, prompts, answers = [], [], []
    for i, row in enumerate(rows):
        for column, answer in answers_of(row.example).items() if reasons[i] is None else ():
            place.append((i, column))
            prompts.append(row.prompt)
            answers.append(answer)
    encoded = encode_texts(tokenizer, prompts, answers, max_len)
    for (i, _), text in zip(place, encoded, strict=True):
        if text.prompt_length >= max_len:
            reasons[i] = "whose prompt alone fills --max_seq_len"
    kept = [k for k, (i, _) in enumerate(place) if reasons[i] is None]
    pairs = any(column == "rejected" for _, column in place)
    return Texts([encoded[k] for k in kept], [place[k] for k in kept], reasons, pairs)


def describe_rows(name: str, rows: Sequence[TextRow], texts: Texts, max_len: int) -> str:
    """How many rows are scored, and what becomes of the others."""
    scored = sum(reason is None for reason in texts.reasons)
    lines = [f"{name}: {len(rows)} rows, {scored} to score"]
    left_out = Counter(reason for reason in texts.reasons if reason is not None)
    if left_out:
        listed = "; ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
        lines.append(f"without a score: {sum(left_out.values())} rows: {listed}")
    cut = sum(text.cut for text in texts.encoded)
    if cut:
        lines.append(f"--max_seq_len {max_len}: {cut} of {len(texts.encoded)} answers are cut, and have no end token")
    return "\n".join(lines)


def scored_rows(rows: Sequence[TextRow], texts: Texts, scores: torch.Tensor) -> list[dict]:
    """The rows as they were read, with their scores.

    These are chosen_score and rejected_score, or score where there are only single answers, or answer_scores, a list in
    the order of the row's answers. A row that is not scored has null there, and the reason in the column `not_scored`.
    """
    names = {"chosen": "chosen_score", "rejected": "rejected_score"} if texts.pairs else {"chosen": "score"}
    ranked = any(row.example.answers is not None for row in rows)
    found = dict(zip(texts.place, scores.tolist(), strict=True))
    result = []
    for i, (row, reason) in enumerate(zip(rows, texts.reasons, strict=True)):
        own: dict[str, Any] = {name: found.get((i, column)) for column, name in names.items()}
        if ranked:
            own = {"answer_scores": None if reason else [found[i, k] for k in answers_of(row.example)]}
        result.append(row.original | own | ({"not_scored": reason} if reason else {}))
    return result


def report(rows: Sequence[TextRow], texts: Texts, scores: torch.Tensor, config: PreTrainedConfig) -> str:
    """The figures of all pairs, of all rankings, or of all single answers."""
    known = ""
    if hasattr(config, "score_mean"):
        known = f"held-out scores in training: mean {config.score_mean:.3f}, spread {config.score_std:.3f}"
    sums = figure_sums(rows, texts, scores)
    if not sums or not sums["pairs"]:
        mean = f"{scores.mean():.3f}  (spread {scores.std(correction=0):.3f}, {len(scores)} answers)"
        return table([("mean score", mean), ("range", f"{scores.min():.3f} to {scores.max():.3f}")], known)
    figures, n = pair_figures(sums) | ranked_figures(sums), int(sums["pairs"])
    if "rankings" in sums:  # without an error: the pairs of one prompt are no independent draws
        counted = f"({n} pairs of {sums['rankings']:.0f} prompts; a tie counts half)"
        best = f"{figures['best_of_k_accuracy']:.3f}  (blind choice: {figures['best_of_k_chance']:.3f})"
        lines = [("accuracy", f"{figures['accuracy']:.3f}  {counted}"), ("best of K", best)]
    else:
        error = (figures["accuracy"] * (1 - figures["accuracy"]) / n) ** 0.5
        lines = [("accuracy", f"{figures['accuracy']:.3f} +- {error:.3f}  ({n} pairs; a tie counts half)")]
    for side in SIDES:
        if f"accuracy_{side}" in figures:
            share, count = figures[f"accuracy_{side}"], figures[f"pairs_{side}"]
            lines.append((f"  {side.replace('_', ' ')}", f"{share:.3f}  ({count:.0f} pairs)"))
    lines += [
        ("longer wins", f"{figures['longer_wins']:.3f}  (what preferring the longer answer would reach)"),
        ("mean score, chosen", f"{figures['chosen_score']:.3f}"),
        ("mean score, rejected", f"{figures['rejected_score']:.3f}"),
        ("margin", f"{figures['margin']:.3f}"),
        *by_subset(rows, texts, scores),
    ]
    return table(lines, known)


def by_subset(rows: Sequence[TextRow], texts: Texts, scores: torch.Tensor) -> list[tuple[str, str]]:
    """A line for each value of the column `subset`, and their mean, which RewardBench 2 calls the score."""
    subsets: dict[str, list[Scored]] = defaultdict(list)
    found = dict(zip(texts.place, scores.tolist(), strict=True))
    for i, row in enumerate(rows):
        subset = row.original.get("subset")
        if not isinstance(subset, str) or texts.reasons[i] is not None:
            continue
        ranks: dict[str | int, int] = dict(enumerate(row.example.ranks or ())) | {"chosen": 1, "rejected": 2}
        right = [found[i, k] for k in answers_of(row.example) if ranks[k] == 1]
        wrong = [found[i, k] for k in answers_of(row.example) if ranks[k] != 1]
        if right and wrong:
            subsets[subset].append(Scored(str(row.original.get("id")), right, wrong))
    figures = subset_figures(subsets)
    lines = [(f"subset {name}", f"{figures[name]:.3f}  ({len(subsets[name])} rows)") for name in sorted(figures)]
    return [*lines, ("mean of subsets", f"{fmean(figures.values()):.3f}")] if lines else []


def figure_sums(rows: Sequence[TextRow], texts: Texts, scores: torch.Tensor) -> dict[str, float]:
    """The sums that figures are made of; none where there are only single answers.

    Of several ranked answers those count that training would use, as texts: see `utils.data.shapes.usable_texts`.
    """
    index, lengths = texts.index(), torch.tensor([len(text.ids) for text in texts.encoded])
    if texts.pairs:
        pairs = [(index[i, "chosen"], index[i, column]) for i, column in texts.place if column == "rejected"]
        if not pairs:
            return {}
        chosen, rejected = (torch.tensor(column) for column in zip(*pairs, strict=True))  # (n,) numbers of texts
        return pair_sums(scores[chosen], scores[rejected], lengths[chosen], lengths[rejected])
    numbers: list[int] = []
    of_row: list[int] = []
    ranks: list[int] = []
    for i, row in enumerate(rows):
        all_answers, all_ranks = row.example.answers, row.example.ranks
        if all_answers is None or all_ranks is None or texts.reasons[i] is not None:
            continue
        kept = usable_texts(all_answers, all_ranks)
        levels = dense([all_ranks[k] for k in kept])
        if len(set(levels)) > 1:
            numbers += [index[i, k] for k in kept]
            of_row += [of_row[-1] + 1 if of_row else 0] * len(kept)
            ranks += levels
    if not numbers:
        return {}
    rankings = (torch.tensor(of_row), torch.tensor(ranks), lengths[numbers], torch.ones(of_row[-1] + 1))
    return ranked_sums(scores[numbers], *rankings)


def table(lines: list[tuple[str, str]], note: str) -> str:
    return "\n".join([f"  {name:<21} {value}" for name, value in lines] + ([f"  {note}"] if note else []))


def show(rows: Sequence[TextRow], texts: Texts, scores: torch.Tensor) -> str:
    index, blocks = texts.index(), []
    for i, row in enumerate(rows):
        better, worse = (float(scores[index[i, column]]) for column in ("chosen", "rejected"))
        verdict = "as it should be" if better > worse else "the wrong way round"
        blocks.append(
            f"\n{row.prompt.strip()}\n"
            f"  good answer, score {better:.4f}: {(row.example.chosen or '').strip()}\n"
            f"  bad answer, score {worse:.4f}: {(row.example.rejected or '').strip()}\n"
            f"  difference {better - worse:.4f}, {verdict}"
        )
    return "\n".join(blocks)
