"""From a job to the bytes of its phases, term by term.

Every row is taken to be as long as it may be. What a phase adds to the models' states is what its largest part adds:
a phase's parts come one after the other, and what the one has used serves the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

from remax.core.onednn import MOST_BYTES
from remax.core.sampling import Sampling
from remax.engines.deepspeed_config import EngineConfig
from remax.generation.cache import PromptCache
from remax.generation.graphs import rounded_up
from remax.generation.loop import CPU_BYTES, GPU_SHARE
from remax.planning.dry_run import Decoding, Held, Sizes, Sketch, decoding, learning, reading, sizes
from remax.planning.states import (
    CRITIC_STEP,
    CRITIC_UPDATE,
    EVALUATION,
    PHASES,
    ROLLOUT,
    SCORING,
    STEP,
    UPDATE,
    Machine,
    Moment,
    Term,
    always,
    frozen,
    gathered,
    gradients,
    numbers,
    trained,
)
from remax.training.trainer import FULL_FORWARD, SCORED_TOGETHER

GIB = 2**30
# Of a GPU: what CUDA, its libraries and NCCL take, and the share of tensors that is lost between them.
CONTEXT, FRAGMENTS = 1.5 * GIB, 0.03


@dataclass(frozen=True)
class Planned:
    """A model as a job holds it.

    Attributes:
        more: Parameters that learn beside those of the sketch: the critic's adapters and head on the actor's trunk.
    """

    sketch: Sketch
    engine: EngineConfig
    more: int = 0

    @property
    def size(self) -> Sizes:
        """Numbers of its parameters."""
        size = sizes(self.sketch)
        return Sizes(size.parameters + self.more, size.trained + self.more, size.largest, size.linear)

    @property
    def gathered(self) -> float:
        """See `states.gathered`."""
        return gathered(self.size, self.engine)


@dataclass(frozen=True)
class Rows:
    """How many rows are together at a time on one rank, and how long they are at most.

    Attributes:
        prompts: Answered together; 0: nothing is answered (steps 1 and 2).
        samples: Answers to each.
        kept: Those of them that the update learns from; None: all.
        greedy: Each prompt gets a greedy answer, too.
        micro: Rows of a training forward.
        batches: Batches of prompts before an optimizer step.
        evaluated: Rows of an evaluation.
        chunk: Tokens whose logits are in memory at once.
        sampling: What answers are drawn from.
        measured_in: What log-probs of the actor's are evaluated in.
    """

    prompts: int = 0
    samples: int = 1
    greedy: bool = False
    micro: int = 1
    batches: int = 1
    evaluated: int = 0
    prompt: int = 256
    answer: int = 256
    chunk: int = 1024
    sampling: Sampling = Sampling()
    measured_in: Sampling = Sampling()
    kept: int | None = None

    @property
    def tokens(self) -> int:
        """Of the longest row."""
        return self.prompt + self.answer

    @property
    def answers(self) -> int:
        """Sampled, of a batch of prompts."""
        return self.prompts * self.samples

    @property
    def learned(self) -> int:
        """Of these answers those that the update reads."""
        return self.prompts * (self.kept or self.samples)

    @property
    def decoded(self) -> int:
        """Sampled and greedy answers of a batch of prompts."""
        return self.prompts * self.kinds

    @property
    def kinds(self) -> int:
        """Answers to a prompt."""
        return self.samples + self.greedy

    def together(self, rows: int, share: bool = False) -> int:
        """Of so many rows those of a forward without gradient, as `Trainer.scoring_forwards` cuts them.

        Args:
            share: Answers to a prompt share it: rows that would take as much as the answers and their prompts do.
        """
        if share:
            return math.ceil(self.together(rows) * (self.prompt * self.prompts / rows + self.answer) / self.tokens)
        fewest = math.ceil(math.ceil(rows / self.micro) / SCORED_TOGETHER)
        return math.ceil(rows / min(max(fewest, math.ceil(rows * self.tokens / FULL_FORWARD)), rows))

    @property
    def micro_batches(self) -> int:
        """Of an optimizer step."""
        return max(self.learned * self.batches // self.micro, 1) if self.prompts else self.batches


@dataclass(frozen=True)
class Job:
    """A training.

    Attributes:
        actor: What learns: a policy, or in step 2 a reward model.
        reference: None where it is the actor without its adapters, or there is none.
        rewards: Reward models with weights of their own.
        critic: PPO's, where it has weights of its own.
        shared_critic: PPO's critic is the actor's trunk, and learns in the same backward pass.
        old_logprobs: The actor reads its answers once before the update.
        full_kl: Over the vocabulary: the reference's hidden states are kept.
        stats_grad: Entropy or KL carry a gradient.
        average: A moving average of the weights is kept in CPU memory.
        cuda_graphs: The steps of a decode are recorded, and what they work on is kept.
    """

    actor: Planned
    rows: Rows
    machine: Machine
    reference: Planned | None = None
    rewards: tuple[Planned, ...] = ()
    critic: Planned | None = None
    shared_critic: bool = False
    old_logprobs: bool = False
    full_kl: bool = False
    stats_grad: bool = False
    average: bool = False
    synced_generation: bool = False
    cuda_graphs: bool = False

    def with_rows(self, prompts: int, micro: int) -> Job:
        """The same with another batch."""
        return replace(self, rows=replace(self.rows, prompts=prompts, micro=micro))


@dataclass(frozen=True)
class Plan:
    """Terms of a job on one rank."""

    job: Job
    terms: Sequence[Term]

    @property
    def phases(self) -> list[str]:
        return [phase for phase in PHASES if self.job.critic or phase not in (CRITIC_UPDATE, CRITIC_STEP)][
            0 if self.job.rows.prompts else 2 :
        ]

    def of(self, phase: str) -> float:
        """Bytes at the phase's peak, as torch allocates them."""
        return sum(term.at.get(phase, 0.0) for term in self.terms)

    @property
    def peak(self) -> float:
        """Bytes at the largest peak."""
        return max(map(self.of, self.phases))

    @property
    def host(self) -> float:
        """Bytes in CPU memory, of one rank, beside what a process has anyway."""
        return sum(term.host for term in self.terms)

    @property
    def allowance(self) -> float:
        """Bytes to leave free: what a GPU needs beside tensors, and fragments."""
        return CONTEXT + FRAGMENTS * self.peak if self.job.machine.cuda else 0.0

    def fits(self, memory: float) -> bool:
        """Whether a device of so many bytes holds it."""
        return self.peak + self.allowance <= memory


