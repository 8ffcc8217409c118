"""Tables, plots and figures of the comparison.

estimators.md keeps its prose; the tables stand between `<!-- begin NAME -->` and `<!-- end NAME -->` and are made anew.
Intervals are 95 %: Student's t over seeds, and over the blocks left out in turn (jackknife) for gradient variances.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from experiment import ESTIMATORS, PROBES, Run, Setting

# Student's t, 97.5 % quantile, 1 to 20 degrees of freedom
T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
COLOURS = {name: plt.get_cmap("tab20")(place) for place, name in enumerate(ESTIMATORS)}
AXES = {"tokens": "generated tokens (greedy ones included)", "cpu_seconds": "seconds of training on one core"}
BASIS = "remax"  # what others are compared with; of the trained ones also RIVAL
RIVAL = "rloo_4"


def quantile(freedom: float) -> float:
    """The factor of a standard error in a 95 % interval."""
    freedom = int(freedom)
    return T[freedom - 1] if freedom <= len(T) else 1.96 + 2.5 / freedom


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width, Student's t over independent values."""
    return statistics.fmean(values), quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def difference(a: list[float], b: list[float]) -> tuple[float, float]:
    """mean(a) - mean(b) and its half-width by Welch: the two samples are independent and differ in spread."""
    va, vb = (statistics.variance(x) / len(x) for x in (a, b))
    if va + vb == 0:
        return statistics.fmean(a) - statistics.fmean(b), 0.0
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return statistics.fmean(a) - statistics.fmean(b), quantile(freedom) * math.sqrt(va + vb)


def jackknife(whole: float, without: list[float]) -> tuple[float, float]:
    """Estimate and half-width from the same estimate with each of n blocks left out."""
    n, mean = len(without), statistics.fmean(without)
    error = math.sqrt((n - 1) / n * sum((x - mean) ** 2 for x in without))
    return whole, quantile(n - 1) * error


def objective(point: dict, kl: float) -> float:
    """What is maximised: learned reward minus beta times KL, per answer."""
    return point["reward"] - kl * point["kl"]


def final_objective(record: dict, kl: float) -> float:
    return objective(record["points"][-1], kl)


def at(points: list[dict], axis: str, where: float, value: Callable[[dict], float]) -> float:
    """The value at a place on an axis, linear between evaluations."""
    return float(np.interp(where, [point[axis] for point in points], [value(point) for point in points]))


def by_estimator(records: list[dict]) -> dict[str, list[list[dict]]]:
    """Estimator -> the points of each of its runs."""
    return {name: [r["points"] for r in records if r["run"]["estimator"] == name] for name in ESTIMATORS}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plus_minus(pair: tuple[float, float], digits: int = 2) -> str:
    return f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"


def brief(x: float, digits: int = 3) -> str:
    """So many significant digits, never with an exponent."""
    return f"{float(f'{x:.{digits}g}'):.15g}"


def sweep_scores(sweep: list[dict], kl: float) -> dict[Run, list[float]]:
    """By estimator and rate, the final objectives of the sweep's runs, one for each seed."""
    found: dict[Run, list[float]] = {}
    for record in sweep:
        found.setdefault(Run(**record["run"] | {"seed": 0}), []).append(final_objective(record, kl))
    return dict(sorted(found.items(), key=lambda item: (list(ESTIMATORS).index(item[0].estimator), item[0].rate)))


def sweep_table(sweep: list[dict], kl: float) -> str:
    rows, found = [], sweep_scores(sweep, kl)
    for run, scores in found.items():
        mean = statistics.fmean(scores)
        best = max(statistics.fmean(of_run) for other, of_run in found.items() if other.estimator == run.estimator)
        mark = "**" if mean == best else ""
        each = " ".join(f"{score:.2f}" for score in scores)
        rows.append([run.estimator, f"{run.rate:g}", f"{mark}{mean:.2f}{mark}", each])
    return table(["estimator", "learning rate", "learned reward - beta KL", "of each seed"], rows)


def common_place(runs: dict[str, list[list[dict]]], axis: str) -> float:
    """The farthest place on an axis that every run reached."""
    return min(points[-1][axis] for each in runs.values() for points in each)


