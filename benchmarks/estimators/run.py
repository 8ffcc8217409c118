"""Compares the policy-gradient estimators on the built-in corpus, on a CPU.

    python benchmarks/estimators/run.py

Two tasks: the demo's, and one whose rewards tell prompts apart more than answers (`uneven`).

 1. `prepare`: corpus, supervised policy and reward model (skipped with --data, --actor and --reward).
 2. `sweep`: every estimator with each learning rate, on seeds of their own; the rate that is best on average is taken.
 3. `train`: every estimator with every seed.
 4. `answers`: squared gradients of single answers, with respect to the logits, at the supervised policy and at a
    half-trained and a trained ReMax policy.
 5. `variance`: variance of the gradient of all parameters, at the same policies.
 6. `report`: tables in estimators.md, plots, and all figures in estimators.json.

What is finished is skipped, so an interrupted experiment goes on where it stood. One to two hours on two free cores.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a run is one thread, so that its CPU seconds are those of a core of its own

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import report
from experiment import ESTIMATORS, TASKS, Run, Setting, measure_answers, measure_variance, train

from remax.algorithms import ALGORITHMS
from remax.demo.prepare import make_demo
from utils.run import UserError, run_main

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("prepare", "sweep", "train", "answers", "variance", "report")
RATES = (1e-4, 3e-4, 1e-3)
CRITIC_RATE = 1e-3
SWEEP_SEEDS = (1000, 1001, 1002)  # of no other run
SUPERVISED = "--learning_rate 3e-3 --weight_decay 0 --num_train_epochs 5"
RANKING = "--learning_rate 2e-3 --weight_decay 0.1 --num_train_epochs 3"
BOTH = (
    f"--data_split {Setting.data_split} --per_device_train_batch_size 32 --per_device_eval_batch_size 64 "
    "--max_seq_len 96 --lr_scheduler_type cosine --num_warmup_steps 10 --zero_stage 0"
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("output/estimators"), help="folder of the runs (default: %(default)s)")
    add("--results", type=Path, default=ROOT / "docs/results", help="folder of the report (default: docs/results)")
    add("--stages", nargs="+", choices=STAGES, default=STAGES, help="what to do (default: all)")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="on which tasks (default: all)")
    add("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS), help="trained (default: all)")
    add("--policies", nargs="+", help="for `answers` and `variance`, name=folder, in place of those that `train` keeps")
    add("--blocks", type=int, help="of prompts that `answers` and `variance` measure (default: 20 of 32, 16 of 8)")
    add("--workers", type=int, default=2, help="processes, of one thread each (default: %(default)s)")
    add("--seeds", type=int, default=5, help="runs per estimator (default: %(default)s)")
    add("--tokens", type=int, default=Setting.tokens, help="generated in a run (default: %(default)s)")
    add("--data", help="corpus, in place of that of `prepare`")
    add("--actor", help="supervised policy, in place of that of `prepare`")
    add("--reward", help="reward model, in place of that of `prepare`")
    args = parser.parse_args()
    for name in ("workers", "tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.seeds < 2:
        raise UserError(f"--seeds {args.seeds}: expected at least 2, or there are no intervals")
    if "report" in args.stages and set(args.estimators) != set(ESTIMATORS):
        raise UserError("--estimators: a report needs them all; leave it out, or give --stages without report")
    args.output = args.output.resolve()
    return args


def setting_of(args: argparse.Namespace, task: str = "demo") -> Setting:
    return Setting(
        data=str(args.data or args.output / "demo/data"),
        actor=str(args.actor or args.output / "sft"),
        reward=str(args.reward or args.output / "reward"),
        cache=str(args.output / "cache"),
        tokens=args.tokens,
        unevenness=TASKS[task],
    )


def prepare(setting: Setting, output: Path) -> None:
    """Corpus, supervised policy and reward model, by the stages' own programs; what is there already is kept."""
    if not Path(setting.data).exists():
        make_demo(output / "demo")
    stages = [
        ("step1_supervised_finetuning", SUPERVISED, output / "demo/models/actor", setting.actor),
        ("step2_reward_model_finetuning", RANKING, output / "demo/models/reward", setting.reward),
    ]
    for stage, flags, model, folder in stages:
        if (Path(folder) / "config.json").exists():
            continue
        paths = ["--data_path", setting.data, "--data_output_path", setting.cache]
        paths += ["--model_name_or_path", str(model), "--output_dir", folder, "--overwrite_output_dir"]
        command = [sys.executable, "main.py", *paths, *BOTH.split(), *flags.split()]
        subprocess.run(command, cwd=ROOT / stage, check=True)


