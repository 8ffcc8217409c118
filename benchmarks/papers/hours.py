"""The time model beside published hours: its rates are fitted to the runs of one table, and tested on the others.

The runs were made by other programs than this one, whose steps differ from this pipeline's (`rlhf_ways/authors.py` is
such a step):

- ReMax's sampled and greedy answers are two decodes, one after the other, and each row reads its own prompt;
- the actor reads its answers once more, and logits are made of every token, the prompt's too;
- a batch is one forward, and one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from papers.published import RUNS, Run

from remax.planning.durations import (
    DEVICES,
    GENERATE,
    UPDATE,
    Rates,
    Work,
    decode,
    hours,
    reads,
    seconds,
    updates,
)
from remax.planning.phases import GIB, Job
from remax.planning.states import Machine

LLAMA = "Llama-2-7B"
FITTED = ("decode", "forward", "update", "pcie", "adam")
# Launching a layer of DeepSpeed's decode kernels, which these runs had: 5.3 ms a step of 24 layers (DeepSpeed 8271)
LAUNCH = 5.3e-3 / 24
A100 = 79.15 * GIB  # what torch finds of an A100 or A800 of 80 GB
OF_PROMPT = 1.3 * GIB  # what a prompt takes there, by the batches that fit with Llama-2-7B, see docs/results/paper.md


@cache
def job_of(
    algo: str,
    gpus: int,
    offload: bool,
    model: str = LLAMA,
    reward: str = LLAMA,
    zero: int = 2,
    adapters: bool = False,
) -> Job:
    """Of the planner: 256 + 256 tokens, bf16, checkpointing; at ZeRO 2 the frozen models are offloaded at ZeRO 3."""
    from remax.cli.validate import parse_step3
    from remax.planning.shapes import config_of
    from remax.stages.planning import job_of as job_of_flags

    flags = f"--algo {algo} --actor_zero_stage {zero} --actor_gradient_checkpointing --actor_dtype bf16"
    flags += " --reward_dtype bf16 --per_device_eval_batch_size 8 --data_path a/b --actor_model_name_or_path a/actor"
    flags += " --reward_model_name_or_path a/reward"
    flags += " --offload_reference_model --offload_reward_model" if zero == 2 else ""
    flags += " --reference_zero_stage 3 --reward_zero_stage 3" if zero == 3 else ""
    flags += f" --critic_gradient_checkpointing --critic_zero_stage {zero}" if algo == "ppo" else ""
    flags += " --offload" if offload else ""
    flags += " --actor_lora_dim 128 --only_optimize_lora" if adapters else ""
    names = {"a/actor": model, "a/reward": reward}
    args = parse_step3(flags.split())
    return job_of_flags(args, Machine(gpus, memory=A100), lambda name, flag: config_of(names[name], flag))


def job_of_run(run: Run) -> Job:
    """DeepSpeed-Chat's models are all at ZeRO 3."""
    zero = 3 if run.source == "DeepSpeed-Chat" else 2
    return job_of(run.algo, run.gpus, run.offload, run.model, run.reward, zero, run.adapters)


def rows_of(run: Run) -> int:
    """Prompts of a step on a GPU: as published, else as many as a GPU has room for beside the models' states."""
    if run.batch:
        return run.batch // run.gpus
    job, of = job_of_run(run), job_of("ppo", 4, True).actor.sketch.config
    config, size = job.actor.sketch.config, job.actor.size
    wider = config.num_hidden_layers * config.hidden_size / (of.num_hidden_layers * of.hidden_size)
    states = (2 * size.parameters + 16 * size.trained + 2 * size.parameters) / run.gpus  # and the reference
    return int((DEVICES[run.gpu].memory * GIB - states - 2 * GIB) / (OF_PROMPT * wider))


def theirs(run: Run) -> Work:
    """A step of the run on each rank."""
    job, n, ranks = job_of_run(run), rows_of(run), run.gpus
    assert job.reference is not None
    prompt, answer, actor = job.rows.prompt, job.rows.answer, job.actor
    tokens, decodes = prompt + answer, 2 if run.algo == "remax" else 1
    ask = reads(actor, ranks, n * decodes, prompt)
    score = reads(actor, ranks, n, tokens, tokens) + reads(job.reference, ranks, n, tokens, tokens)
    score += reads(job.rewards[0], ranks, n, tokens, 0).times(decodes)
    if job.critic is not None:
        score += reads(job.critic, ranks, n, tokens, 0)
    learned = updates(job, n, tokens, tokens, forwards=1, gradient_bytes=2)
    return Work([decode(actor, n, n, prompt, answer)] * decodes, ask, score, *learned)


def predicted(run: Run, rates: Rates) -> dict[str, float]:
    """T_G, T_B and hours."""
    job = job_of_run(run).with_rows(rows_of(run), rows_of(run))
    parts = seconds(_work(run), job, DEVICES[run.gpu], rates)
    total = hours(run.prompts, job, sum(parts.values()))
    return {"generate": parts[GENERATE], "update": parts[UPDATE], "hours": total}


_work = cache(theirs)


def published(run: Run) -> dict[str, float]:
    """The same, as far as it was printed."""
    printed = {"generate": run.generate, "update": run.update, "hours": run.hours}
    return {name: value for name, value in printed.items() if value is not None}


FIT_ON = tuple(run for run in RUNS if run.source == "ReMax ICML" and run.hours)


def errors(run: Run, rates: Rates) -> dict[str, float]:
    """Predicted / published - 1 of what was published."""
    found = predicted(run, rates)
    return {name: found[name] / value - 1 for name, value in published(run).items()}


def fit(runs: Sequence[Run] = FIT_ON) -> Rates:
    """The rates that make the squared logarithms of predicted / published least, over all that the runs tell."""
    from scipy.optimize import least_squares

    def rates(logs: Sequence[float]) -> Rates:
        return replace(Rates(launch=LAUNCH), **{name: math.exp(x) for name, x in zip(FITTED, logs, strict=True)})

    def misses(logs: Sequence[float]) -> list[float]:
        return [math.log(1 + error) for run in runs for error in errors(run, rates(logs)).values()]

    start = [math.log(x) for x in (0.5, 0.5, 0.5, 10e9, 1e9)]
    return rates(least_squares(misses, start).x)
