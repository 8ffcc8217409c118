"""Figures on held-out data, reduced over ranks: perplexity, and the policy's reward, KL, entropy and length.

Every function returns the same numbers on every rank, whatever their number: sums and counts are reduced, never means
of means, and the rows that fill up a rank's last batch carry weight 0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from remax.core.batches import to_device
from remax.core.rollout import Rollout
from remax.core.sampling import Sampling
from remax.core.sequences import Prompts, Sequences, learned_mask
from remax.engines.policy import Actor, Reference
from remax.engines.scorer import Reward
from remax.evaluation.answers import read_answers
from remax.evaluation.close_ups import Weigh, greedy_answers, tokens_of
from remax.models.loading import evaluating
from remax.rewards.composite import CompositeReward
from utils.data.batches import PromptBatch, SupervisedBatch
from utils.distributed import device, gather_objects, rank, sum_across_ranks, world_size
from utils.present import present


@torch.no_grad()
def perplexity(actor: Actor, loader: Iterable[SupervisedBatch]) -> dict[str, float]:
    """Perplexity: exp of the mean negative log-likelihood per answer token, EOS included.

    Returns:
        `perplexity`, and the mean itself as `loss`, in nats per token.
    """
    nll, tokens = torch.zeros((), dtype=torch.float64, device=device()), 0.0
    with evaluating(actor.model):
        for batch in map(to_device, loader):
            sequences = Sequences.from_batch(batch)
            weight = batch.weight[:, None] * learned_mask(batch, sequences)  # (B, A)
            logprobs = actor.logprobs(sequences, sampling=Sampling()).logprobs  # the model's, at any temperature
            nll -= (logprobs * weight).sum().double()
            tokens += float(weight.sum())
    total = sum_across_ranks({"nll": nll, "tokens": tokens})
    loss = total["nll"] / max(total["tokens"], 1.0)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


@dataclass
class PolicyEvaluation:
    """What `evaluate_policy` finds: figures reduced over the ranks, and the answers of all ranks.

    Each of these has `prompt`, `answer`, `length` and `reward` (and `reward/NAME` for each part of several).

    Attributes:
        close_ups: A few of the answers again, token by token.
    """

    figures: dict[str, float]
    answers: list[dict[str, Any]] = field(default_factory=list)
    close_ups: list[dict[str, Any]] = field(default_factory=list)

    def sample(self) -> str:
        """One prompt with its answer, to read."""
        row = self.answers[0]
        return f"--- prompt: {row['prompt'].strip()}\n--- answer (reward {row['reward']}): {row['answer'].strip()}"


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Random draws inside start from the same state every time, and leave the state outside as it was.

    So evaluations can be compared, and evaluating more often does not change the training.
    """
    with torch.random.fork_rng([device()] if device().type == "cuda" else []):
        torch.manual_seed(seed + rank())
        yield