def in_processes(function: Callable[..., None], jobs: list[tuple], workers: int) -> list[dict]:
    """The records that function(*job) leaves in job[0], its file; those that are there already are not made again."""
    missing = [job for job in jobs if not job[0].is_file()]
    if missing:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(function, *job) for job in missing]
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                print(f"{getattr(function, '__name__', 'measured')}: {done} of {len(missing)}", flush=True)
    return [json.loads(job[0].read_text()) for job in jobs]


def sweep_runs(estimators: list[str]) -> list[Run]:
    return [
        Run(name, seed, rate, CRITIC_RATE if ALGORITHMS[ESTIMATORS[name].algorithm].critic else None)
        for seed in SWEEP_SEEDS
        for name in estimators
        for rate in RATES
    ]


def chosen_runs(sweep: list[dict], estimators: list[str], seeds: int, kl: float) -> list[Run]:
    """Each estimator at the rate with the highest objective at the end of the sweep's runs, with every seed."""
    scores, runs = report.sweep_scores(sweep, kl), []
    for name in estimators:
        found = {run: statistics.fmean(of_run) for run, of_run in scores.items() if run.estimator == name}
        best = max(found, key=found.__getitem__)
        runs += [replace(best, seed=seed, snapshots=name == "remax" and seed == 0) for seed in range(seeds)]
    return sorted(runs, key=lambda run: (not run.snapshots, run.seed))  # the variance waits for the snapshots


def train_all(runs: list[Run], setting: Setting, folder: Path, workers: int) -> list[dict]:
    return in_processes(train, [(folder / run.name / "run.json", run, setting) for run in runs], workers)


def measure(
    function: Callable[..., None], policies: dict[str, str], setting: Setting, folder: Path, options: dict, workers: int
) -> dict[str, dict]:
    """By policy, what the function finds."""
    jobs = [(folder / f"{name}.json", path, setting) for name, path in policies.items()]
    return dict(zip(policies, in_processes(partial(function, **options), jobs, workers), strict=True))


def study(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """One task's records: sweep, runs, answers, variance."""
    setting, output, stages = setting_of(args, task), args.output / task, set(args.stages)
    found: dict[str, Any] = {"sweep": [], "runs": [], "answers": {}, "variance": {}}
    policies = dict(pair.split("=", 1) for pair in args.policies or [])
    if {"sweep", "train", "report"} & stages or not policies:
        sweep = replace(setting, evaluations=2)
        found["sweep"] = train_all(sweep_runs(args.estimators), sweep, output / "sweep", args.workers)
    if {"train", "report"} & stages or ({"answers", "variance"} & stages and not policies):
        runs = chosen_runs(found["sweep"], args.estimators, args.seeds, setting.kl)
        found["runs"] = train_all(runs, setting, output / "train", args.workers)
        snapshots = output / "train" / runs[0].name
        names = {"half-trained": "policy_half", "trained": "policy_end"}
        policies = policies or {
            "supervised": setting.actor,
            **{name: str(snapshots / folder) for name, folder in names.items()},
        }
    options = {"blocks": args.blocks} if args.blocks else {}
    for stage, function in (("answers", measure_answers), ("variance", measure_variance)):
        if {stage, "report"} & stages:
            found[stage] = measure(function, policies, setting, output / stage, options, args.workers)
    return found


def main() -> None:
    args = parse()
    if "prepare" in args.stages:
        prepare(setting_of(args), args.output)
    if set(args.stages) == {"prepare"}:
        return
    found = {task: study(args, task) for task in args.tasks}
    if "report" in args.stages:
        args.results.mkdir(parents=True, exist_ok=True)
        report.write(found, setting_of(args), args.results)
        print(f"tables, plots and figures in {args.results}")
    elif "answers" in args.stages:
        for task, records in found.items():
            print(f"{task}\n{report.answers_table(records['answers'])}")


if __name__ == "__main__":
    run_main(main)
