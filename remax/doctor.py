"""Is the pipeline sound before it trains? A few seconds of checks on the live models, each with its figure and remedy.

    python -m remax.doctor --actor_model_name_or_path A --reward_model_name_or_path R [--data_path D] [--json]

Step 3 calls `examine` with its own engines before the first step. A check answers "ok", "warning" (training goes on,
but look at this), "failure" (the gradient or the reward would be wrong: do not train) or "skipped". All ranks take part
in every check and reach the same answer: numbers are combined over the ranks before anything is decided.

The random state is put back afterwards, so a run draws the same answers with and without its examination.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from remax.arguments import build_parser, check_model, check_ranges, resolve_dtype, unknown_flags
from remax.checkpoint import export
from remax.deepspeed_config import EngineConfig
from remax.engines import Actor, FrozenEngine, Reference, Reward, TrainedEngine
from remax.evaluation import Batch, pair_scores, to_device
from remax.flags import Count, CountOrZero, Dtype, Fraction, Positive, flag
from remax.inference import FrozenActor
from remax.logprobs import Sampling
from remax.modeling import count_parameters, evaluating, load_policy, quiet_libraries
from remax.reward_model import load_reward_model
from remax.rollout import GenerationSettings, rollout
from remax.sequences import Prompts, Sequences
from utils.data.chat import template_of
from utils.data.encoding import encode_prompts, ranking_batch
from utils.data.loaders import EvalSampler, collate_ranking, make_loader, pad
from utils.data.preferences import load_preferences
from utils.data.shapes import Form, as_dialogue
from utils.distributed import device, gather_objects, is_main, print0, rank, world_size
from utils.run import UserError, run_main
from utils.tokenizer import load_tokenizer, same_vocabulary

OK, WARNING, FAILURE, SKIPPED = "ok", "warning", "failure", "skipped"

# Mean difference, in nats, that two computations of the same log-probs may have: rounding, of logits of size 10 to 30.
TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}
EXACT = 1e-3  # where nothing but the order of sums may differ, also in bf16
PROBE_ROWS = 4  # prompts on each rank, besides one that is there to be padded
PROBE_TOKENS = 32
ENOUGH_PAIRS = 200  # fewer can only raise a warning: of 200 fair coins, 88 to 112 are heads
ENOUGH_PER_SIDE = 50
ONE_SIDED_95 = 1.645  # standard errors above chance

PROBE_TEXTS = (
    "Why is the sky blue?",
    "Name three birds.",
    "I have an hour before my train leaves and have never seen this town. What should I look at?",
    "Thanks!",
)


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, how it went, the figure in words and as numbers, and what to do about it."""

    check: str
    result: str
    figure: str
    remedy: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


def finding(check: str, good: bool, figure: str, remedy: str, bad: str = FAILURE, **numbers: float) -> Finding:
    """`good` decides between ok and `bad`; only what is not ok shows its remedy."""
    return Finding(check, OK if good else bad, figure, "" if good else remedy, numbers)


@dataclass(frozen=True)
class Report:
    """All findings, the same on every rank."""

    findings: list[Finding]

    @property
    def failures(self) -> list[Finding]:
        return [found for found in self.findings if found.result == FAILURE]

    def table(self) -> str:
        """One line for each check, and below it what to do when it is not ok."""
        width = max(len(found.check) for found in self.findings)
        lines = [f"{'check':<{width}}  {'result':<7}  figure"]
        for found in self.findings:
            result = found.result.upper() if found.result == FAILURE else found.result
            lines.append(f"{found.check:<{width}}  {result:<7}  {found.figure}")
            if found.remedy:
                lines.append(f"{'':<{width}}  remedy:  {found.remedy}")
        return "\n".join(lines)

    def json(self) -> str:
        return json.dumps({"healthy": not self.failures, "findings": [asdict(found) for found in self.findings]})

    def refuse_failures(self) -> None:
        """Raises UserError naming every failed check and its remedy."""
        if self.failures:
            what = "; ".join(f"{found.check}: {found.figure}. {found.remedy}" for found in self.failures)
            raise UserError(f"the examination failed (--skip_doctor trains all the same). {what}")


