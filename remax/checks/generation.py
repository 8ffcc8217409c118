"""The checks of generation: it agrees with the training forward, whatever the padding and the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from remax.checks.findings import EXACT, SKIPPED, TOLERANCE, WARNING, Finding, Report, combine, finding, gap
from remax.checks.rewards import label_of
from remax.core.sampling import Sampling
from remax.core.sequences import Prompts, Sequences
from remax.engines.base import FrozenEngine
from remax.engines.policy import Actor, Reference
from remax.engines.roles import Role
from remax.generation.decoder import Answers
from remax.models.loading import evaluating
from remax.rewards.composite import CompositeReward
from utils.present import present

PROBE_ROWS = 4  # prompts on each rank, besides one that is there to be padded
PROBE_TOKENS = 32
AGREES = "generation agrees with the forward"


@dataclass(frozen=True)
class Probe:
    """Answers to a few prompts, generated as training generates them."""

    prompts: Prompts  # the last row is the second half of the longest prompt, so that padding always occurs
    sampled: Sequences
    greedy: Sequences
    drawn_from: Tensor  # (B, A) log-probs of the sampled tokens in the distributions that generation drew them from
    columns: dict[str, list[Any]] = field(default_factory=dict)  # of the data, B values each


def with_padded_row(prompts: Prompts, rows: int) -> Prompts:
    """The first `rows` prompts, and the second half of the longest of them: it has padding on the left."""
    ids, lengths = prompts.input_ids[:rows], prompts.lengths[:rows]  # (B, P), (B,)
    longest = int(lengths.argmax())
    half = torch.clamp(lengths[longest] // 2, min=1)
    return Prompts(torch.cat([ids, ids[longest : longest + 1]]), torch.cat([lengths, half[None]]))


def _answers(actor: Actor, prompts: Prompts, samples: int) -> Answers:
    """The actor's, cut where the probe ends."""
    settings = actor.generation
    actor.generation = replace(settings, max_new_tokens=min(settings.max_new_tokens, PROBE_TOKENS))
    try:
        return actor.rollout(prompts, samples=samples, greedy=True, logprobs=True)
    finally:
        actor.generation = settings


def take_probe(actor: Actor, prompts: Prompts, columns: Mapping[str, Sequence[Any]] | None = None) -> Probe:
    """Has the actor answer the first few prompts; `columns` of the data have a value for each."""
    longest = int(prompts.lengths[:PROBE_ROWS].argmax())
    of_probe = {name: [*values[:PROBE_ROWS], values[longest]] for name, values in (columns or {}).items()}
    prompts = with_padded_row(prompts, PROBE_ROWS)
    answers = _answers(actor, prompts, samples=1)
    sampled, greedy = present(answers.sampled, "the sampled rollout"), present(answers.greedy, "the greedy rollout")
    return Probe(prompts, sampled, greedy, present(answers.logprobs, "Answers.logprobs"), of_probe)


@torch.no_grad()
def logprobs_under(role: Role, sequences: Sequences, sampling: Sampling) -> Tensor:
    """(B, A) log-probs by the training forward, without dropout."""
    with evaluating(role.model):
        return role.ask(sequences, sampling=sampling)[0]


def check_greedy(actor: Actor, probe: Probe) -> Finding:
    """Every greedy token has the largest logit of the training forward.

    With top_k = 1 the evaluated distribution keeps the largest logit z* and the given token's z, so its log-prob is
    -log(1 + exp(z* - z)), and 0 when the token is the largest itself: the distance z* - z without any full logits.
    """
    logp = logprobs_under(actor, probe.greedy, Sampling(top_k=1)).double()[probe.greedy.answer_mask]
    distance = torch.expm1(-logp).log().clamp(min=0.0)  # log(0) = -inf, clamped: the token is the argmax
    tolerance = 10 * TOLERANCE["fp32"] if actor.engine.config.dtype == "fp32" else 0.25  # 2 units of bf16 at 16
    missed, size = combine((distance > tolerance).double()), combine(distance)
    return finding(
        "greedy tokens are the argmax",
        missed.mean <= 0.01,
        f"{missed.mean:.1%} of {missed.count} tokens are not, largest logit distance {size.largest:.2g}",
        "the greedy baseline would be no greedy answer: look for logits processors, a patched generate, or dropout in "
        "generation",
        share=missed.mean,
        largest=size.largest,
    )


def check_drawn(actor: Actor, probe: Probe) -> Finding:
    """The log-probs that generation drew its tokens with equal those of the training forward."""
    logprobs = logprobs_under(actor, probe.sampled, actor.generation.sampling)
    size = gap(probe.drawn_from, logprobs, probe.sampled.answer_mask)
    return finding(
        AGREES,
        size.mean <= TOLERANCE[actor.engine.config.dtype],
        f"log-probs differ by {size} nats over {size.count} tokens",
        "the update would learn from another distribution than the answers come from: look for a penalty or top_k in "
        "generation_config.json, an attention kernel that mishandles padding (--attn_implementation sdpa), or use "
        "--actor_dtype fp32 to see whether rounding is the cause",
        mean=size.mean,
        largest=size.largest,
    )


def decode_serves(actor: Actor, report: Report | None) -> bool:
    """Whether the decode's log-probs may stand for those of the update's forward, which need not be computed then.

    Both must be of one distribution, and equal but for float32's rounding; `report` may say that they are not. In 16
    bits, or with rounded factors (--tf32), the two round differently, and a ratio of them would be noise.
    """
    exact = actor.engine.config.dtype == "fp32" and torch.get_float32_matmul_precision() == "highest"
    drawn = [found for found in report.findings if found.check == AGREES] if report is not None else []
    return (
        exact
        and actor.sampling == actor.generation.sampling
        and all(found.numbers["largest"] <= EXACT for found in drawn)
    )