def plan(job: Job) -> Plan:
    """Every term of a job."""
    return Plan(job, list(_terms(job)))


def _terms(job: Job) -> Iterator[Term]:
    states = list(_states(job))
    yield from states
    yield from _of_answers(job, _cache_bytes(job, states))
    yield from _of_learning(job)


def _cache_bytes(job: Job, states: Sequence[Term]) -> float:
    """What the keys and values of a decode may take beside the models."""
    at_rest = sum(term.at.get(ROLLOUT, 0.0) for term in states)
    return GPU_SHARE * (job.machine.memory - at_rest) if job.machine.cuda else CPU_BYTES


def _together(job: Job, cache_bytes: float, prompts: int, kinds: int) -> int:
    """Of so many prompts with `kinds` answers each those that are decoded together."""
    bytes_of_prompt = bytes_of_token(job.actor.sketch) * (job.rows.prompt + kinds * job.rows.answer)
    if job.synced_generation:
        return prompts
    return min(prompts, max(int(min(cache_bytes / bytes_of_prompt, prompts)), 1))


def decoded_at_once(job: Job) -> int:
    """Prompts of a rollout whose answers are written together."""
    return _together(job, _cache_bytes(job, list(_states(job))), job.rows.prompts, job.rows.kinds)


def _states(job: Job) -> Iterator[Term]:
    machine, size = job.machine, job.actor.size
    yield from trained("actor", size, job.actor.engine, machine)
    if job.reference is not None:
        yield from frozen("reference", job.reference.size, job.reference.engine, machine)
    for i, reward in enumerate(job.rewards):
        name = "reward model" if len(job.rewards) == 1 else f"reward model {i + 1}"
        yield from frozen(name, reward.size, reward.engine, machine)
    if job.critic is not None:
        yield from trained("critic", job.critic.size, job.critic.engine, machine, CRITIC_UPDATE, CRITIC_STEP)
    if job.average:
        yield always("actor: moving average", 4 * size.trained / machine.ranks, machine.cuda)


