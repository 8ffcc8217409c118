"""The checks of the reward: its scores are finite and differ, it ranks held-out pairs, and not by length alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from remax.checks.findings import FAILURE, SKIPPED, WARNING, Finding, finding
from remax.core.batches import to_device
from remax.core.sequences import Sequences
from remax.evaluation.ranking import pair_scores, wins
from remax.rewards.composite import CompositeReward, Part
from utils.data.batches import PairBatch
from utils.data.collate import collate_ranking
from utils.data.config import DataConfig
from utils.data.encoding import Encoder
from utils.data.loaders import eval_order, form_of, make_loader
from utils.data.preferences import load_data_set
from utils.distributed import gather_objects, rank, world_size

ENOUGH_PAIRS = 200  # fewer can only raise a warning: of 200 fair coins, 88 to 112 are heads
ENOUGH_PER_SIDE = 50
ONE_SIDED_95 = 1.645  # standard errors above chance


def label_of(what: str, part: Part, reward: CompositeReward) -> str:
    """`what`, and which one, where there are several parts."""
    return f"{what} {part.name}" if reward.part_names else what


def check_scores(
    reward: CompositeReward, answers: Sequence[Sequences], columns: Mapping[str, Sequence[Any]] | None = None
) -> list[Finding]:
    """The rewards are finite and tell answers apart; and so do the scores of each part, where there are several.

    A reward model that scores all answers alike is broken. A function may: a rule that no answer of these few keeps.
    `columns` of the data have a value for each answer of a batch.
    """
    total, parts = zip(*(reward.score_parts(batch, columns=columns) for batch in answers), strict=True)
    columns = {"scores are finite and differ": (list(total), bool(reward.models))}
    for part in reward.parts if reward.part_names else ():
        columns[f"scores of {part.name} differ"] = ([scores[part.name] for scores in parts], part in reward.models)
    findings = []
    for name, (scores, from_model) in columns.items():
        of_all_ranks = [x for ranks in gather_objects(torch.cat(scores).tolist()) for x in ranks]
        values = torch.tensor(of_all_ranks, dtype=torch.float64)
        finite, mean, spread = bool(values.isfinite().all()), float(values.mean()), float(values.std())
        remedy = (
            "--reward_dtype fp32 or bf16 where scores overflow; a constant one teaches nothing: train the reward model"
            if from_model
            else "a constant score teaches nothing: if no answer ever keeps the rule, begin with an easier one"
        )
        figure = f"mean {mean:.3g}, standard deviation {spread:.2g} over {len(values)} answers"
        good, bad = finite and spread > 0, WARNING if finite and not from_model else FAILURE
        findings.append(finding(name, good, figure, remedy, bad=bad, mean=mean, standard_deviation=spread))
    return findings


def check_ranking(reward: CompositeReward, pairs: Iterable[PairBatch] | None) -> list[Finding]:
    """Each reward model prefers the better of two held-out answers, and not only because it is longer."""
    skipped = "no held-out pairs: give --data_path with the columns chosen and rejected"
    if not reward.models:
        skipped, pairs = "no reward model: functions score", None
    if pairs is None:
        return [Finding("reward model ranks pairs", SKIPPED, skipped)]
    findings = []
    for part in reward.models:
        rows = []
        for batch in map(to_device, pairs):
            chosen, rejected = pair_scores(part.model, batch)
            real = batch.weight > 0
            columns = (chosen, rejected, batch.chosen_lengths, batch.rejected_lengths)
            rows.append(torch.stack([column[real].double().cpu() for column in columns]))  # (4, b)
        every = torch.cat([share for shares in gather_objects(rows) for share in shares], 1)  # (4, n)
        findings += ranking_findings(*every.unbind(), name=label_of("reward model", part, reward))
    return findings


def ranking_findings(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, *, name: str = "reward model"
) -> list[Finding]:
    """Scores and lengths of n pairs, each (n,) -> two findings.

    accuracy = mean of [chosen scores higher] (a tie counts half); chance has the standard error 1 / (2 sqrt n).
    balanced = (accuracy where the chosen answer is longer + accuracy where it is shorter) / 2. A score that is length
    alone, or the reverse, is right on all of one side and on none of the other: balanced = 1/2, whatever the data.
    Its standard error is sqrt(1/n_longer + 1/n_shorter) / 4.
    """
    n = len(chosen)
    right = wins(chosen - rejected)  # (n,)
    longer, shorter = chosen_lengths > rejected_lengths, chosen_lengths < rejected_lengths
    accuracy = float(right.mean())
    longer_wins = float(wins(chosen_lengths - rejected_lengths).mean())
    z = (accuracy - 0.5) * 2 * math.sqrt(n)
    ranks = finding(
        f"{name} ranks pairs",
        z > ONE_SIDED_95,
        f"accuracy {accuracy:.3f} on {n} held-out pairs ({z:.1f} standard errors above chance)",
        "no better than chance: train the reward model longer, on pairs like these, or check that chosen and rejected "
        "are not swapped" + ("" if n >= ENOUGH_PAIRS else " (or give more held-out pairs)"),
        bad=FAILURE if n >= ENOUGH_PAIRS else WARNING,
        accuracy=accuracy,
        pairs=n,
    )
    sides = int(longer.sum()), int(shorter.sum())
    name = f"{name} is not length alone"
    if not all(sides):
        return [ranks, Finding(name, SKIPPED, f"the better answer is the longer one in {sides[0]} of {n} pairs")]
    balanced = float(right[longer].mean() + right[shorter].mean()) / 2
    more = "more" if right[longer].mean() > right[shorter].mean() else "less"
    z = (balanced - 0.5) * 4 / math.sqrt(1 / sides[0] + 1 / sides[1])
    return [
        ranks,
        finding(
            name,
            z > ONE_SIDED_95,
            f"accuracy {float(right[longer].mean()):.3f} where the better answer is longer, "
            f"{float(right[shorter].mean()):.3f} where it is shorter; 'longer wins' reaches {longer_wins:.3f}",
            f"the policy would learn to write {more}, not better: balance the lengths in the reward model's training "
            "pairs" + ("" if min(sides) >= ENOUGH_PER_SIDE else " (or give more held-out pairs)"),
            bad=FAILURE if n >= ENOUGH_PAIRS and min(sides) >= ENOUGH_PER_SIDE else WARNING,
            balanced_accuracy=balanced,
            longer_wins=longer_wins,
        ),
    ]


def held_out_pairs(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_len: int,
    limit: int = 256,
    batch_size: int = 16,
    announce: bool = True,
    rows: Dataset | None = None,
) -> DataLoader | None:
    """Up to `limit` held-out pairs, shared out over the ranks; None where the data has none.

    Args:
        max_len: Tokens of prompt and answer together.
        batch_size: Pairs per rank.
        rows: The held-out rows, where they are at hand; nothing is read then.
    """
    if rows is None:
        form = form_of(config, tokenizer)
        load = partial(load_data_set, cache_dir=config.cache_dir, form=form, announce=announce)
        rows = concatenate_datasets([held_out for _, held_out in map(load, config.data_path)])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    batch = rows.select(sorted(order[: 2 * limit]))[:]
    encoded = Encoder("ranking", tokenizer, max_len).encode(batch)
    kept = [i for i, dropped in enumerate(encoded["dropped"]) if dropped is None][:limit]
    if not kept:
        return None
    names = ("chosen_ids", "rejected_ids", "prompt_length")
    pairs = Dataset.from_dict({name: [encoded[name][i] for i in kept] for name in names})
    sampler = eval_order(len(pairs), rank(), world_size())
    collate = partial(collate_ranking, pad_id=tokenizer.pad_token_id)
    return make_loader(pairs, sampler, batch_size, collate)
