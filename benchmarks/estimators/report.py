"""Tables, plots and figures of the comparison.

estimators.md keeps its prose; the tables stand between `<!-- begin NAME -->` and `<!-- end NAME -->` and are made anew.
Intervals are 95 %: Student's t over seeds, and over the blocks left out in turn (jackknife) for gradient variances.
"""

from __future__ import annotations

import bisect
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from experiment import ESTIMATORS, METHODS, Run, Setting
from fixed_policy import PROBES
from matplotlib.ticker import LogLocator
from measuring import fill, table
from scipy.stats import t as students_t

from remax.evaluation.winrates import best_cost, fit, relative_lengths, sigmoid

COLOURS = {name: plt.get_cmap("tab20")(place) for place, name in enumerate(ESTIMATORS)}
DRAWN = ("reinforce_mean", "remax", "calibrated", "calibrated_4", "rloo_4", "grpo_4", "ppo", "dpo")  # as curves
AXES = {"tokens": "generated tokens (greedy ones included)", "cpu_seconds": "seconds of training on one core"}
BASIS = "remax"  # what others are compared with; of the trained ones also RIVAL
RIVAL = "rloo_4"
# What the calibrated baseline is held against, and whether per generated token.
COMPARED = [("calibrated", other, False) for other in ("reinforce_mean", "remax", "remax_kl", "rloo_2")]
COMPARED += [("calibrated_4", other, False) for other in ("reinforce_mean", "remax", "rloo_4")]
COMPARED += [("calibrated_4", "rloo_4", True)]


def quantile(freedom: float) -> float:
    """The factor of a standard error in a 95 % interval."""
    return float(students_t.ppf(0.975, freedom))


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
    places = [point[axis] for point in points]
    right = bisect.bisect_left(places, where)
    if right == len(places):  # at the end, where a method that generates nothing is at any number of tokens
        return value(points[-1])
    near = range(max(right - 1, 0), right + 1)
    return float(np.interp(where, [places[k] for k in near], [value(points[k]) for k in near]))


def by_method(records: list[dict]) -> dict[str, list[list[dict]]]:
    """Method -> the points of each of its runs."""
    return {name: [r["points"] for r in records if r["run"]["estimator"] == name] for name in METHODS}


def plus_minus(pair: tuple[float, float], digits: int = 2) -> str:
    return f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"


def brief(x: float, digits: int = 3) -> str:
    """So many significant digits, never with an exponent."""
    return f"{float(f'{x:.{digits}g}'):.15g}"


def sweep_scores(sweep: list[dict], kl: float) -> dict[Run, list[float]]:
    """By method and rate, the final objectives of the sweep's runs, one for each seed."""
    found: dict[Run, list[float]] = {}
    for record in sweep:
        found.setdefault(Run(**record["run"] | {"seed": 0}), []).append(final_objective(record, kl))
    return dict(sorted(found.items(), key=lambda item: (METHODS.index(item[0].estimator), item[0].rate)))


def sweep_table(sweep: list[dict], kl: float) -> list[str]:
    rows, found = [], sweep_scores(sweep, kl)
    for run, scores in found.items():
        mean = statistics.fmean(scores)
        best = max(statistics.fmean(of_run) for other, of_run in found.items() if other.estimator == run.estimator)
        mark = "**" if mean == best else ""
        each = " ".join(f"{score:.2f}" for score in scores)
        rows.append([run.estimator, f"{run.rate:g}", f"{mark}{mean:.2f}{mark}", each])
    return table(["method", "learning rate", "learned reward - beta KL", "of each seed"], rows)


def common_place(runs: dict[str, list[list[dict]]], axis: str) -> float:
    """The farthest place on an axis that every run reached which moves on it."""
    return min(points[-1][axis] for each in runs.values() for points in each if points[-1][axis])


def final_table(runs: dict[str, list[list[dict]]], axis: str, kl: float) -> list[str]:
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
        shown = f"{spent:.1f}" if other == "cpu_seconds" else f"{spent / 1000:.1f} k" if spent else "none"
        rows.append([name, shown, *cells, *against])
    header = ["estimator", "seconds" if other == "cpu_seconds" else "tokens", *values]
    return table([*header, f"less {BASIS}'s", f"less {RIVAL}'s"], rows)


def wins(point: dict, draws: list[dict]) -> np.ndarray:
    """(draws, prompts): 1 where the answer's true reward is above that of the supervised policy's, 1/2 where equal."""
    against = np.array([draw["true_reward"] for draw in draws])
    return 0.5 + 0.5 * np.sign(np.array(point["answers"]["true_reward"]) - against)