@torch.no_grad()
def evaluate_policy(
    actor: Actor,
    reference: Reference,
    reward: Reward | CompositeReward,
    loader: Iterable[PromptBatch],
    tokenizer: PreTrainedTokenizerBase,
    *,
    greedy: bool = False,
    answers: Iterable[SupervisedBatch] | None = None,
    seed: int = 0,
    close_ups: int = 0,
    weigh: Weigh | None = None,
) -> PolicyEvaluation:
    """Answers held-out prompts (sampled, or greedy) and measures the answers.

    Args:
        answers: Prompts with the data's own answers.
        seed: Of the sampled answers.
        close_ups: So many answers, of the ranks' first batches, are given token by token as well: `tokens`, `kl` and
            `advantage`, see `tokens_of`, beside the greedy answers: `greedy` and `greedy_reward`.
        weigh: Gives the advantages of their tokens.

    Returns:
        The answers, and these figures:

        - `reward`, `reward_standard_error`: mean score and its standard error over prompts;
        - `reward/NAME`: mean score of each part, where there are several;
        - `length`: answer tokens;
        - `ended`: share of answers that reach EOS;
        - `kl`: sum of log pi - log pi_ref over an answer, in nats per answer;
        - `kl_per_token`: the same over all answer tokens;
        - `entropy`: nats per token;
        - `reference_perplexity`: exp of the reference's mean negative log-likelihood of the answers;
        - `perplexity`: the policy's, of the data's own answers, where `answers` gives some: what it forgets.
    """
    names = [f"reward/{name}" for name in reward.part_names]
    names += ("answers", "tokens", "reward", "reward_squares", "ended", "kl", "entropy", "reference_nll")
    sums: dict[str, Tensor] = {name: torch.zeros((), dtype=torch.float64, device=device()) for name in names}
    eos_ids = actor.model.hf.generation_config.eos_token_id
    readable: list[dict[str, Any]] = []
    rewards: list[float] = []  # of the rows of `readable`, not rounded
    first: tuple[PromptBatch, Rollout, Tensor] | None = None  # with the log-probs of the answers
    close: list[dict[str, Any]] = []
    with evaluating(actor.model), isolated_rng(seed):
        for batch in map(to_device, loader):
            prompts = Prompts(batch.input_ids, batch.lengths)
            found = actor.rollout(prompts, samples=0 if greedy else 1, greedy=greedy)
            sequences = present(found.greedy if greedy else found.sampled, "the rollout")
            score, parts = reward.score_parts(sequences, columns=batch.columns)  # (B,), and each part's by name
            output = actor.logprobs(sequences, entropy=True)
            reference_logprobs = reference.logprobs(sequences)
            if first is None:
                first = batch, Rollout(sequences, score, reference_logprobs=reference_logprobs), output.logprobs
            weight = batch.weight  # (B,)
            token_weight = weight[:, None] * sequences.answer_mask  # (B, A)
            additions = {
                "answers": weight,
                "tokens": token_weight,
                "reward_squares": weight * score**2,
                "ended": weight * sequences.ended(eos_ids),
                "kl": token_weight * (output.logprobs - reference_logprobs),
                "entropy": token_weight * present(output.entropy, "PolicyOutput.entropy"),
                "reference_nll": -token_weight * reference_logprobs,
            }
            scores = {"reward": score} | {f"reward/{name}": part for name, part in parts.items()}
            additions = {name: weight * values for name, values in scores.items()} | additions
            for name, value in additions.items():
                sums[name] += value.double().sum()
            texts = read_answers(sequences, tokenizer, eos_ids)
            numbers = {name: values.tolist() for name, values in scores.items()}
            for i in weight.nonzero().flatten().tolist():
                rounded = {name: round(values[i], 4) for name, values in numbers.items()}
                answer = {"answer": texts[i].text, "length": texts[i].tokens}
                readable.append({"prompt": batch.prompts[i]} | answer | rounded)
                rewards.append(numbers["reward"][i])
        if first is not None and close_ups:  # behind all draws, which are what they would be without
            batch, rollout, logprobs = first
            count = min(math.ceil(close_ups / world_size()), len(rollout))
            texts, baseline = greedy_answers(actor, reward, batch, count, tokenizer)
            closely = tokens_of(rollout, logprobs, baseline, tokenizer, weigh)
            for row, i in zip(readable, batch.weight[:count].nonzero().flatten().tolist(), strict=False):
                beside = {"greedy": texts[i].text, "greedy_reward": round(float(baseline[i]), 4)}
                close.append(row | beside | closely[i])
    rows = [row for of_rank in gather_objects(list(zip(readable, rewards, strict=True))) for row in of_rank]
    figures = _figures(sum_across_ranks(sums), [(row["prompt"], reward) for row, reward in rows])
    if answers is not None:
        figures["perplexity"] = perplexity(actor, answers)["perplexity"]
    close = [row for of_rank in gather_objects(close) for row in of_rank]
    return PolicyEvaluation(figures, [row for row, _ in rows], close[:close_ups])


def _figures(total: dict[str, float], rewards: list[tuple[str, float]]) -> dict[str, float]:
    """The figures of `evaluate_policy`, from sums over the answers of all ranks, and each prompt with its reward.

    Answers to one prompt are alike: independent are the G prompts, not the n answers. So the variance of the mean is
    G / (G - 1) * sum_g s_g^2 / n^2, with s_g the deviations from the mean added up over the answers to prompt g.
    """
    n, tokens = max(total["answers"], 1.0), max(total["tokens"], 1.0)
    mean = total["reward"] / n
    deviations, squares = defaultdict[str, float](float), defaultdict[str, float](float)
    for prompt, reward in rewards:
        deviations[prompt] += reward - mean
        squares[prompt] += (reward - mean) ** 2
    prompts = max(len(deviations), 1)
    shared = math.fsum(deviations[prompt] ** 2 - squares[prompt] for prompt in deviations)  # 0 where all differ
    spread = max(total["reward_squares"] / n - mean**2 + shared / n, 0.0)
    variance = spread * prompts / max(prompts - 1, 1)
    figures = {
        "reward": mean,
        "reward_standard_error": math.sqrt(variance / n),
        "length": total["tokens"] / n,
        "ended": total["ended"] / n,
        "kl": total["kl"] / n,
        "kl_per_token": total["kl"] / tokens,
        "entropy": total["entropy"] / tokens,
        "reference_perplexity": math.exp(min(total["reference_nll"] / tokens, 700.0)),
    }
    return figures | {name: total[name] / n for name in total if name.startswith("reward/")}
