"""Compares the policy-gradient estimators on the built-in corpus, on a CPU.

    python benchmarks/estimators/run.py

Two tasks: the demo's, and one whose rewards tell prompts apart more than answers (`uneven`).

 1. `prepare`: corpus, supervised policy and reward model (skipped with --data, --actor and --reward).
 2. `sweep`: every estimator with each learning rate, on seeds of their own; the rate that is best on average is taken.
 3. `train`: every estimator with every seed.
 4. `offline`: supervised learning, DPO and R-DPO from the pairs that the reward model has learned from, swept and
    trained alike; for both tasks at once, whose rewards they do not see.
 5. `answers`: squared gradients of single answers, with respect to the logits, at the supervised policy and at a
    half-trained and a trained ReMax policy.
 6. `variance`: variance of the gradient of all parameters, at the same policies.
 7. `report`: tables in estimators.md, plots, and all figures in estimators.json.

What is finished is skipped, so an interrupted experiment goes on where it stood. About two hours on two free cores.
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
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import report  # noqa: E402
from experiment import ESTIMATORS, OFFLINE, TASKS, Run, Setting  # noqa: E402
from fixed_policy import measure_answers, measure_variance  # noqa: E402
from training import draw_supervised, train, train_offline, with_unevenness  # noqa: E402

from remax.algorithms import ALGORITHMS  # noqa: E402
from remax.demo.prepare import make_demo  # noqa: E402
from utils.run import UserError, run_main  # noqa: E402

STAGES = ("prepare", "sweep", "train", "offline", "answers", "variance", "report")
RATES = (1e-4, 3e-4, 1e-3)
CRITIC_RATE = 1e-3
WITH_CRITIC = [name for name, estimator in ESTIMATORS.items() if ALGORITHMS[estimator.algorithm].critic]
SWEEP_SEEDS = (1000, 1001)  # of no other run
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


def sweep_runs(methods: Iterable[str]) -> list[Run]:
    return [
        Run(name, seed, rate, CRITIC_RATE if name in WITH_CRITIC else None)
        for seed in SWEEP_SEEDS
        for name in methods
        for rate in RATES
    ]


def chosen_runs(sweep: list[dict], methods: Iterable[str], seeds: int, kl: float) -> list[Run]:
    """Each method at the rate with the highest objective at the end of the sweep's runs, with every seed."""
    scores, runs = report.sweep_scores(sweep, kl), []
    for name in methods:
        found = {run: statistics.fmean(of_run) for run, of_run in scores.items() if run.estimator == name}
        best = max(found, key=found.__getitem__)
        runs += [replace(best, seed=seed, snapshots=name == "remax" and seed == 0) for seed in range(seeds)]
    return sorted(runs, key=lambda run: (not run.snapshots, run.seed))  # the variance waits for the snapshots


def swept_and_trained(
    function: Callable[..., None], methods: Iterable[str], setting: Setting, folder: Path, args: argparse.Namespace
) -> tuple[list[dict], list[dict]]:
    """-> records of the sweep, and of the runs at what it chose, which are not made for the stage `sweep` alone."""

    def records(runs: list[Run], setting: Setting, folder: Path) -> list[dict]:
        jobs = [(folder / run.name / "run.json", run, setting) for run in runs]
        return in_processes(function, jobs, args.workers)

    sweep = records(sweep_runs(methods), replace(setting, evaluations=2), folder / "sweep")
    if set(args.stages) <= {"prepare", "sweep"}:
        return sweep, []
    return sweep, records(chosen_runs(sweep, methods, args.seeds, setting.kl), setting, folder / "train")


def offline(args: argparse.Namespace) -> dict[str, Any]:
    """Records of the methods that read pairs: sweep, runs; and the draws that win rates are over."""
    setting, folder = setting_of(args), args.output / "offline"
    sweep, runs = swept_and_trained(train_offline, OFFLINE, setting, folder, args)
    (supervised,) = in_processes(draw_supervised, [(folder / "supervised.json", setting)], 1)
    return {"sweep": sweep, "runs": runs, "draws": supervised["draws"]}


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
    if {"sweep", "train", "report"} & stages or ({"answers", "variance"} & stages and not policies):
        found["sweep"], found["runs"] = swept_and_trained(train, args.estimators, setting, output, args)
    if found["runs"]:
        snapshots = output / "train" / Run(**found["runs"][0]["run"]).name
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
    if {"offline", "report"} & set(args.stages):
        of_pairs = offline(args)
        for task, records in found.items():
            records["draws"] = of_pairs["draws"]
            for name in ("sweep", "runs"):
                records[name] += [with_unevenness(record, TASKS[task]) for record in of_pairs[name]]
    if "report" in args.stages:
        args.results.mkdir(parents=True, exist_ok=True)
        report.write(found, setting_of(args), args.results)
        print(f"tables, plots and figures in {args.results}")
    elif "answers" in args.stages:
        for task, records in found.items():
            print(f"{task}\n{report.answers_table(records['answers'])}")


if __name__ == "__main__":
    run_main(main)
