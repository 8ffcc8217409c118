"""All checks of a model's way through training, in the order in which they make sense.

A check answers "ok", "warning" (training goes on, but look at this), "failure" (the gradient or the reward would be
wrong: do not train) or "skipped". All ranks take part in every check and reach the same answer: numbers are combined
over the ranks before anything is decided. The random state is put back afterwards, so a run draws the same answers with
and without its examination.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from remax.checks.findings import FAILURE, SKIPPED, Finding, Report
from remax.checks.generation import (
    check_batching,
    check_drawn,
    check_dropout,
    check_greedy,
    check_noise,
    check_padding,
    check_reference,
    take_probe,
)
from remax.checks.models import check_fit, check_ranks, check_reload, check_sampling, check_tokens
from remax.checks.rewards import check_ranking, check_scores
from remax.core.sequences import Prompts
from remax.engines.policy import Actor, Reference
from remax.evaluation.policy import isolated_rng
from remax.rewards.composite import CompositeReward
from utils.data.batches import PairBatch
from utils.data.collate import pad
from utils.data.shapes import as_dialogue
from utils.data.tokens import encode_prompts
from utils.distributed import device

PROBE_TEXTS = (
    "Why is the sky blue?",
    "Name three birds.",
    "I have an hour before my train leaves and have never seen this town. What should I look at?",
    "Thanks!",
)


def examine(
    actor: Actor,
    reward: CompositeReward,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    reference: Reference | None = None,
    pairs: Iterable[PairBatch] | None = None,
    max_prompt_tokens: int,
    reload_limit: int = 500_000_000,
) -> Report:
    """Makes all checks; every rank calls it with as many prompts as the others.

    Args:
        prompts: A batch of this rank's, of which a few rows are used.
        columns: Of the data, a value for each prompt, for reward functions.
        pairs: Batches of held-out pairs, see `held_out_pairs`.
        max_prompt_tokens: Length of the longest prompt in training.
        reload_limit: An actor of more parameters is not written to disk and read again; 0: none is.
    """
    findings = [*check_tokens(actor, reward, reference, tokenizer), check_fit(actor, reward, max_prompt_tokens)]
    if any(found.result == FAILURE for found in findings):  # running the models could end in an index error
        return Report([*findings, Finding("generation, rewards and export", SKIPPED, "the models do not go together")])
    findings += [check_sampling(actor), check_ranks()]
    with isolated_rng(0), torch.no_grad():
        probe = take_probe(actor, prompts.to(device()), columns)
        findings += [
            check_greedy(actor, probe),
            check_drawn(actor, probe),
            check_padding(actor, probe),
            check_noise(actor, probe, len(tokenizer)),
            check_batching(actor, reward, probe),
            check_dropout(actor, probe),
            check_reference(actor, reference, probe),
            *check_scores(reward, [probe.sampled, probe.greedy], probe.columns),
            *check_ranking(reward, pairs),
            check_reload(actor, tokenizer, probe, reload_limit),
        ]
    return Report(findings)


def built_in_prompts(tokenizer: PreTrainedTokenizerBase, max_len: int) -> Prompts:
    """A few questions of unequal length, each cut at its front to `max_len` tokens."""
    ids = encode_prompts(tokenizer, [as_dialogue(text) for text in PROBE_TEXTS])
    return Prompts(*pad([row[-max_len:] for row in ids], tokenizer.pad_token_id, left=True))