def final_table(runs: dict[str, list[list[dict]]], axis: str, kl: float) -> str:
    values = {
        "learned reward": lambda p: p["reward"],
        "true reward": lambda p: p["true_reward"],
        "KL, nats": lambda p: p["kl"],
        "learned reward - beta KL": lambda p: objective(p, kl),
    }
    other = {"tokens": "cpu_seconds", "cpu_seconds": "tokens"}[axis]
    place, rows = common_place(runs, axis), []
    for name, each in runs.items():
        cells = [plus_minus(interval([at(points, axis, place, v) for points in each])) for v in values.values()]
        scores, *others = (
            [at(p, axis, place, values["learned reward - beta KL"]) for p in e]
            for e in (each, runs[BASIS], runs[RIVAL])
        )
        against = [
            "" if name == basis else plus_minus(difference(scores, found))
            for basis, found in zip((BASIS, RIVAL), others, strict=True)
        ]
        spent = statistics.fmean(at(points, axis, place, lambda p: p[other]) for points in each)
        rows.append([name, f"{spent:.1f}" if other == "cpu_seconds" else f"{spent / 1000:.1f} k", *cells, *against])
    header = ["estimator", "seconds" if other == "cpu_seconds" else "tokens", *values]
    return table([*header, f"less {BASIS}'s", f"less {RIVAL}'s"], rows)


def ratio(figures: dict, basis: dict) -> str:
    """Variance / basis variance with its interval, by the jackknife on the logarithm: the same answers serve both."""
    logs = [math.log(a["variance"] / b["variance"]) for a, b in zip(figures["without"], basis["without"], strict=True)]
    centre, half = jackknife(math.log(figures["all"]["variance"] / basis["all"]["variance"]), logs)
    return f"{math.exp(centre):.2f} ({math.exp(centre - half):.2f} to {math.exp(centre + half):.2f})"


def relative(figures: dict) -> str:
    """Variance / |E g|^2; where the squared norm is not told from 0, only a lower bound."""
    signal, half = jackknife(figures["all"]["signal"], [w["signal"] for w in figures["without"]])
    variance = figures["all"]["variance"]
    low = brief(variance / (signal + half), 2)
    if signal - half <= 0:
        return f"> {low}"
    return f"{brief(variance / signal, 2)} ({low} to {brief(variance / (signal - half), 2)})"


def answers_table(answers: dict[str, dict]) -> str:
    """E sum_t w_t A_t^2 of an answer, and times the tokens that an answer costs, greedy ones included."""
    rows = []
    names = next(iter(answers.values()))["probes"]
    for name in names:
        cells = []
        for record in answers.values():
            blocks = record["probes"][name]
            squares, tokens = ([block[what] / block["answers"] for block in blocks] for what in ("square", "tokens"))
            cells += [plus_minus(interval(squares)), f"{statistics.fmean(squares) * statistics.fmean(tokens):.0f}"]
        rows.append([name, *cells])
    return table(["estimator", *(f"{policy}, {per}" for policy in answers for per in ("answer", "x tokens"))], rows)


