"""What DeepSpeed holds of a model beside its activations, on one rank.

Read from DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py) with the configuration of
`remax.engines.deepspeed_config`, and measured by `benchmarks/memory.py`. With T trained of P parameters of w bytes, on
N ranks:

    ZeRO 0             w P weights; 8 T Adam; w T gradients
    ZeRO 1             w P weights; 12 T / N Adam and weights in fp32; 4 T gradients
    ZeRO 2             w P weights; 12 T / N; 4 T / N gradients
    ZeRO 3             w P / N weights; 12 T / N; 4 T / N gradients, between the steps as well

Gradients of ZeRO 0 to 2 are there from the first backward pass to the end of the optimizer's step. With `offload` the
12 T / N leave the GPU. The sums of the gradients leave it at ZeRO 3 alone: at ZeRO 2 they are added up on the GPU, in
fp32, and copied as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from remax.engines.deepspeed_config import LARGEST_BUCKET, MOST_LIVE, EngineConfig
from remax.planning.dry_run import Sizes

ROLLOUT, SCORING, UPDATE, STEP = "rollout", "scoring", "update", "step"
CRITIC_UPDATE, CRITIC_STEP, EVALUATION = "critic's update", "critic's step", "evaluation"
PHASES = (ROLLOUT, SCORING, UPDATE, STEP, CRITIC_UPDATE, CRITIC_STEP, EVALUATION)


@dataclass(frozen=True)
class Term:
    """Bytes with a name, by phase; `host` are those in CPU memory where the device is a GPU, in every phase."""

    name: str
    at: Mapping[str, float] = field(default_factory=dict)
    host: float = 0.0


def always(name: str, size: float, of_host: bool = False) -> Term:
    """A term of every phase, on the device or beside it."""
    return Term(name, host=size) if of_host else Term(name, dict.fromkeys(PHASES, size))


@dataclass(frozen=True)
class Machine:
    """Where a training runs: ranks, whether they have GPUs, and the bytes of each."""

    ranks: int = 1
    cuda: bool = True
    memory: float = math.inf


def numbers(engine: EngineConfig) -> int:
    """Bytes of a weight."""
    return engine.torch_dtype.itemsize


def gathered(size: Sizes, engine: EngineConfig, whole: bool = False) -> float:
    """Bytes of the parameters that ZeRO 3 has put together at a time."""
    if engine.zero_stage != 3:
        return 0.0
    return numbers(engine) * (size.parameters if whole else min(size.parameters, MOST_LIVE))


def frozen(role: str, size: Sizes, engine: EngineConfig, machine: Machine) -> list[Term]:
    """A model that only evaluates."""
    share = size.parameters * numbers(engine) / (machine.ranks if engine.zero_stage == 3 else 1)
    return [always(f"{role}: weights", share, machine.cuda and engine.offload_parameters)]


def trained(
    role: str, size: Sizes, engine: EngineConfig, machine: Machine, update: str = UPDATE, step: str = STEP
) -> Iterator[Term]:
    """A model that learns: weights, optimizer states, and what its optimizer's step takes.

    Args:
        update: The phase of its backward passes, of which `gradients` tells more.
        step: The phase of its optimizer step.
    """
    stage, w, learns = engine.zero_stage, numbers(engine), size.trained
    part = learns / (1 if stage == 0 else machine.ranks)  # of an optimizer's numbers
    away = machine.cuda and engine.offload
    weights = w * size.parameters / (machine.ranks if stage == 3 else 1)
    yield always(f"{role}: weights", weights, machine.cuda and engine.offload_parameters)
    one_copy = stage == 0 or (stage == 3 and w == 4 and not engine.offload)  # of the weights in fp32
    yield always(f"{role}: Adam{'' if one_copy else ', weights in fp32'}", (8 if one_copy else 12) * part, away)
    if stage == 3:
        yield always(f"{role}: sums of gradients", 4 * part, away)
        yield always(f"{role}: bucket of gradients", w * min(LARGEST_BUCKET, learns))
    elif engine.offload:
        yield always(f"{role}: gradients on their way to the CPU", w * size.largest)
        yield always(f"{role}: copies of gradients and weights beside Adam", (4 + w) * part, machine.cuda)
    at_step = {}
    if stage < 3:
        at_step["sums of gradients"] = (w if stage == 0 else 4) * part
    if not away and (stage == 3 or (stage > 0 and w == 4)):
        at_step["gradients in one piece"] = 4 * part
    yield from (Term(f"{role}: {name}", {step: held}) for name, held in at_step.items() if held)


@dataclass(frozen=True)
class Moment:
    """Within a backward pass.

    Attributes:
        kept: The share of the activations that is still there.
        head: Logits, or scores, are there with their gradients; otherwise a layer's backward runs.
        sums: Bytes of the gradients' sums.
        buckets: Bytes of the buffers in which gradients travel.
    """

    kept: float
    head: bool
    sums: float
    buckets: float


def gradients(size: Sizes, engine: EngineConfig, machine: Machine, micro_batches: int) -> Iterator[Moment]:
    """The moments of the last backward pass before a step, of which one is that of most bytes.

    DeepSpeed makes its buckets with the first gradient, when the logits are gone, and looks into them when they are
    full, when the layers above are gone.
    """
    stage, w, learns = engine.zero_stage, numbers(engine), size.trained
    part, several = learns / (1 if stage == 0 else machine.ranks), micro_batches > 1
    bucket = min(LARGEST_BUCKET, learns)
    before = after = buffers = copy = 0.0
    if stage == 3:
        copy = w * bucket
    elif stage == 0:
        before = after = w * learns
        copy = w * bucket if machine.ranks > 1 else 0.0
    else:
        unit = 4 if stage == 1 else w
        buffers, copy = unit * bucket * (2 if machine.cuda else 1), unit * bucket  # two that overlap
        if stage == 1:
            before, after = 4 * learns, 4 * (learns - bucket) + 4 * part
        else:  # in fp32 the first gradients are the sum, beside those of the micro-batch
            before, after = 4 * part, (8 if w == 4 and several else 4) * part
    start, left = before if several else 0.0, 1.0 - bucket / max(learns, 1)
    yield Moment(1.0, True, start, 0.0)
    yield Moment(1.0, False, start, buffers)
    if w == 4:  # what travelled is gone before there is a place for what arrived
        yield Moment(left, False, start, buffers + copy)
        yield Moment(left, False, after, buffers)
    else:
        yield Moment(left, False, max(start, after), buffers + copy)
