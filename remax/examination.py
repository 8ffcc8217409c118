"""The checks of an examination: models that go together, generation that agrees with the update, an export that reads
back. Those of the reward are in `reward_checks`.

A check answers "ok", "warning" (training goes on, but look at this), "failure" (the gradient or the reward would be
wrong: do not train) or "skipped". All ranks take part in every check and reach the same answer: numbers are combined
over the ranks before anything is decided. The random state is put back afterwards, so a run draws the same answers with
and without its examination.
"""

from __future__ import annotations

import math
import tempfile
import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from remax.checkpoint import export
from remax.engines import Actor, FrozenEngine, Reference, TrainedEngine
from remax.findings import EXACT, FAILURE, SKIPPED, TOLERANCE, WARNING, Finding, Report, combine, finding, gap
from remax.inference import FrozenActor
from remax.logprobs import Sampling
from remax.modeling import count_parameters, evaluating, load_policy
from remax.reward_checks import called, check_ranking, check_scores
from remax.rewards import CompositeReward
from remax.rollout import rollout
from remax.sequences import Prompts, Sequences
from utils.data.batches import PairBatch
from utils.data.collate import pad
from utils.data.shapes import as_dialogue
from utils.data.tokens import encode_prompts
from utils.distributed import device, gather_objects, is_main, rank
from utils.tokenizer import load_tokenizer, same_vocabulary

PROBE_ROWS = 4  # prompts on each rank, besides one that is there to be padded
PROBE_TOKENS = 32
PROBE_TEXTS = (
    "Why is the sky blue?",
    "Name three birds.",
    "I have an hour before my train leaves and have never seen this town. What should I look at?",
    "Thanks!",
)


def examine(
    actor: Actor | FrozenActor,
    reward: CompositeReward,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    reference: Reference | None = None,
    pairs: Iterable[PairBatch] | None = None,
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
        *check_tokens(actor, reward, reference, tokenizer),
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
            *check_scores(reward, [probe.sampled, probe.greedy]),
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


# -------------------------------------------------------------------------------------------- do the models go together


def engines(
    actor: Actor | FrozenActor, reward: CompositeReward, reference: Reference | None = None
) -> dict[str, TrainedEngine | FrozenEngine]:
    """Every model by its name in the report."""
    scorers = {called("reward model", part, reward): part.scorer for part in reward.models}
    return {"actor": actor} | scorers | ({"reference": reference} if reference is not None else {})


def check_tokens(
    actor: Actor | FrozenActor,
    reward: CompositeReward,
    reference: Reference | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Finding]:
    """Vocabulary, end token and pad token of all models."""
    models = engines(actor, reward, reference)
    rows = {name: engine.model.hf.get_input_embeddings().num_embeddings for name, engine in models.items()}
    too_small = [f"the {name} embeds {n}" for name, n in rows.items() if n < len(tokenizer)]
    theirs = {called("reward model", part, reward): part.tokenizer for part in reward.models}
    differences = {name: same_vocabulary(tokenizer, its) for name, its in theirs.items()}
    different = [f"{name}: {difference}" for name, difference in differences.items() if difference]
    vocabulary = finding(
        "vocabulary",
        not different and not too_small and rows.get("reference", rows["actor"]) == rows["actor"],
        ", ".join(different) or f"{len(tokenizer)} tokens" + "".join(f", {text}" for text in too_small),
        "use a reward model that was trained from a model with the actor's tokenizer, and one reference with both: the "
        "reward model reads the actor's token ids as they are",
        tokens=len(tokenizer),
    )

    ends = list(actor.model.hf.generation_config.eos_token_id)
    expected = tokenizer.eos_token_id
    rewards_ends = {name: its.eos_token_id for name, its in theirs.items()}
    others = [i for i in ends if i != expected]
    if expected not in ends or any(end != expected for end in rewards_ends.values()):
        end = Finding(
            "end token",
            FAILURE,
            f"the tokenizer ends answers by {expected}, generation by {ends}"
            + "".join(f", the {name}'s by {end}" for name, end in rewards_ends.items()),
            "set one eos_token in all tokenizer_config.json, and eos_token_id in generation_config.json",
        )
    else:
        end = finding(
            "end token",
            not others or not theirs,
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


def check_fit(actor: Actor | FrozenActor, reward: CompositeReward, max_prompt_tokens: int) -> Finding:
    """Room for the longest prompt with the longest answer in every model."""
    longest = max_prompt_tokens + actor.generation.max_new_tokens
    known = {
        name: getattr(engine.model.hf.config, "max_position_embeddings", None)
        for name, engine in engines(actor, reward).items()
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


def check_batching(actor: Actor | FrozenActor, reward: CompositeReward, probe: Probe) -> Finding:
    """Log-probs, and every reward model's scores, of the shortest and the longest row are the same in the batch and
    alone.
    """
    sequences = probe.sampled
    rows = [int(sequences.lengths.argmin()), int(sequences.lengths.argmax())]
    single = [sequences.select(slice(row, row + 1)) for row in rows]
    logprobs = logprobs_under(actor, sequences, Sampling()).double()
    alone = [logprobs_under(actor, row, Sampling())[0].double() for row in single]
    policy = combine(torch.cat([(logprobs[i, : len(x)] - x).abs() for i, x in zip(rows, alone, strict=True)]))
    figure, good, worst = f"log-probs differ by {policy} nats", policy.mean <= TOLERANCE[actor.config.dtype], 0.0
    for part in reward.models:
        scores = part.scorer.score(sequences).double()[rows]
        alone = torch.cat([part.scorer.score(row) for row in single]).double()
        judge = combine((scores - alone).abs() / (1 + scores.abs())).largest
        figure += f", {called('scores', part, reward)} by {judge:.2g} of their size"
        good, worst = good and judge <= TOLERANCE[part.scorer.config.dtype], max(worst, judge)
    return finding(
        "rows do not touch one another",
        good,
        f"alone and in a batch: {figure}",
        "a model attends to later tokens or to padding: it must be a causal decoder; use another --attn_implementation",
        logprobs=policy.mean,
        scores=worst,
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


def built_in_prompts(tokenizer: PreTrainedTokenizerBase, max_len: int) -> Prompts:
    """A few questions of unequal length, each cut at its front to `max_len` tokens."""
    ids = encode_prompts(tokenizer, [as_dialogue(text) for text in PROBE_TEXTS])
    return Prompts(*pad([row[-max_len:] for row in ids], tokenizer.pad_token_id, left=True))