def examine(
    actor: Actor | FrozenActor,
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    reward_tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    reference: Reference | None = None,
    pairs: Iterable[Batch] | None = None,
    max_prompt_tokens: int,
    resumed: bool = False,
    reload_limit: int = 500_000_000,
    seed: int = 0,
) -> Report:
    """Every rank calls it with as many prompts as the others.

    prompts: a batch of this rank's, of which a few rows are used.   pairs: batches of held-out pairs, see
    `held_out_pairs`.   resumed: the actor has learned already, so it need not equal the reference.
    reload_limit: an actor of more parameters is not written to disk and read again; 0: none is.
    """
    findings = [
        *check_tokens(actor, reward, reference, tokenizer, reward_tokenizer),
        check_fit(actor, reward, max_prompt_tokens),
    ]
    if any(found.result == FAILURE for found in findings):  # running the models could end in an index error
        return Report([*findings, Finding("generation, rewards and export", SKIPPED, "the models do not go together")])
    findings += [check_sampling(actor), check_ranks()]
    with torch.random.fork_rng([device()] if device().type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed + rank())
        probe = take_probe(actor, prompts.to(device()))
        findings += [
            check_greedy(actor, probe),
            check_drawn(actor, probe),
            check_padding(actor, probe),
            check_noise(actor, probe, len(tokenizer)),
            check_batching(actor, reward, probe),
            check_dropout(actor, probe),
            check_reference(actor, reference, probe, resumed),
            check_scores(reward, probe),
            *check_ranking(reward, pairs),
            check_reload(actor, tokenizer, probe, reload_limit),
        ]
    return Report(findings)


# ------------------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Probe:
    """Answers to a few prompts, generated as training generates them. The last row is the second half of the longest
    prompt, so that padding always occurs.

    drawn_from: (B, A) log-probs of the sampled tokens in the distributions that generation drew them from.
    """

    prompts: Prompts
    sampled: Sequences
    greedy: Sequences
    drawn_from: Tensor