def check_padding(actor: Actor, probe: Probe) -> Finding:
    """A prompt decoded in a batch with longer ones has the log-probs that it has alone."""
    width = int(probe.prompts.lengths[-1])
    alone = Prompts(probe.prompts.input_ids[-1:, -width:], probe.prompts.lengths[-1:])
    tokens, logprobs = [], []
    for prompts in (probe.prompts, alone):
        answers = _answers(actor, prompts, samples=0)
        greedy = present(answers.greedy, "the greedy rollout")
        length = int(greedy.answer_lengths[-1])
        tokens.append(greedy.answer_ids[-1, :length])
        logprobs.append(present(answers.greedy_logprobs, "Answers.greedy_logprobs")[-1:, :length])
    n = min(len(answer) for answer in tokens)
    same = (tokens[0][:n] == tokens[1][:n]).long().cumprod(0).sum()
    n = min(n, int(same) + 1)  # up to the first token that differs, the contexts are equal, and so are the largest
    size = gap(logprobs[0][:, :n], logprobs[1][:, :n])
    return finding(
        "padding changes nothing",
        size.mean <= TOLERANCE[actor.engine.config.dtype],
        f"log-probs of a padded and a single prompt differ by {size} nats over {size.count} tokens",
        "the model does not derive positions from the attention mask: use another --attn_implementation, or "
        "--per_device_generation_batch_size 1",
        mean=size.mean,
        largest=size.largest,
    )


def check_noise(actor: Actor, probe: Probe, vocabulary: int) -> Finding:
    """The policy knows something: its entropy is well below that of drawing words at random."""
    with evaluating(actor.model):
        entropy = actor.ask(probe.sampled, entropy=True)[1]
    mean, top = combine(entropy.double()[probe.sampled.answer_mask]).mean, math.log(vocabulary)
    return finding(
        "answers are not noise",
        mean <= 0.7 * top,
        f"entropy {mean:.2f} nats per token, of {top:.2f} for random words",
        "the actor looks untrained: start from a model fine-tuned in step 1",
        bad=WARNING,
        entropy=mean,
    )


def check_batching(actor: Actor, reward: CompositeReward, probe: Probe) -> Finding:
    """The shortest and the longest row have the same log-probs, and scores of every model, in the batch and alone."""
    sequences = probe.sampled
    rows = [int(sequences.lengths.argmin()), int(sequences.lengths.argmax())]
    single = [sequences.select(slice(row, row + 1)) for row in rows]
    logprobs = logprobs_under(actor, sequences, Sampling()).double()
    alone = [logprobs_under(actor, row, Sampling())[0].double() for row in single]
    policy = combine(torch.cat([(logprobs[i, : len(x)] - x).abs() for i, x in zip(rows, alone, strict=True)]))
    figure, good, worst = f"log-probs differ by {policy} nats", policy.mean <= TOLERANCE[actor.engine.config.dtype], 0.0
    for part in reward.models:
        scores = part.model.score(sequences).double()[rows]
        scored_alone = torch.cat([part.model.score(row) for row in single]).double()
        judge = combine((scores - scored_alone).abs() / (1 + scores.abs())).largest
        figure += f", {label_of('scores', part, reward)} by {judge:.2g} of their size"
        good, worst = good and judge <= TOLERANCE[part.model.engine.config.dtype], max(worst, judge)
    return finding(
        "rows do not touch one another",
        good,
        f"alone and in a batch: {figure}",
        "a model attends to later tokens or to padding: it must be a causal decoder; use another --attn_implementation",
        logprobs=policy.mean,
        scores=worst,
    )


def check_dropout(actor: Actor, probe: Probe) -> Finding:
    """Log-probs in training mode equal those in evaluation mode, in which answers are generated.

    Adapters that have learned nothing yet add zero with and without dropout: they are asked for its rate.
    """
    name = "no dropout in the update"
    if isinstance(actor.engine, FrozenEngine):
        return Finding(name, SKIPPED, "step 3 looks at it: --disable_actor_dropout")
    was_training = actor.model.training
    actor.train()
    size = gap(actor.logprobs(probe.sampled).logprobs, actor.old_logprobs(probe.sampled), probe.sampled.answer_mask)
    actor.train(was_training)
    modules = actor.model.named_modules()
    rate = max((m.p for stem, m in modules if ".lora_dropout." in stem and isinstance(m, nn.Dropout)), default=0.0)
    return finding(
        name,
        size.mean <= TOLERANCE[actor.engine.config.dtype] and rate == 0,
        f"log-probs in training and in evaluation mode differ by {size} nats"
        + (f"; adapters have dropout {rate:g}" if rate else ""),
        "answers come from the model without dropout, the update learns with it: --disable_actor_dropout"
        + (", --actor_lora_dropout 0" if rate else ""),
        bad=WARNING,
        mean=size.mean,
    )


def check_reference(actor: Actor, reference: Reference | None, probe: Probe) -> Finding:
    """Before the first update the policy is the reference: their KL is 0."""
    name = "KL to the reference is 0"
    if reference is None:
        return Finding(name, SKIPPED, "the reference is loaded from the actor's folder in step 3")
    policy, frozen = (logprobs_under(role, probe.sampled, Sampling()) for role in (actor, reference))
    size = gap(policy, frozen, probe.sampled.answer_mask)
    return finding(
        name,
        size.mean <= TOLERANCE[actor.engine.config.dtype],
        f"log-probs differ by {size} nats",
        "actor and reference must start from the same weights, in the same number format: --actor_model_name_or_path, "
        "--actor_dtype",
        mean=size.mean,
    )
