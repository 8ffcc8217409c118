"""How long a step takes: what has to be computed, read and moved, at the rates that a machine achieves.

    a decode step     layers * launch, or (weights + keys and values) / (decode * bandwidth), whichever is longer
    with CUDA graphs  the sum of both, with `recorded` for `launch`
    a forward         operations / (forward * peak), or what ZeRO 3 gathers / link, whichever is longer
    an update         the same with `update`: three times a forward's operations, four with gradient checkpointing
    offloaded Adam    gradients and weights / pcie, and parameters / adam
    offloaded models  their weights / pcie, for each forward

The operations of a forward are 2 for each weight and token, 4 L H for each token that another attends to (L layers, H
numbers wide), and 2 H V for each token whose logits are made (V words). Every row is taken to be as long as it may be.
What a GPU can do is of its data sheet; what of that is achieved, `Rates`, is fitted to published hours by
benchmarks/paper.py; `recorded` was measured by benchmarks/rlhf_step.py on an H100; `launch` and `network` are assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from remax.planning.phases import Job, Planned, bytes_of_token, decoded_at_once
from remax.planning.states import numbers

OF_A_MACHINE = 8  # GPUs, which share its CPUs and a link among themselves
GENERATE, SCORE, UPDATE = "generate", "score", "update"


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet.

    Attributes:
        memory: GiB.
        half: FLOP/s of matrix products in 16 bits, without sparsity.
        single: The same in fp32, without TF32.
        bandwidth: Bytes/s of its memory.
        link: Bytes/s that it gets from the other GPUs of its machine.
    """

    memory: float
    half: float
    single: float
    bandwidth: float
    link: float


DEVICES = {
    "a100": Device(80, 312e12, 19.5e12, 2039e9, 300e9),
    "a100-40gb": Device(40, 312e12, 19.5e12, 1555e9, 300e9),
    "a800": Device(80, 312e12, 19.5e12, 2039e9, 200e9),
    "h100": Device(80, 989e12, 67e12, 3350e9, 450e9),
    "h200": Device(140, 989e12, 67e12, 4800e9, 450e9),
    "l40s": Device(44, 362e12, 91.6e12, 864e9, 32e9),
    "rtx4090": Device(24, 165e12, 82.6e12, 1008e9, 32e9),
}


@dataclass(frozen=True)
class Rates:
    """What is achieved.

    Attributes:
        decode: Of the memory's bandwidth, in a decode step.
        forward: Of the peak of matrix products, without gradient.
        update: The same with gradient.
        pcie: Bytes/s between a GPU and CPU memory.
        adam: Parameters that the CPUs of a machine update in a second.
        launch: Seconds that the operators of a layer take to launch in a decode step, be they ever so small.
        recorded: Seconds of a layer's small operators where CUDA graphs launch them.
        network: Bytes/s that a GPU gets from other machines.
    """

    decode: float = 0.57
    forward: float = 0.49
    update: float = 0.53
    pcie: float = 9.2e9
    adam: float = 0.94e9
    launch: float = 0.03 / 32
    recorded: float = 0.164e-3
    network: float = 25e9


@dataclass(frozen=True)
class Part:
    """What one rank does in a part of a step.

    Attributes:
        operations: Of matrix products.
        exchanged: Bytes that come from other GPUs while these run.
        fetched: Bytes that cross between GPU and CPU memory, before or after.
    """

    operations: float = 0.0
    exchanged: float = 0.0
    fetched: float = 0.0

    def __add__(self, other: Part) -> Part:
        return Part(self.operations + other.operations, self.exchanged + other.exchanged, self.fetched + other.fetched)

    def times(self, n: int) -> Part:
        """The same n times."""
        return Part(n * self.operations, n * self.exchanged, n * self.fetched)


@dataclass(frozen=True)
class Decode:
    """Writing answers together: so many steps of so many layers, each of which reads so many bytes."""

    steps: int
    layers: int
    read: float
    recorded: bool = False