def win_rate(point: dict, draws: list[dict]) -> float:
    """Percent."""
    return 100 * float(wins(point, draws).mean())


def controlled_win_rate(point: dict, draws: list[dict]) -> float:
    """Percent, as if both answers were of one length: the minimal one of `remax.evaluation.winrates`, in tokens."""
    p = wins(point, draws).flatten()
    longer = (np.array([draw["length"] for draw in draws]) - np.array(point["answers"]["length"])).flatten()
    features, weight = np.stack([relative_lengths(longer.astype(float)), np.ones(len(p))], axis=1), np.ones(len(p))
    return 100 * float(sigmoid(fit(features, p, weight, best_cost(features, p, weight))[1]))


def wins_at(runs: dict[str, list[list[dict]]], draws: list[dict]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Method -> axis -> figure -> of each run at the axis' common place."""
    figures: dict[str, Callable[[dict], float]] = {
        "win rate": lambda point: win_rate(point, draws),
        "length-controlled": lambda point: controlled_win_rate(point, draws),
        "length": lambda point: point["length"],
    }
    places = {axis: common_place(runs, axis) for axis in AXES}
    return {
        name: {
            axis: {what: [at(points, axis, place, value) for points in each] for what, value in figures.items()}
            for axis, place in places.items()
        }
        for name, each in runs.items()
    }


def wins_table(found: dict[str, dict[str, dict[str, list[float]]]]) -> list[str]:
    rows = [
        [name, *(plus_minus(interval(values), 1) for of_axis in axes.values() for values in of_axis.values())]
        for name, axes in found.items()
    ]
    names = {"tokens": "equal tokens", "cpu_seconds": "equal time"}
    columns = [f"{what}, {names[axis]}" for axis, figures in next(iter(found.values())).items() for what in figures]
    return table(["method", *columns], rows)


def ratio(figures: dict, basis: dict) -> str:
    """Variance / basis variance with its interval, by the jackknife on the logarithm: the same answers serve both."""
    logs = [math.log(a["variance"] / b["variance"]) for a, b in zip(figures["without"], basis["without"], strict=True)]
    return exponential(jackknife(math.log(figures["all"]["variance"] / basis["all"]["variance"]), logs))


def exponential(pair: tuple[float, float]) -> str:
    """A ratio and its interval from those of its logarithm."""
    centre, half = pair
    return f"{math.exp(centre):.2f} ({math.exp(centre - half):.2f} to {math.exp(centre + half):.2f})"


def relative(figures: dict) -> str:
    """Variance / |E g|^2; where the squared norm is not told from 0, only a lower bound."""
    signal, half = jackknife(figures["all"]["signal"], [w["signal"] for w in figures["without"]])
    variance = figures["all"]["variance"]
    low = brief(variance / (signal + half), 2)
    if signal - half <= 0:
        return f"> {low}"
    return f"{brief(variance / signal, 2)} ({low} to {brief(variance / (signal - half), 2)})"


def answers_table(answers: dict[str, dict]) -> list[str]:
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


def mean_square(blocks: list[dict], per_token: bool) -> float:
    """Mean of an answer's squared gradient, times the tokens that it costs where it is to be told per token."""
    answers = sum(block["answers"] for block in blocks)
    tokens = sum(block["tokens"] for block in blocks) / answers
    return sum(block["square"] for block in blocks) / answers * (tokens if per_token else 1.0)


def compared_table(answers: dict[str, dict]) -> list[str]:
    """Ratios of squared gradients with intervals by the jackknife: the same answers serve both of a pair."""
    rows = []
    for name, other, per_token in COMPARED:
        cells = []
        for record in answers.values():
            blocks = [record["probes"][which] for which in (name, other)]

            def ratio_of(kept: Callable[[int], bool], blocks=blocks, per_token=per_token) -> float:
                parts = [[block for k, block in enumerate(found) if kept(k)] for found in blocks]
                return math.log(mean_square(parts[0], per_token) / mean_square(parts[1], per_token))

            without = [ratio_of(lambda k, i=i: k != i) for i in range(len(blocks[0]))]
            cells.append(exponential(jackknife(ratio_of(lambda k: True), without)))
        rows.append([name, other, "generated token" if per_token else "answer", *cells])
    return table(["estimator", "over", "per", *answers], rows)


def seconds_per_prompt(runs: dict[str, list[list[dict]]], answers_per_step: int) -> dict[str, float]:
    """Seconds of a training step, for each prompt in it."""
    ends = {name: [points[-1] for points in each] for name, each in runs.items() if each}
    return {
        name: statistics.fmean(end["cpu_seconds"] / end["steps"] for end in found)
        / (answers_per_step // ESTIMATORS[name].answers)
        for name, found in ends.items()
        if name in ESTIMATORS
    }


def variance_tables(variance: dict[str, dict], seconds: dict[str, float]) -> tuple[list[str], list[str]]:
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


def rewards_table(variance: dict[str, dict]) -> list[str]:
    names = {
        "mean": "mean reward",
        "within": "deviation within a prompt",
        "among": "deviation among prompts",
        "greedy": "mean reward of the greedy answers",
        "kl": "KL, nats",
    }
    rows = [[policy, *(f"{record['rewards'][name]:.2f}" for name in names)] for policy, record in variance.items()]
    return table(["policy", *names.values()], rows)


def plot_rewards(runs: dict[str, list[list[dict]]], kl: float, path: Path) -> None:
    """Curves of the methods in DRAWN; those that generate nothing are on the axis of time alone."""
    values: dict[str, Callable[[dict], float]] = {
        "learned reward - beta KL": lambda point: objective(point, kl),
        "true reward": lambda point: point["true_reward"],
        "KL to the reference, nats per answer": lambda point: point["kl"],
    }
    figure, grid = plt.subplots(len(AXES), len(values), figsize=(13, 7.5), sharex="row", sharey="col")
    for row, (axis, label) in zip(grid, AXES.items(), strict=True):
        for place, (title, value) in zip(row, values.items(), strict=True):
            for number, name in enumerate(DRAWN):
                end = min(points[-1][axis] for points in runs[name])
                if not end:
                    continue
                x = np.linspace(0, end, 60)
                curves = [[at(points, axis, where, value) for where in x] for points in runs[name]]
                pairs = np.array([interval(list(column)) for column in zip(*curves, strict=True)])
                colour = plt.get_cmap("tab10")(number)
                place.plot(x, pairs[:, 0], color=colour, label=name, linewidth=1.8)
                low, high = pairs[:, 0] - pairs[:, 1], pairs[:, 0] + pairs[:, 1]
                place.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            place.set_title(title, fontsize=10)
            place.set_xlabel(label, fontsize=9)
            place.grid(alpha=0.3)
    grid[1, 0].legend(fontsize=8)
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
        place.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        place.xaxis.set_major_formatter("{x:g}")
        place.xaxis.set_minor_formatter("")
        place.set_title(f"{policy} policy", fontsize=10)
        place.set_xlabel("gradient variance at 1000 generated tokens", fontsize=9)
        place.set_yticks(range(len(PROBES)), list(reversed(PROBES)), fontsize=9)
        place.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=85)
    plt.close(figure)


def rounded(value):
    """Five significant digits, in any nesting."""
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def figures_alone(records: dict) -> dict:
    """A task's records without what each single answer is worth, which is most of their size."""
    lean = {
        name: [
            record | {"points": [{k: v for k, v in point.items() if k != "answers"} for point in record["points"]]}
            for record in records[name]
        ]
        for name in ("sweep", "runs")
    }
    return {name: lean.get(name, value) for name, value in records.items() if name != "draws"}


def write(found: dict[str, dict], setting: Setting, folder: Path) -> None:
    """The report of all tasks.

    Args:
        found: By task, {sweep, runs, draws, answers, variance}. The tables of tasks but the first have its name behind
            theirs.
    """
    kl, blocks, tasks = setting.kl, {}, {}
    for place, (task, records) in enumerate(found.items()):
        runs, variance = by_method(records["runs"]), records["variance"]
        won = wins_at(runs, records["draws"])
        tasks[task] = figures_alone(records) | {"wins": won}
        measured, shifted = variance_tables(variance, seconds_per_prompt(runs, setting.answers_per_step))
        behind = f"_{task}" if place else ""
        plot_rewards(runs, kl, folder / f"estimators_reward{behind}.png")
        plot_variance(variance, folder / f"estimators_variance{behind}.png")
        of_task = {
            "rewards": rewards_table(variance),
            "answers": answers_table(records["answers"]),
            "compared": compared_table(records["answers"]),
            "variance": measured,
            "constant": shifted,
            "tokens": final_table(runs, "tokens", kl),
            "seconds": final_table(runs, "cpu_seconds", kl),
            "wins": wins_table(won),
            "sweep": sweep_table(records["sweep"], kl),
        }
        blocks |= {name + behind: text for name, text in of_task.items()}
    document = folder / "estimators.md"
    if not document.exists():
        document.write_text("# The estimators compared\n", encoding="utf-8")
    fill(document, blocks)
    paths = ("data", "actor", "reward", "cache", "unevenness")
    settings = {name: value for name, value in asdict(setting).items() if name not in paths}
    record = rounded({"setting": settings, "tasks": tasks})
    (folder / "estimators.json").write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")
