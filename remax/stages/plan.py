"""The planner from its flags to its tables."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from remax.algorithms import ALGORITHMS
from remax.cli.flags import Step3Arguments
from remax.cli.planning import PlanArguments
from remax.cli.validate import check_algorithm, resolve_algorithm
from remax.models.loading import check_length, quiet_libraries
from remax.models.policy import check_policy_config
from remax.planning.advice import WAYS, Way, choose, in_batches, largest, with_graphs
from remax.planning.durations import DEVICES, hours, seconds, work
from remax.planning.phases import GIB, Plan
from remax.planning.shapes import config_of
from remax.planning.states import Machine
from remax.stages.planning import job_of
from utils.run import UserError


@dataclass(frozen=True)
class Outcome:
    """Of an algorithm: every way with its largest batch, where one fits, and the way to take."""

    algo: str
    ways: list[tuple[Way, Plan | None]]
    chosen: tuple[Way, Plan] | None
    needed: Plan  # of the last way with the batch that is asked for, or one prompt


def step3_flags(args: PlanArguments, algo: str) -> Step3Arguments:
    """Those that step 3 would be given, but for what the planner chooses."""
    several = ALGORITHMS[algo]().samples_per_prompt > 1
    found = Step3Arguments(
        actor_model_name_or_path=args.model,
        reward_model_name_or_path=[] if args.reward_fn or args.share == "all" else [args.reward_model or args.model],
        reward_fn=["planned:reward"] if args.reward_fn else [],
        algo=algo,  # type: ignore[arg-type]  # one of its choices
        samples_per_prompt=args.samples_per_prompt if several else None,
        actor_dtype=args.dtype,
        reward_dtype=args.dtype,
        critic_dtype=args.dtype if algo == "ppo" else None,
        actor_zero_stage=2,
        critic_zero_stage=2 if algo == "ppo" else None,
        actor_lora_dim=args.lora,
        only_optimize_lora=args.lora > 0,
        critic_lora_dim=args.lora if algo == "ppo" and args.share == "reference" else 0,
        share=args.share,
        max_prompt_seq_len=args.prompt_len,
        max_answer_seq_len=args.answer_len,
        per_device_eval_batch_size=args.eval_batch,
        attn_implementation=args.attn_implementation,
    )
    check_algorithm(found)
    resolve_algorithm(found)
    return found


def ways_of(args: PlanArguments) -> list[Way]:
    """The ways that the flags leave open."""
    given: dict[str, Any] = {
        "zero": args.zero,
        "frozen": args.frozen_zero,
        "checkpointing": args.gradient_checkpointing,
        "offload": args.offload,
        "offload_frozen": args.offload_frozen,
    }
    given = {name: value for name, value in given.items() if value is not None}
    ways = [way for way in WAYS if all(getattr(way, name) == value for name, value in given.items())]
    return ways or list(dict.fromkeys(replace(way, **given) for way in WAYS))


def gpu_memory(args: PlanArguments) -> float:
    """GiB of each GPU."""
    return args.gpu_memory or DEVICES[args.gpu].memory


def outcome(args: PlanArguments, algo: str) -> Outcome:
    """Looks at every way that the flags leave open."""
    memory = gpu_memory(args) * GIB
    job = job_of(step3_flags(args, algo), Machine(args.gpus, memory=memory), config_of)
    found = [(way, largest(way.of(job), memory, args.micro_batch)) for way in ways_of(args)]
    fitting = [(way, plan) for way, plan in found if plan is not None]
    if args.batch:
        fitting = [(way, plan) for way, plan in fitting if plan.job.rows.prompts >= args.batch]
    least = [in_batches(way.of(job), args.batch or 1, args.micro_batch) for way, _ in found]
    needed = min(least, key=lambda plan: plan.peak)
    if not fitting:
        return Outcome(algo, found, None, needed)
    way, plan = choose(fitting, args.batch)
    if args.batch:
        plan = in_batches(way.of(job), args.batch, args.micro_batch)
    return Outcome(algo, found, (way, plan), needed)


def run_plan(args: PlanArguments) -> None:
    """Prints the plans; exit status 1 where an algorithm fits in no way."""
    quiet_libraries()
    config = config_of(args.model, "--model")
    check_policy_config(config, args.model, "--model")
    longest = args.prompt_len + args.answer_len
    check_length(config, longest, "--prompt_len + --answer_len", "--model")
    if args.reward_model:
        check_length(config_of(args.reward_model, "--reward_model"), longest, "--prompt_len + --answer_len")
    measured = seconds_per_prompt(args)
    outcomes = [outcome(args, algo) for algo in dict.fromkeys(args.algo)]
    if args.json:
        print(json.dumps({one.algo: as_json(one, args, measured) for one in outcomes}, indent=1))
    else:
        print("\n".join(line for one in outcomes for line in (*table(one, args, measured), "")).rstrip())
    if any(one.chosen is None for one in outcomes):
        sys.exit(1)


def seconds_per_prompt(args: PlanArguments) -> float | None:
    """Of all GPUs together, as a run has measured it; None: nothing was given, or seconds of a step."""
    if not args.rates:
        return None
    folder = Path(args.rates)
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        flags = run["arguments"]
        prompts = flags["per_device_generation_batch_size"] * flags["generation_batches"]
        prompts *= flags["gradient_accumulation_steps"] * run["world_size"]
        seconds = [record["train/seconds_per_step"] for record in records if "train/seconds_per_step" in record]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"--rates {args.rates}: is no run of step 3 ({type(error).__name__}: {error})") from error
    if not seconds:
        raise UserError(f"--rates {args.rates}: its metrics.jsonl tells of no step; expected a run that has trained")
    return statistics.median(seconds[1:] or seconds) / prompts


@dataclass(frozen=True)
class Duration:
    """What a step of a plan takes.

    Attributes:
        step: Seconds.
        parts: Those of its parts by the time model; none where the flags tell the step's.
        recorded: The decode has CUDA graphs.
    """

    step: float
    parts: dict[str, float]
    recorded: bool = False


def duration(plan: Plan, args: PlanArguments, measured: float | None) -> Duration:
    """As it was measured, given or else predicted; with CUDA graphs where step 3 would take them.

    Args:
        measured: Seconds per prompt of all GPUs together.
    """
    if measured is not None:
        rows = plan.job.rows
        return Duration(measured * rows.prompts * rows.batches * args.gpus, {})
    if args.seconds_per_step:
        return Duration(args.seconds_per_step, {})
    job = with_graphs(plan.job, gpu_memory(args) * GIB) or plan.job
    parts = seconds(work(job), job, DEVICES[args.gpu])
    return Duration(sum(parts.values()), parts, job.cuda_graphs)


def flags_of(way: Way, plan: Plan) -> str:
    """What step 3 is to be given."""
    job = plan.job
    flags = way.flags(job.critic is not None, job.reference is not None, bool(job.rewards))
    flags.append(f"--per_device_generation_batch_size {job.rows.prompts}")
    flags.append(f"--per_device_training_batch_size {job.rows.micro}")
    if job.rows.evaluated:
        flags.append(f"--per_device_eval_batch_size {job.rows.evaluated}")
    return " ".join(flags)


def table(one: Outcome, args: PlanArguments, measured: float | None) -> Iterator[str]:
    """The lines that are printed of an algorithm."""
    job = one.needed.job
    billions = job.actor.size.parameters / 1e9
    yield f"{one.algo}: {billions:.3g} billion parameters, {args.dtype}; {args.gpus} x {gpu_memory(args):g} GiB"
    yield ""
    width = max(len(str(way)) for way, _ in one.ways)
    yield f"  {'way':{width}}   prompts per GPU   peak + to leave free, GiB"
    for way, plan in one.ways:
        if plan is None:
            yield f"  {way!s:{width}}              none"
        else:
            peak = f"{plan.peak / GIB:6.1f} + {plan.allowance / GIB:.1f}"
            yield f"  {way!s:{width}}   {plan.job.rows.prompts:15,}   {peak}"
    yield ""
    if one.chosen is None:
        least = (one.needed.peak + one.needed.allowance) / GIB
        wanted = f"{args.batch or 1} prompt{'s' * (args.batch > 1)}"
        yield f"  {wanted} per GPU: fits in no way; takes {least:.1f} GiB at the least. {remedy(args)}"
        return
    way, plan = one.chosen
    yield f"  take: {flags_of(way, plan)}"
    yield ""
    yield from terms(plan)
    if plan.host:
        yield f"  CPU memory for what is offloaded: {plan.host * args.gpus / GIB:.0f} GiB of all machines together"
    takes = duration(plan, args, measured)
    told = ", ".join(f"{part} {time:.1f}" for part, time in takes.parts.items())
    graphs = ", with CUDA graphs" if takes.recorded else ""
    how = f"by the time model of {args.gpu}{graphs}: {told}" if told else "as given"
    yield f"  a step of {plan.job.rows.prompts * args.gpus:,} prompts: {takes.step:.1f} s ({how})"
    if args.prompts:
        yield f"  an epoch over {args.prompts:,} prompts: {hours(args.prompts, plan.job, takes.step):.1f} hours"


def terms(plan: Plan) -> Iterator[str]:
    """Every term by phase, in GiB."""
    phases = plan.phases
    merged: dict[str, dict[str, float]] = {}
    for term in plan.terms:
        of_name = merged.setdefault(term.name, {})
        for phase, size in term.at.items():
            of_name[phase] = of_name.get(phase, 0.0) + size
    merged = {name: at for name, at in merged.items() if any(at.get(phase, 0) >= GIB / 200 for phase in phases)}
    merged["sum"] = {phase: plan.of(phase) for phase in phases}
    width = max(map(len, merged))
    yield f"  {'GiB on each GPU':{width}}" + "".join(f"  {phase:>10}" for phase in phases)
    for name, at in merged.items():
        cells = (f"{at.get(phase, 0.0) / GIB:.2f}" if at.get(phase) else "" for phase in phases)
        yield f"  {name:{width}}" + "".join(
            f"  {cell:>{max(len(phase), 10)}}" for phase, cell in zip(phases, cells, strict=True)
        )


def remedy(args: PlanArguments) -> str:
    """What to try where nothing fits."""
    tries = ["more GPUs"] + ([] if args.lora else ["--lora"]) + (["a smaller --batch"] if args.batch > 1 else [])
    return f"Try {', '.join(tries)}, or shorter prompts and answers."


def as_json(one: Outcome, args: PlanArguments, measured: float | None) -> dict[str, Any]:
    """The same for other programs; bytes."""
    found: dict[str, Any] = {
        "ways": {str(way): None if plan is None else plan.job.rows.prompts for way, plan in one.ways},
        "fits": one.chosen is not None,
    }
    if one.chosen is not None:
        way, plan = one.chosen
        found |= {"flags": flags_of(way, plan), "phases": {phase: plan.of(phase) for phase in plan.phases}}
        found |= {"leave_free": plan.allowance, "cpu_memory": plan.host * args.gpus}
        found["terms"] = [{"name": term.name, "bytes": dict(term.at)} for term in plan.terms if term.at]
        takes = duration(plan, args, measured)
        found |= {"seconds_per_step": takes.step, "seconds": takes.parts}
        if args.prompts:
            found["hours"] = hours(args.prompts, plan.job, takes.step)
    return found