@dataclass(frozen=True)
class Work:
    """What one rank does in an optimizer step.

    Attributes:
        decodes: One after the other.
        generate: Prompts are read, parameters gathered; score: forwards without gradient; update: those with it.
        adam: Parameters that the machine's CPUs update.
        states: Bytes that Adam reads and writes on the GPU.
    """

    decodes: Sequence[Decode]
    generate: Part
    score: Part
    update: Part
    adam: float = 0.0
    states: float = 0.0


@dataclass(frozen=True)
class Size:
    """What the operations of a model depend on: W weights of all layers' matrices, L layers, H numbers, V words.

    Attributes:
        width: Of all heads of a layer together; 0: H.
    """

    weights: int
    layers: int
    hidden: int
    vocabulary: int
    width: int = 0

    def read(self, tokens: int, attended: int) -> int:
        """Operations for tokens that attend to so many tokens together."""
        return 2 * self.weights * tokens + 4 * self.layers * (self.width or self.hidden) * attended

    def head(self, tokens: int) -> int:
        """Operations for the logits of so many tokens."""
        return 2 * self.hidden * self.vocabulary * tokens


def before(tokens: int, end: int) -> int:
    """Of the first `tokens` places behind `end` others: how many places they attend to together."""
    return tokens * end + tokens * (tokens + 1) // 2


