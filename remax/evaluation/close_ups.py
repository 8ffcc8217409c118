"""A few answers of an evaluation token by token, each beside the greedy answer to its prompt: for people to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from remax.core.rollout import Rollout
from remax.core.sequences import Prompts
from remax.engines.policy import Actor
from remax.engines.scorer import Reward
from remax.evaluation.answers import Answer, read_answers
from remax.rewards.composite import CompositeReward
from utils.data.batches import PromptBatch
from utils.present import present

Weigh = Callable[[Rollout, Tensor], Tensor]  # answers with a baseline, their log-probs (B, A) -> advantages (B, A)
BROKEN = "\N{REPLACEMENT CHARACTER}"  # a token may end within a character


def greedy_answers(
    actor: Actor, reward: Reward | CompositeReward, batch: PromptBatch, count: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Answer], Tensor]:
    """The greedy answers to the first `count` prompts of a batch, and their rewards, (count,)."""
    prompts = Prompts(batch.input_ids[:count], batch.lengths[:count])
    sequences = present(actor.rollout(prompts, samples=0, greedy=True).greedy, "the greedy rollout")
    columns = {name: values[:count] for name, values in batch.columns.items()}
    found = read_answers(sequences, tokenizer, actor.model.hf.generation_config.eos_token_id)
    return found, reward.score_parts(sequences, columns=columns)[0]


def tokens_of(
    rollout: Rollout, logprobs: Tensor, baseline: Tensor, tokenizer: PreTrainedTokenizerBase, weigh: Weigh | None
) -> list[dict[str, list[Any]]]:
    """What there is to say of each token of the first answers of a rollout.

    Args:
        rollout: With the reference's log-probs.
        logprobs: (B, A) under the policy.
        baseline: (n,) rewards of the greedy answers to the first n prompts.

    Returns:
        For each of the n answers its `tokens` as text, `kl` (log pi - log pi_ref) and with `weigh` the `advantage`.
    """
    some = replace(rollout, old_logprobs=logprobs).select(slice(0, len(baseline)))
    some, own = replace(some, baseline=baseline), present(some.old_logprobs, "the log-probs")
    numbers = {"kl": own - present(some.reference_logprobs, "Rollout.reference_logprobs")}
    if weigh is not None:
        numbers["advantage"] = weigh(some, own)
    lists = {name: values.double().tolist() for name, values in numbers.items()}
    ids, found = some.sequences.input_ids.tolist(), []
    for i, (start, length) in enumerate(zip(*some.sequences.counts, strict=True)):
        per_token = {name: [round(value, 3) + 0.0 for value in of_rows[i][:length]] for name, of_rows in lists.items()}
        found.append({"tokens": pieces(tokenizer, ids[i][start : start + length])} | per_token)
    return found


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, special ones included; joined they are the whole.

    A character of several tokens belongs to the last of them, the others add nothing.
    """
    found: list[str] = []
    start = told = 0  # ids[told:] are yet to be told; what ids[start:told] say is decoded again, as their neighbours
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[start:end])))
        if text.endswith(BROKEN) and end < len(ids):
            found.append("")
            continue
        found.append(text[len(str(tokenizer.decode(list(ids[start:told])))) :])
        start, told = told, end
    return found