def seconds_per_prompt(runs: dict[str, list[list[dict]]], answers_per_step: int) -> dict[str, float]:
    """Seconds of a training step, for each prompt in it."""
    ends = {name: [points[-1] for points in each] for name, each in runs.items() if each}
    return {
        name: statistics.fmean(end["cpu_seconds"] / end["steps"] for end in found)
        / (answers_per_step // ESTIMATORS[name].answers)
        for name, found in ends.items()
    }


def variance_tables(variance: dict[str, dict], seconds: dict[str, float]) -> tuple[str, str]:
    """-> estimators as trained, with their variance per second of a step; and those with a constant added."""
    plain = [name for name in PROBES if "reward" not in name]
    rows = []
    for policy, record in variance.items():
        probes = record["probes"]
        for name in plain:
            own = probes[name]["all"]
            shown = "" if name == BASIS else ratio(probes[name], probes[BASIS])
            cosine = jackknife(own["cosine"], [w["cosine"] for w in probes[name]["without"]])
            hidden = own["cosine"] == 0 or any(w["cosine"] == 0 for w in probes[name]["without"])
            noise, error = jackknife(own["variance"], [w["variance"] for w in probes[name]["without"]])
            measured = f"{brief(noise)} ± {brief(error, 2)}"
            cost = seconds.get(PROBES[name].estimator if not PROBES[name].own_value else "", math.nan)
            a_second = "" if math.isnan(cost) else brief(own["unit_variance"] * cost)
            cells = [policy, name, f"{own['tokens_per_unit']:.1f}", measured, shown, a_second, relative(probes[name])]
            rows.append([*cells, "too noisy" if hidden else plus_minus(cosine)])
    header = ["policy", "estimator", "tokens per estimate", "variance", f"times {BASIS}'s", "a second's"]
    header.append("variance / squared norm")
    shifted = [name for name in PROBES if "reward" in name]
    constant_rows = []
    for name in shifted:
        base = name.split(",")[0]
        cells = [ratio(record["probes"][name], record["probes"][base]) for record in variance.values()]
        constant_rows.append([name, *cells])
    return table([*header, "cosine"], rows), table(["estimator", *variance], constant_rows)


def rewards_table(variance: dict[str, dict]) -> str:
    names = {
        "mean": "mean reward",
        "within": "deviation within a prompt",
        "among": "deviation among prompts",
        "greedy": "mean reward of the greedy answers",
        "kl": "KL, nats",
    }
    rows = [[policy, *(f"{record['rewards'][name]:.2f}" for name in names)] for policy, record in variance.items()]
    return table(["policy", *names.values()], rows)


def plot_rewards(runs: dict[str, list[list[dict]]], path: Path) -> None:
    values = {"reward": "learned reward", "true_reward": "true reward", "kl": "KL to the reference, nats per answer"}
    figure, grid = plt.subplots(len(AXES), len(values), figsize=(13, 7.5), sharex="row", sharey="col")
    for row, (axis, label) in zip(grid, AXES.items(), strict=True):
        for place, (value, title) in zip(row, values.items(), strict=True):
            for name, each in runs.items():
                x = np.linspace(0, min(points[-1][axis] for points in each), 60)
                curves = [[at(points, axis, where, lambda p, v=value: p[v]) for where in x] for points in each]
                pairs = np.array([interval(list(column)) for column in zip(*curves, strict=True)])
                place.plot(x, pairs[:, 0], color=COLOURS[name], label=name, linewidth=1.8)
                low, high = pairs[:, 0] - pairs[:, 1], pairs[:, 0] + pairs[:, 1]
                place.fill_between(x, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
            place.set_title(title, fontsize=10)
            place.set_xlabel(label, fontsize=9)
            place.grid(alpha=0.3)
    grid[0, 0].legend(fontsize=8)
    figure.suptitle("Held-out prompts: mean of the seeds with 95 % intervals")
    figure.tight_layout()
    figure.savefig(path, dpi=85)
    plt.close(figure)


def plot_variance(variance: dict[str, dict], path: Path) -> None:
    figure, grid = plt.subplots(1, len(variance), figsize=(13, 4.4), sharey=True)
    for place, (policy, record) in zip(grid, variance.items(), strict=True):
        for y, name in enumerate(reversed(PROBES)):
            figures = record["probes"][name]
            centre, half = jackknife(figures["all"]["variance"], [w["variance"] for w in figures["without"]])
            colour = COLOURS[PROBES[name].estimator]
            place.errorbar(centre, y, xerr=half, fmt="o", color=colour, markersize=5, capsize=3)
        signal = record["probes"][BASIS]["all"]["signal"]
        if signal > 0:
            place.axvline(signal, color="black", linestyle=":", label="squared norm of the mean gradient")
            place.legend(fontsize=8, loc="lower left")
        place.set_ylim(-1.8, len(PROBES) - 0.5)  # room for the legend
        place.set_xscale("log")
        place.set_title(f"{policy} policy", fontsize=10)
        place.set_xlabel("gradient variance at 1000 generated tokens", fontsize=9)
        place.set_yticks(range(len(PROBES)), list(reversed(PROBES)), fontsize=9)
        place.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=85)
    plt.close(figure)


def fill(document: Path, blocks: dict[str, str]) -> None:
    """Puts each text between its markers; a document without them gets them at its end."""
    text = document.read_text(encoding="utf-8") if document.exists() else "# The estimators compared\n"
    for name, content in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        block = f"{begin}\n{content}\n{end}"
        found = re.compile(re.escape(begin) + ".*?" + re.escape(end), flags=re.DOTALL)
        text = found.sub(lambda _, block=block: block, text) if found.search(text) else f"{text}\n{block}\n"
    document.write_text(text, encoding="utf-8")


def rounded(value):
    """Five significant digits, in any nesting."""
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write(found: dict[str, dict], setting: Setting, folder: Path) -> None:
    """The report of all tasks.

    Args:
        found: By task, {sweep, runs, answers, variance}. The tables of tasks but the first have its name behind theirs.
    """
    kl, blocks = setting.kl, {}
    for place, (task, records) in enumerate(found.items()):
        runs, variance = by_estimator(records["runs"]), records["variance"]
        measured, shifted = variance_tables(variance, seconds_per_prompt(runs, setting.answers_per_step))
        behind = f"_{task}" if place else ""
        plot_rewards(runs, folder / f"estimators_reward{behind}.png")
        plot_variance(variance, folder / f"estimators_variance{behind}.png")
        of_task = {
            "rewards": rewards_table(variance),
            "answers": answers_table(records["answers"]),
            "variance": measured,
            "constant": shifted,
            "tokens": final_table(runs, "tokens", kl),
            "seconds": final_table(runs, "cpu_seconds", kl),
            "sweep": sweep_table(records["sweep"], kl),
        }
        blocks |= {name + behind: text for name, text in of_task.items()}
    fill(folder / "estimators.md", blocks)
    paths = ("data", "actor", "reward", "cache", "unevenness")
    settings = {name: value for name, value in asdict(setting).items() if name not in paths}
    record = rounded({"setting": settings, "tasks": found})
    (folder / "estimators.json").write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")