def size_of(model: Planned) -> Size:
    """All parameters but the embeddings, and the head, which has a count of its own, are taken for matrices."""
    config = model.sketch.config.get_text_config()
    hidden, words, heads = (int(getattr(config, name)) for name in ("hidden_size", "vocab_size", "num_attention_heads"))
    one_table = model.sketch.scores or bool(getattr(config, "tie_word_embeddings", False))
    weights = model.size.parameters - hidden * words * (1 if one_table else 2)
    width = heads * int(getattr(config, "head_dim", None) or hidden // heads)
    return Size(weights, model.sketch.layers, hidden, words, width)


def forward(model: Planned, rows: int, tokens: int, words: int) -> float:
    """Operations of a forward of (rows, tokens), with the logits of `words` tokens of each row; none of a scorer's."""
    size = size_of(model)
    logits = 0 if model.sketch.scores else size.head(rows * words)
    return float(size.read(rows * tokens, rows * before(tokens, 0)) + logits)


def _others(ranks: int) -> float:
    """The share of a model that a rank gets from the others."""
    return (ranks - 1) / ranks


def reads(model: Planned, ranks: int, rows: int, tokens: int, words: int = 0, forwards: int = 1) -> Part:
    """Forwards without gradient of (rows, tokens) in all, with what ZeRO 3 moves for each of them."""
    weights = numbers(model.engine) * model.size.parameters if model.engine.zero_stage == 3 else 0.0
    away = weights / ranks if model.engine.offload_parameters else 0.0
    return Part(forward(model, rows, tokens, words), forwards * weights * _others(ranks), forwards * away)


def learns(
    model: Planned, ranks: int, rows: int, tokens: int, words: int, forwards: int, gradient_bytes: int = 4
) -> Part:
    """An update over (rows, tokens) in so many micro-batches.

    Args:
        gradient_bytes: Of a gradient on its way to offloaded Adam.
    """
    size, engine = model.size, model.engine
    backward = 2 if size.trained > size.parameters / 2 else 1  # adapters: gradients of activations, hardly of weights
    passes = 1 + backward + model.sketch.checkpointing
    w = numbers(engine)
    reduced, updated = w * size.trained * _others(ranks), w * size.trained * _others(ranks)
    if engine.zero_stage == 3:
        moved = forwards * (2 * w * size.parameters * _others(ranks) + reduced)
    else:
        moved = (forwards if engine.zero_stage == 2 else 1) * reduced + updated
    away = (gradient_bytes + w) * size.trained / ranks if engine.offload else 0.0
    return Part(passes * forward(model, rows, tokens, words), moved, away)


def adam(model: Planned, ranks: int) -> tuple[float, float]:
    """Parameters that the CPUs of a machine update, and bytes of Adam's states on a GPU that are read and written."""
    trained, engine = model.size.trained, model.engine
    if engine.offload:
        return trained * min(ranks, OF_A_MACHINE) / ranks, 0.0
    # read: gradient, weight, both moments; written: the three in fp32 and the weight as it is used
    return 0.0, (28 + numbers(engine)) * trained / (1 if engine.zero_stage == 0 else ranks)


def updates(
    job: Job, rows: int, tokens: int, words: int, forwards: int, gradient_bytes: int = 4
) -> tuple[Part, float, float]:
    """Update and Adam of the actor and of a critic, as `Work` has them; the arguments are those of `learns`."""
    update, on_cpu, states = Part(), 0.0, 0.0
    for model in (job.actor, job.critic):
        if model is not None:
            update += learns(model, job.machine.ranks, rows, tokens, words, forwards, gradient_bytes)
            parameters, read = adam(model, job.machine.ranks)
            on_cpu, states = on_cpu + parameters, states + read
    return update, on_cpu, states


def decode(model: Planned, prompts: int, rows: int, prompt: int, answer: int, recorded: bool = False) -> Decode:
    """Of `rows` answers; a mean step reads the keys and values of `prompts` prompts, and of half of every answer."""
    weights = numbers(model.engine) * model.size.parameters
    cache = bytes_of_token(model.sketch) * (prompts * prompt + rows * answer / 2)
    return Decode(answer, model.sketch.layers, weights + cache, recorded)


def work(job: Job) -> Work:
    """What this pipeline does in a step of the job on each rank."""
    rows, ranks, actor = job.rows, job.machine.ranks, job.actor
    at_once = decoded_at_once(job)
    parts = [min(at_once, rows.prompts - i) for i in range(0, rows.prompts, at_once)]
    decodes = [decode(actor, n, n * rows.kinds, rows.prompt, rows.answer, job.cuda_graphs) for n in parts]
    gathers = len(parts) * rows.answer if job.synced_generation else 1
    ask = reads(actor, ranks, rows.prompts, rows.prompt, forwards=gathers)

    scored, once = (_forwards(n, rows.together(n)) for n in (rows.decoded, rows.learned))
    score = Part()
    for reward in job.rewards:
        score += reads(reward, ranks, rows.decoded, rows.tokens, 0, scored)
    # of one trunk for all, the forward that gives log-probs gives the rewards, too
    alone = job.reference is None and not job.rewards
    readers = [(job.reference or actor, rows.decoded if alone else rows.learned)]
    readers += [(actor, rows.learned)] * (job.old_logprobs + job.shared_critic)
    readers += [(job.critic, rows.learned)] if job.critic else []
    for reader, n in readers:
        score += reads(reader, ranks, n, rows.tokens, rows.answer, scored if n == rows.decoded else once)

    answers = rows.learned * rows.batches * (2 if job.shared_critic else 1)
    learned = updates(job, answers, rows.tokens, rows.answer, rows.micro_batches)
    return Work(decodes * rows.batches, ask.times(rows.batches), score.times(rows.batches), *learned)


def _forwards(rows: int, at_once: int) -> int:
    return math.ceil(rows / at_once)


def seconds(of: Work, job: Job, device: Device, rates: Rates = Rates()) -> dict[str, float]:
    """Of the parts of an optimizer step: generate, score, update."""
    peak = device.half if job.actor.engine.torch_dtype != torch.float32 else device.single
    link = device.link if job.machine.ranks <= OF_A_MACHINE else rates.network

    def takes(part: Part, share: float) -> float:
        return max(part.operations / (share * peak), part.exchanged / link) + part.fetched / rates.pcie

    read = rates.decode * device.bandwidth

    def step(one: Decode) -> float:
        if one.recorded:
            return one.layers * rates.recorded + one.read / read
        return max(one.layers * rates.launch, one.read / read)

    written = sum(one.steps * step(one) for one in of.decodes)
    return {
        GENERATE: written + takes(of.generate, rates.forward),
        SCORE: takes(of.score, rates.forward),
        UPDATE: takes(of.update, rates.update) + of.adam / rates.adam + of.states / read,
    }


def hours(prompts: int, job: Job, of_step: float) -> float:
    """Of an epoch over so many prompts, whose steps take so many seconds."""
    rows = job.rows
    return prompts / (rows.prompts * rows.batches * job.machine.ranks) * of_step / 3600
