"""From what a device holds to settings: ways to spread the models, the largest batch of each, and the one to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from remax.planning.phases import Job, Plan, Planned, Rows, plan

MOST = 4096  # prompts answered together; beyond, a device is busy anyway
ENOUGH = 32  # rows of a decode, from which on a decode step costs by the row


@dataclass(frozen=True)
class Way:
    """How models are spread over the GPUs; those that come first take less time.

    Attributes:
        zero: The stage of what learns.
        frozen: The stage of what does not, 0 or 3.
        checkpointing: Activations are computed again.
        offload: Optimizer states in CPU memory.
        offload_frozen: Frozen models in CPU memory.
    """

    zero: int
    frozen: int = 0
    checkpointing: bool = False
    offload: bool = False
    offload_frozen: bool = False

    def __str__(self) -> str:
        parts = [f"ZeRO {self.zero}"]
        parts += ["checkpointing"] if self.checkpointing else []
        parts += ["optimizer offloaded"] if self.offload else []
        if self.frozen:
            parts.append(f"frozen models {'offloaded' if self.offload_frozen else 'at ZeRO 3'}")
        return ", ".join(parts)

    def flags(self, critic: bool, reference: bool, reward: bool) -> list[str]:
        """Of step 3; the arguments say which models it loads."""
        flags = [f"--actor_zero_stage {self.zero}"]
        flags += ["--actor_gradient_checkpointing"] if self.checkpointing else []
        flags += ["--critic_gradient_checkpointing"] if self.checkpointing and critic else []
        flags += ["--offload"] if self.offload else []
        for model, there in (("reference", reference), ("reward", reward)):
            if there and self.frozen:
                off = self.offload_frozen
                flags.append(f"--offload_{model}_model" if off else f"--{model}_zero_stage 3")
        return flags

    def of(self, job: Job) -> Job:
        """The job in this way."""

        def learns(model: Planned) -> Planned:
            engine = replace(model.engine, zero_stage=self.zero, offload=self.offload)
            return replace(model, engine=engine, sketch=replace(model.sketch, checkpointing=self.checkpointing))

        def still(model: Planned) -> Planned:
            engine = replace(model.engine, zero_stage=self.frozen, offload_parameters=self.offload_frozen)
            return replace(model, engine=engine)

        return replace(
            job,
            actor=learns(job.actor),
            critic=job.critic and learns(job.critic),
            reference=job.reference and still(job.reference),
            rewards=tuple(map(still, job.rewards)),
        )


WAYS = (
    Way(2),
    Way(2, 3),
    Way(2, 0, checkpointing=True),
    Way(2, 3, checkpointing=True),
    Way(3, 3, checkpointing=True),
    Way(2, 3, checkpointing=True, offload=True),
    Way(2, 3, checkpointing=True, offload=True, offload_frozen=True),
    Way(3, 3, checkpointing=True, offload=True),
    Way(3, 3, checkpointing=True, offload=True, offload_frozen=True),
)


def micro_of(prompts: int, rows: Rows, micro: int) -> int:
    """Rows of a training forward, at most `micro` (0: all), that cut what is learned of so many prompts evenly.

    Where some of a prompt's answers are learned from, these stay together.
    """
    together = rows.kept or 1
    groups = prompts * (rows.kept or rows.samples) // together
    most = min(max(micro // together, 1) if micro else groups, groups)
    return together * max(n for n in range(1, most + 1) if groups % n == 0)


def in_batches(job: Job, prompts: int, micro: int) -> Plan:
    """The plan with so many prompts on a GPU, and micro-batches of at most `micro` rows (0: all at once)."""
    return plan(job.with_rows(prompts, micro_of(prompts, job.rows, micro)))


def largest(job: Job, memory: float, micro: int = 0) -> Plan | None:
    """The plan with the most prompts on a GPU of so many bytes; None where one is too many.

    With micro-batches of a given size it is one of their multiples, where that many fit. Memory grows nearly along a
    line, so the next number to look at is where the line through the two last ones ends.
    """
    one = in_batches(job, 1, micro)
    if not one.fits(memory):
        return None
    unit = max(micro // (job.rows.kept or job.rows.samples), 1)
    fits, too_many = one, MOST // unit + 1
    before, here = one, in_batches(job, unit * 8, micro)
    while True:
        units = here.job.rows.prompts // unit
        if here.fits(memory):
            fits = max(fits, here, key=_prompts)
        else:
            too_many = min(too_many, units)
        low = _prompts(fits) // unit
        if too_many - low <= 1:
            break
        slope = (_needs(here) - _needs(before)) / (_prompts(here) - _prompts(before)) if here is not before else 0.0
        end = units + (memory - _needs(here)) / (slope * unit) if slope > 0 else too_many - 1
        before, here = here, in_batches(job, unit * min(max(round(end), low + 1), too_many - 1), micro)
    if _prompts(fits) < unit:  # fewer than a micro-batch has
        smaller = (in_batches(job, n, micro) for n in range(unit - 1, 1, -1))
        fits = next((plan for plan in smaller if plan.fits(memory)), fits)
    return fits


def _needs(found: Plan) -> float:
    return found.peak + found.allowance


def _prompts(found: Plan) -> int:
    return found.job.rows.prompts


def choose(found: Sequence[tuple[Way, Plan]], wanted: int = 0) -> tuple[Way, Plan]:
    """Of the ways that fit, each with its largest batch: the first with `wanted` prompts, or with enough rows."""
    for way, of_way in found:
        rows = of_way.job.rows
        if (rows.prompts >= wanted) if wanted else (rows.decoded >= ENOUGH):
            return way, of_way
    return max(found, key=lambda one: _prompts(one[1]))


def with_graphs(job: Job, memory: float) -> Job | None:
    """The job with CUDA graphs of its decode; None where they are not possible, or what they keep has no room."""
    if not job.machine.cuda or job.actor.engine.zero_stage == 3:
        return None
    recorded = replace(job, cuda_graphs=True)
    return recorded if plan(recorded).fits(memory) else None