def _of_answers(job: Job, cache_bytes: float) -> Iterator[Term]:
    """Rollout, scoring and evaluation; as many prompts are answered together as the cache has bytes for."""
    rows = job.rows
    if not rows.prompts:
        if rows.evaluated:
            name, size = max(_forwards(job, rows.evaluated, rows.evaluated), key=lambda one: one[1])
            yield Term(f"forward: {name}", {EVALUATION: size})
        return
    written = {ROLLOUT: (rows.prompts, rows.kinds)} | ({EVALUATION: (rows.evaluated, 1)} if rows.evaluated else {})
    found = {}
    as_cut = rounded_up if job.cuda_graphs else int
    for phase, (prompts, kinds) in written.items():
        at_once, plain = as_cut(_together(job, cache_bytes, prompts, kinds)), _plain(job.actor.sketch)
        found[phase] = decoding(plain, at_once, kinds, as_cut(rows.prompt), rows.answer, rows.sampling)
    if job.cuda_graphs:
        yield always("CUDA graphs: keys and values of the answers", max(one.cache for one in found.values()))
        yield always("CUDA graphs: a decode step's tensors, logits", max(one.beside for one in found.values()))
        found = dict.fromkeys(found, Decoding(0, 0))
    whole = gathered(job.actor.size, job.actor.engine, whole=not job.synced_generation)
    copies = _laid_out(job)
    share = not job.machine.cuda  # where packing pays, see `remax.models.packing.pays`
    scored = rows.together(rows.decoded, share), rows.together(rows.learned, share)
    read = {SCORING: max(_forwards(job, *scored), key=lambda one: one[1])}
    if rows.evaluated:
        read[EVALUATION] = max(_forwards(job, rows.evaluated, rows.evaluated), key=lambda one: one[1])
        if whole + copies + found[EVALUATION].cache + found[EVALUATION].beside > read[EVALUATION][1]:
            del read[EVALUATION]
        else:
            del found[EVALUATION]
    if copies:
        yield Term("decoding: weights as a CPU reads them fastest", dict.fromkeys(found, copies))
    if not job.cuda_graphs:
        yield Term("keys and values of the answers", {phase: one.cache for phase, one in found.items()})
        yield Term("decoding: a step's tensors, logits", {phase: one.beside for phase, one in found.items()})
    if whole:
        yield Term("actor: gathered to decode", dict.fromkeys(found, whole))
    for phase, (name, size) in read.items():
        yield Term(f"forward: {name}", {phase: size})
    if job.full_kl and job.reference is not None:
        width = job.reference.sketch.config.hidden_size * numbers(job.reference.engine)
        kept = rows.learned * rows.batches * rows.answer * width
        yield Term("reference: hidden states of the answers", {SCORING: kept, UPDATE: kept, STEP: kept})


def _laid_out(job: Job) -> float:
    """Bytes of the weights that `remax.core.onednn` copies while a CPU decodes."""
    held = 4.0 * job.actor.size.linear
    suits = not job.machine.cuda and job.actor.engine.dtype == "fp32" and job.actor.engine.zero_stage < 3
    return held if suits and held <= MOST_BYTES else 0.0


def bytes_of_token(sketch: Sketch) -> int:
    """See `PromptCache.bytes_of_token`."""
    return PromptCache.bytes_of_token(SimpleNamespace(config=sketch.config, dtype=sketch.dtype))


def _plain(sketch: Sketch) -> Sketch:
    """The model as it reads without learning."""
    return replace(sketch, checkpointing=False)


def _forwards(job: Job, scored: int, rows: int) -> Iterator[tuple[str, float]]:
    """Whose forward without gradient takes what, with the parameters that ZeRO 3 gathers for it."""
    own, one = job.rows, (job.actor, rows)
    readers = [("reward model", model, scored) for model in job.rewards]
    if job.reference is not None:
        readers.append(("reference", job.reference, rows))
    else:
        readers.append(("actor", *one))
    if job.old_logprobs:
        readers.append(("actor", *one))
    if job.critic is not None:
        readers.append(("critic", job.critic, rows))
    for name, model, n in readers:
        sampling = own.measured_in if name == "actor" else own.measured_in.without_truncation()
        held = reading(_plain(model.sketch), n, own.tokens, own.answer, chunk=own.chunk, sampling=sampling)
        yield name, held + model.gathered


def _of_learning(job: Job) -> Iterator[Term]:
    """The update of what learns."""
    learners = [("actor", job.actor, UPDATE, STEP)]
    if job.critic is not None:
        learners.append(("critic", job.critic, CRITIC_UPDATE, CRITIC_STEP))
    for name, model, phase, step in learners:
        rows, kl = job.rows, {"stats_grad": job.stats_grad, "full_kl": job.full_kl} if name == "actor" else {}
        held = learning(
            model.sketch, rows.micro, rows.tokens, rows.answer, chunk=rows.chunk, sampling=rows.measured_in, **kl
        )
        kept = held.kept * (2 if job.shared_critic else 1)
        moments = gradients(model.size, model.engine, job.machine, rows.micro_batches)
        found = [_parts(moment, kept, held) for moment in moments]
        largest = max(found, key=lambda parts: sum(parts.values()))
        yield from (Term(f"{name}: {part}", {phase: size}) for part, size in largest.items() if size)
        if model.gathered:  # which DeepSpeed lets go when something else is gathered
            yield Term(f"{name}: gathered parameters", dict.fromkeys((phase, step), model.gathered))


def _parts(moment: Moment, kept: int, held: Held) -> dict[str, float]:
    """Bytes of a moment of the backward pass."""
    beside = "logits, their gradients, the head's" if moment.head else "backward of a layer"
    return {
        "sums of gradients": moment.sums,
        "buckets of gradients": moment.buckets,
        "activations kept for the backward pass": kept * moment.kept,
        beside: held.head if moment.head else held.layer,
    }