def with_padded_row(prompts: Prompts, rows: int) -> Prompts:
    """The first `rows` prompts, and the second half of the longest of them: it has padding on the left."""
    ids, lengths = prompts.input_ids[:rows], prompts.lengths[:rows]  # (B, P), (B,)
    longest = int(lengths.argmax())
    half = torch.clamp(lengths[longest] // 2, min=1)
    return Prompts(torch.cat([ids, ids[longest : longest + 1]]), torch.cat([lengths, half[None]]))


def generating(actor: Actor | FrozenActor) -> AbstractContextManager[bool]:
    return actor.generating() if isinstance(actor, Actor) else nullcontext(False)


def take_probe(actor: Actor | FrozenActor, prompts: Prompts) -> Probe:
    prompts, scores = with_padded_row(prompts, PROBE_ROWS), []
    settings = replace(actor.generation, max_new_tokens=min(actor.generation.max_new_tokens, PROBE_TOKENS))
    with generating(actor) as synced:
        sampled, greedy = rollout(actor.model.hf, prompts, settings, synced_gpus=synced, scores=scores)
    return Probe(prompts, sampled, greedy, score_logprobs(scores, sampled.answer_ids))


def score_logprobs(scores: list[Tensor], ids: Tensor) -> Tensor:
    """Logits of the decode's steps, (at least B, V) each, and (B, A) tokens -> (B, A) log-probs."""
    steps = zip(scores, ids.T, strict=False)  # the decode may have gone on for other rows
    return torch.stack([step[: len(y)].log_softmax(-1).gather(-1, y[:, None]).squeeze(-1) for step, y in steps], 1)


@torch.no_grad()
def logprobs_under(engine: TrainedEngine | FrozenEngine, sequences: Sequences, sampling: Sampling) -> Tensor:
    """(B, A) log-probs by the training forward, without dropout."""
    with evaluating(engine.model):
        return engine.engine(sequences, sampling=sampling)[0]


@dataclass(frozen=True)
class Gap:
    """Distance between two computations of the same numbers, over all ranks."""

    mean: float
    largest: float
    count: int

    def __str__(self) -> str:
        return f"mean {self.mean:.2g}, largest {self.largest:.2g}"


def gap(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Gap:
    distance = (a.double() - b.double()).abs()
    return combine(distance[mask] if mask is not None else distance)


def combine(distance: Tensor) -> Gap:
    parts = gather_objects((float(distance.sum()), float(distance.max()), distance.numel()))
    sums, largest, counts = zip(*parts, strict=True)
    return Gap(sum(sums) / sum(counts), max(largest), sum(counts))


# -------------------------------------------------------------------------------------------- do the models go together


def check_tokens(
    actor: Actor | FrozenActor,
    reward: Reward,
    reference: Reference | None,
    tokenizer: PreTrainedTokenizerBase,
    reward_tokenizer: PreTrainedTokenizerBase,
) -> list[Finding]:
    """Vocabulary, end token and pad token of all models."""
    models = {"actor": actor, "reward model": reward} | ({"reference": reference} if reference is not None else {})
    rows = {name: engine.model.hf.get_input_embeddings().num_embeddings for name, engine in models.items()}
    too_small = [f"the {name} embeds {n}" for name, n in rows.items() if n < len(tokenizer)]
    difference = same_vocabulary(tokenizer, reward_tokenizer)
    vocabulary = finding(
        "vocabulary",
        not difference and not too_small and rows.get("reference", rows["actor"]) == rows["actor"],
        difference or f"{len(tokenizer)} tokens" + "".join(f", {text}" for text in too_small),
        "use a reward model that was trained from a model with the actor's tokenizer, and one reference with both: the "
        "reward model reads the actor's token ids as they are",
        tokens=len(tokenizer),
    )

    ends = list(actor.model.hf.generation_config.eos_token_id)
    expected = tokenizer.eos_token_id
    others = [i for i in ends if i != reward_tokenizer.eos_token_id]
    if expected not in ends or reward_tokenizer.eos_token_id != expected:
        end = Finding(
            "end token",
            FAILURE,
            f"the tokenizer ends answers by {expected}, generation by {ends}, the reward model's by "
            f"{reward_tokenizer.eos_token_id}",
            "set one eos_token in both tokenizer_config.json, and eos_token_id in generation_config.json",
        )
    else:
        end = finding(
            "end token",
            not others,
            f"{tokenizer.eos_token!r} ({expected})"
            + (f"; answers may also end by {tokenizer.convert_ids_to_tokens(others)}" if others else ""),
            "the reward model was trained on answers that end by its own eos_token: keep only that one in the actor's "
            "generation_config.json",
            bad=WARNING,
        )

    pad_id = actor.generation.pad_id
    pad_token = finding(
        "pad token",
        pad_id == tokenizer.pad_token_id and 0 <= pad_id < min(rows.values()),
        f"generation fills with {pad_id}, the tokenizer's pad is {tokenizer.pad_token_id}, the smallest embedding has "
        f"{min(rows.values())} rows",
        "give generation the tokenizer's pad token, and one that every model embeds (the end token will do)",
    )
    return [vocabulary, end, pad_token]


def check_fit(actor: Actor | FrozenActor, reward: Reward, max_prompt_tokens: int) -> Finding:
    """Room for the longest prompt with the longest answer in every model."""
    longest = max_prompt_tokens + actor.generation.max_new_tokens
    known = {
        name: getattr(engine.model.hf.config, "max_position_embeddings", None)
        for name, engine in {"actor": actor, "reward model": reward}.items()
    }
    positions = {name: n for name, n in known.items() if n is not None}
    return finding(
        "prompts fit",
        all(longest <= n for n in positions.values()),
        f"prompt {max_prompt_tokens} + answer {actor.generation.max_new_tokens} = {longest} tokens"
        + "".join(f", {name} {n}" for name, n in positions.items()),
        "lower --max_prompt_seq_len or --max_answer_seq_len",
        tokens=longest,
        **{name.replace(" ", "_"): n for name, n in positions.items()},
    )


def check_sampling(actor: Actor | FrozenActor) -> Finding:
    """Whether the update differentiates the distribution that answers come from."""
    drawn, learned = actor.generation.sampling, getattr(actor, "sampling", actor.generation.sampling)
    return finding(
        "sampling is what is learned",
        drawn == learned,
        f"drawn at {drawn}" + ("" if drawn == learned else f", learned as {learned}"),
        "the gradient is biased, as in the published runs; --logprobs_of sampling makes it exact",
        bad=WARNING,
    )


def check_ranks() -> Finding:
    """Whether every rank draws noise of its own: equal random states would give equal answers to equal prompts."""
    state = torch.cuda.get_rng_state() if device().type == "cuda" else torch.get_rng_state()
    states = gather_objects(zlib.crc32(state.numpy().tobytes()))
    return finding(
        "ranks draw different noise",
        len(set(states)) == len(states),
        f"{len(set(states))} random states on {len(states)} rank{'s' * (len(states) > 1)}",
        "seed every rank differently before training (utils.distributed.set_seed)",
    )


# ----------------------------------------------------------------------------------------------- generation and forward


def check_greedy(actor: Actor | FrozenActor, probe: Probe) -> Finding:
    """Every greedy token has the largest logit of the training forward.

    With top_k = 1 the evaluated distribution keeps the largest logit z* and the given token's z, so its log-prob is
    -log(1 + exp(z* - z)), and 0 when the token is the largest itself: the distance z* - z without any full logits.
    """
    logp = logprobs_under(actor, probe.greedy, Sampling(top_k=1)).double()[probe.greedy.answer_mask]
    distance = torch.expm1(-logp).log().clamp(min=0.0)  # log(0) = -inf, clamped: the token is the argmax
    tolerance = 10 * TOLERANCE[actor.config.dtype] if actor.config.dtype == "fp32" else 0.25  # 2 units of bf16 at 16
    missed = combine((distance > tolerance).double())
    size = combine(distance)
    return finding(
        "greedy tokens are the argmax",
        missed.mean <= 0.01,
        f"{missed.mean:.1%} of {missed.count} tokens are not, largest logit distance {size.largest:.2g}",
        "the greedy baseline would be no greedy answer: look for logits processors, a patched generate, or dropout in "
        "generation",
        share=missed.mean,
        largest=size.largest,
    )


def check_drawn(actor: Actor | FrozenActor, probe: Probe) -> Finding:
    """The log-probs that generation drew its tokens with equal those of the training forward."""
    logprobs = logprobs_under(actor, probe.sampled, actor.generation.sampling)
    size = gap(probe.drawn_from, logprobs, probe.sampled.answer_mask)
    return finding(
        "generation agrees with the forward",
        size.mean <= TOLERANCE[actor.config.dtype],
        f"log-probs differ by {size} nats over {size.count} tokens",
        "the update would learn from another distribution than the answers come from: look for a penalty or top_k in "
        "generation_config.json, an attention kernel that mishandles padding (--attn_implementation sdpa), or use "
        "--actor_dtype fp32 to see whether rounding is the cause",
        mean=size.mean,
        largest=size.largest,
    )


def check_padding(actor: Actor | FrozenActor, probe: Probe) -> Finding:
    """A prompt decoded in a left-padded batch has the log-probs that it has alone."""
    length = int(probe.prompts.lengths[-1])
    alone = Prompts(probe.prompts.input_ids[-1:, -length:], probe.prompts.lengths[-1:])
    settings = replace(actor.generation, max_new_tokens=min(actor.generation.max_new_tokens, PROBE_TOKENS))
    answers, steps = [], []
    for prompts in (probe.prompts, alone):
        scores: list[Tensor] = []
        with generating(actor) as synced:
            _, greedy = rollout(actor.model.hf, prompts, settings, samples=0, synced_gpus=synced, scores=scores)
        answers.append(greedy.answer_ids[-1][: int(greedy.answer_lengths[-1])])
        steps.append([step[-1:] for step in scores])
    n = min(len(answer) for answer in answers)
    same = (answers[0][:n] == answers[1][:n]).long().cumprod(0).sum()
    n = min(n, int(same) + 1)  # up to the first token that differs, the contexts are equal
    ids = answers[0][None, :n]
    size = gap(score_logprobs(steps[0], ids), score_logprobs(steps[1], ids))
    return finding(
        "padding changes nothing",
        size.mean <= TOLERANCE[actor.config.dtype],
        f"log-probs of a padded and a single prompt differ by {size} nats over {size.count} tokens",
        "the model does not derive positions from the attention mask: use another --attn_implementation, or "
        "--per_device_generation_batch_size 1",
        mean=size.mean,
        largest=size.largest,
    )


def check_noise(actor: Actor | FrozenActor, probe: Probe, vocabulary: int) -> Finding:
    """The policy knows something: its entropy is well below that of drawing words at random."""
    with evaluating(actor.model):
        entropy = actor.engine(probe.sampled, entropy=True)[1]
    mean, top = combine(entropy.double()[probe.sampled.answer_mask]).mean, math.log(vocabulary)
    return finding(
        "answers are not noise",
        mean <= 0.7 * top,
        f"entropy {mean:.2f} nats per token, of {top:.2f} for random words",
        "the actor looks untrained: start from a model fine-tuned in step 1",
        bad=WARNING,
        entropy=mean,
    )


def check_batching(actor: Actor | FrozenActor, reward: Reward, probe: Probe) -> Finding:
    """Log-probs and scores of the shortest and the longest row are the same in the batch and alone."""
    sequences = probe.sampled
    logprobs, scores = logprobs_under(actor, sequences, Sampling()), reward.score(sequences)
    forward, score = [], []
    for row in (int(sequences.lengths.argmin()), int(sequences.lengths.argmax())):
        alone = sequences.select(slice(row, row + 1))
        n = alone.answer_width
        forward.append((logprobs[row, :n].double() - logprobs_under(actor, alone, Sampling())[0].double()).abs())
        score.append((scores[row : row + 1].double() - reward.score(alone).double()).abs() / (1 + abs(scores[row])))
    policy, judge = combine(torch.cat(forward)), combine(torch.cat(score))
    good = policy.mean <= TOLERANCE[actor.config.dtype] and judge.largest <= TOLERANCE[reward.config.dtype]
    return finding(
        "rows do not touch one another",
        good,
        f"alone and in a batch: log-probs differ by {policy} nats, scores by {judge.largest:.2g} of their size",
        "a model attends to later tokens or to padding: it must be a causal decoder; use another --attn_implementation",
        logprobs=policy.mean,
        scores=judge.largest,
    )


def check_dropout(actor: Actor | FrozenActor, probe: Probe) -> Finding:
    """Log-probs in training mode equal those in evaluation mode, in which answers are generated."""
    name = "no dropout in the update"
    if not isinstance(actor, TrainedEngine):
        return Finding(name, SKIPPED, "step 3 looks at it: --disable_actor_dropout")
    was_training = actor.model.training
    actor.train()
    size = gap(actor.logprobs(probe.sampled).logprobs, actor.old_logprobs(probe.sampled), probe.sampled.answer_mask)
    actor.train(was_training)
    return finding(
        name,
        size.mean <= TOLERANCE[actor.config.dtype],
        f"log-probs in training and in evaluation mode differ by {size} nats",
        "answers come from the model without dropout, the update learns with it: --disable_actor_dropout",
        bad=WARNING,
        mean=size.mean,
    )


def check_reference(actor: Actor | FrozenActor, reference: Reference | None, probe: Probe, resumed: bool) -> Finding:
    """Before the first update the policy is the reference: their KL is 0."""
    name = "KL to the reference is 0"
    if reference is None:
        return Finding(name, SKIPPED, "the reference is loaded from the actor's folder in step 3")
    policy, frozen = (logprobs_under(engine, probe.sampled, Sampling()) for engine in (actor, reference))
    size = gap(policy, frozen, probe.sampled.answer_mask)
    if resumed:
        return Finding(name, SKIPPED, f"resumed: log-probs differ by {size} nats", numbers={"mean": size.mean})
    return finding(
        name,
        size.mean <= TOLERANCE[actor.config.dtype],
        f"log-probs differ by {size} nats",
        "actor and reference must start from the same weights, in the same number format: --actor_model_name_or_path, "
        "--actor_dtype",
        mean=size.mean,
    )


# ----------------------------------------------------------------------------------------------------------- the reward


def check_scores(reward: Reward, probe: Probe) -> Finding:
    """Scores are finite and tell answers apart."""
    scores = torch.cat([reward.score(probe.sampled), reward.score(probe.greedy)])
    values = torch.tensor([x for part in gather_objects(scores.tolist()) for x in part], dtype=torch.float64)
    spread = float(values.std())
    return finding(
        "scores are finite and differ",
        bool(values.isfinite().all()) and spread > 0,
        f"mean {float(values.mean()):.3g}, standard deviation {spread:.2g} over {len(values)} answers",
        "--reward_dtype fp32 or bf16 where scores overflow; a constant score teaches nothing: train the reward model",
        mean=float(values.mean()),
        standard_deviation=spread,
    )


def check_ranking(reward: Reward, pairs: Iterable[Batch] | None) -> list[Finding]:
    """The reward model prefers the better of two held-out answers, and not only because it is longer."""
    if pairs is None:
        skipped = "no held-out pairs: give --data_path with the columns chosen and rejected"
        return [Finding("reward model ranks pairs", SKIPPED, skipped)]
    rows = []
    for batch in map(to_device, pairs):
        chosen, rejected = pair_scores(reward, batch)
        real = batch["weight"] > 0
        columns = (chosen, rejected, batch["chosen_lengths"], batch["rejected_lengths"])
        rows.append(torch.stack([column[real].double().cpu() for column in columns]))  # (4, b)
    return ranking_findings(*torch.cat([part for parts in gather_objects(rows) for part in parts], 1))


def ranking_findings(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> list[Finding]:
    """Scores and lengths of n pairs, each (n,) -> two findings.

    accuracy = mean of [chosen scores higher] (a tie counts half); chance has the standard error 1 / (2 sqrt n).
    balanced = (accuracy where the chosen answer is longer + accuracy where it is shorter) / 2. A score that is length
    alone, or the reverse, is right on all of one side and on none of the other: balanced = 1/2, whatever the data.
    Its standard error is sqrt(1/n_longer + 1/n_shorter) / 4.
    """
    n = len(chosen)
    right = 0.5 + 0.5 * (chosen - rejected).sign()  # (n,)
    longer, shorter = chosen_lengths > rejected_lengths, chosen_lengths < rejected_lengths
    accuracy = float(right.mean())
    longer_wins = float((0.5 + 0.5 * (chosen_lengths - rejected_lengths).sign()).mean())
    z = (accuracy - 0.5) * 2 * math.sqrt(n)
    ranks = finding(
        "reward model ranks pairs",
        z > ONE_SIDED_95,
        f"accuracy {accuracy:.3f} on {n} held-out pairs ({z:.1f} standard errors above chance)",
        "no better than chance: train the reward model longer, on pairs like these, or check that chosen and rejected "
        "are not swapped" + ("" if n >= ENOUGH_PAIRS else " (or give more held-out pairs)"),
        bad=FAILURE if n >= ENOUGH_PAIRS else WARNING,
        accuracy=accuracy,
        pairs=n,
    )
    sides = int(longer.sum()), int(shorter.sum())
    name = "reward model is not length alone"
    if not all(sides):
        return [ranks, Finding(name, SKIPPED, f"the better answer is the longer one in {sides[0]} of {n} pairs")]
    balanced = float(right[longer].mean() + right[shorter].mean()) / 2
    z = (balanced - 0.5) * 4 / math.sqrt(1 / sides[0] + 1 / sides[1])
    return [
        ranks,
        finding(
            name,
            z > ONE_SIDED_95,
            f"accuracy {float(right[longer].mean()):.3f} where the better answer is longer, "
            f"{float(right[shorter].mean()):.3f} where it is shorter; 'longer wins' reaches {longer_wins:.3f}",
            "the policy would learn to write more, not better: balance the lengths in the reward model's training pairs"
            + ("" if min(sides) >= ENOUGH_PER_SIDE else " (or give more held-out pairs)"),
            bad=FAILURE if n >= ENOUGH_PAIRS and min(sides) >= ENOUGH_PER_SIDE else WARNING,
            balanced_accuracy=balanced,
            longer_wins=longer_wins,
        ),
    ]


# -------------------------------------------------------------------------------------------------------- save and load


def check_reload(actor: Actor | FrozenActor, tokenizer: PreTrainedTokenizerBase, probe: Probe, limit: int) -> Finding:
    """What is exported is what was trained: the actor, written to a temporary folder and read again by rank 0."""
    name, size = "export reads back the same", count_parameters(actor.model)
    if size > limit:
        return Finding(name, SKIPPED, f"{size / 1e6:,.0f} million parameters: not written to disk before training")
    logprobs, distance = logprobs_under(actor, probe.sampled, Sampling()), 0.0
    with tempfile.TemporaryDirectory() as folder:
        export(actor.model, tokenizer, folder, zero3=actor.zero3)
        if is_main():
            dtype = actor.config.torch_dtype
            again = load_policy(folder, "the exported actor", dtype=dtype, tokenizer=load_tokenizer(folder))
            read = again.eval().to(device())(probe.sampled)[0]
            distance = float((read.double() - logprobs.double()).abs()[probe.sampled.answer_mask].mean())
    distance = gather_objects(distance)[0]
    # The same weights in the same format give the same numbers; only merged adapters are rounded anew.
    merged = any("lora_" in parameter for parameter, _ in actor.model.named_parameters())
    return finding(
        name,
        distance <= (TOLERANCE[actor.config.dtype] if merged else EXACT),
        f"log-probs differ by mean {distance:.2g} nats",
        "what is saved would not be what trains: compare the versions with constraints.txt, and report it as a bug",
        mean=distance,
    )


# ------------------------------------------------------------------------------------------------------ what to look at


def held_out_pairs(
    data_path: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_len: int,
    limit: int = 256,
    batch_size: int = 16,
    cache_dir: str | None = None,
    columns: Mapping[str, str] | None = None,
    announce: bool = True,
) -> DataLoader | None:
    """Up to `limit` held-out pairs, shared out over the ranks; None where the data has none.

    max_len: tokens of prompt and answer together.   columns: see `Form`.   announce: print what was read.
    """
    form = Form(columns=columns or {}, template=template_of(tokenizer))
    _, rows = load_preferences(data_path, cache_dir=cache_dir, form=form, announce=announce)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    batch = rows.select(sorted(order[: 2 * limit]))[:]
    encoded = ranking_batch(batch, tokenizer, max_len)
    kept = [i for i, dropped in enumerate(encoded["dropped"]) if dropped is None][:limit]
    if not kept:
        return None
    columns = ("chosen_ids", "rejected_ids", "prompt_length")
    pairs = Dataset.from_dict({name: [encoded[name][i] for i in kept] for name in columns})
    return make_loader(
        pairs,
        EvalSampler(len(pairs), rank(), world_size()),
        batch_size,
        partial(collate_ranking, pad_id=tokenizer.pad_token_id),
    )


def built_in_prompts(tokenizer: PreTrainedTokenizerBase, max_len: int) -> Prompts:
    """A few questions of unequal length, each cut at its front to `max_len` tokens."""
    ids = encode_prompts(tokenizer, [as_dialogue(text) for text in PROBE_TEXTS])
    return Prompts(*pad([row[-max_len:] for row in ids], tokenizer.pad_token_id, left=True))


# --------------------------------------------------------------------------------------------------------- command line


@dataclass(kw_only=True)
class DoctorFlags:
    _argument_group_name = "models, data and generation, as in step 3"

    actor_model_name_or_path: str = flag(help="the model of step 1: folder or hub name")
    reward_model_name_or_path: str = flag(help="the reward model of step 2: folder or hub name")
    data_path: list[str] = flag([], "data whose held-out pairs the reward model ranks; without it that is skipped")
    data_output_path: str | None = flag(None, "folder for cached data; without it the datasets library's own")
    max_prompt_seq_len: Count = flag(256, "longest prompt in tokens")
    max_answer_seq_len: Count = flag(256, "longest answer in tokens")
    temperature: Positive = flag(1.0, "of the sampled answers")
    top_p: Fraction = flag(1.0, "sample from the most probable tokens with this total probability; 1: from all")
    top_k: CountOrZero = flag(0, "sample from the k most probable tokens; 0: from all")
    dtype: Dtype = flag("auto", "number format; auto: bf16 where the GPU has it, else fp32")
    attn_implementation: str | None = flag(None, "attention kernel; without it transformers chooses")
    batch_size: Count = flag(16, "pairs that are scored together")
    pairs: Count = flag(256, "held-out pairs to rank, at most")
    skip_reload: bool = flag(False, "do not write the actor to a temporary folder and read it again")
    json: bool = flag(False, "print the report as JSON")


@dataclass(kw_only=True)
class DoctorArguments(DoctorFlags):
    """All flags of the doctor."""


def parse_doctor(argv: list[str] | None = None) -> DoctorArguments:
    parser = build_parser(DoctorArguments, "Checks the models of step 3 before training")
    parser.usage = "python -m remax.doctor [flags]"
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(unknown_flags(unknown, [f"--{name}" for name in vars(namespace)]))
    args = DoctorArguments(**vars(namespace))
    check_ranges(args)
    check_model("actor_model_name_or_path", args.actor_model_name_or_path)
    check_model("reward_model_name_or_path", args.reward_model_name_or_path)
    args.dtype = resolve_dtype("dtype", args.dtype, None)
    return args


def examine_folders(args: DoctorArguments) -> Report:
    """Loads both models into this process, without DeepSpeed, and examines them."""
    config = EngineConfig(dtype=args.dtype)
    actor_name, reward_name = args.actor_model_name_or_path, args.reward_model_name_or_path
    tokenizer = load_tokenizer(actor_name, "--actor_model_name_or_path")
    reward_tokenizer = load_tokenizer(reward_name, "--reward_model_name_or_path")
    options = {"dtype": config.torch_dtype, "attn_implementation": args.attn_implementation}
    generation = GenerationSettings(
        args.max_answer_seq_len, tokenizer.pad_token_id, Sampling(args.temperature, args.top_p, args.top_k)
    )
    policy = load_policy(actor_name, "--actor_model_name_or_path", tokenizer=tokenizer, **options)
    scorer = load_reward_model(reward_name, "--reward_model_name_or_path", tokenizer=reward_tokenizer, **options)
    pairs = None
    if args.data_path:
        pairs = held_out_pairs(
            args.data_path,
            tokenizer,
            max_len=args.max_prompt_seq_len + args.max_answer_seq_len,
            limit=args.pairs,
            batch_size=args.batch_size,
            cache_dir=args.data_output_path,
        )
    return examine(
        FrozenActor(policy, config, generation),
        Reward(scorer, config),
        tokenizer,
        reward_tokenizer,
        built_in_prompts(tokenizer, args.max_prompt_seq_len),
        pairs=pairs,
        max_prompt_tokens=args.max_prompt_seq_len,
        reload_limit=0 if args.skip_reload else sys.maxsize,
    )


def main() -> None:
    args = parse_doctor()
    quiet_libraries()
    with redirect_stdout(sys.stderr if args.json else sys.stdout):  # what reading the data says is no JSON
        report = examine_folders(args)
    print0(report.json() if args.json else report.table())
    if report.failures:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
