"""The table (markdown) and the plot (PNG) of a run, from its metrics.jsonl files and measured.json."""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from measuring import fill, table

from remax.evaluation.judges import read_annotations
from remax.evaluation.winrates import (
    REFITS,
    Comparison,
    Summary,
    best_cost,
    fit,
    relative_lengths,
    resampled,
    sigmoid,
    summarise,
)
from utils.run import UserError, run_main


def read_metrics(run: Path, stage: str) -> list[dict]:
    path = run / stage / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"--run {run}: no file {path}; expected a finished run of run.sh")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curve(metrics: list[dict], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one figure."""
    rows = [row for row in metrics if row.get(name) is not None]
    return [row["step"] for row in rows], [row[name] for row in rows]


def plot(run: Path, path: Path) -> None:
    stages = {stage: read_metrics(run, stage) for stage in ("sft", "reward", "referee", "remax")}
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.2), constrained_layout=True)

    def draw(axis, title: str, *lines: tuple[str, str, str]) -> None:
        for stage, name, label in lines:
            steps, values = curve(stages[stage], name)
            axis.plot(steps, values, marker="o" if name.startswith("eval/") else None, markersize=3, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=8)

    draw(axes[0, 0], "step 1: held-out perplexity", ("sft", "eval/perplexity", ""))
    axes[0, 0].set_yscale("log")
    draw(
        axes[0, 1],
        "step 2: held-out accuracy",
        ("reward", "eval/accuracy", "reward model"),
        ("referee", "eval/accuracy", "referee"),
        ("reward", "eval/longer_wins", "longer wins"),
    )
    draw(
        axes[0, 2],
        "step 3: learned reward",
        ("remax", "train/reward", "training"),
        ("remax", "eval/reward", "held out"),
    )
    steps, values = curve(stages["remax"], "eval/reward")
    _, errors = curve(stages["remax"], "eval/reward_standard_error")
    axes[0, 2].errorbar(steps, values, errors, fmt="none", ecolor="tab:orange", capsize=2)
    draw(axes[1, 0], "step 3: KL to SFT, nats per token", ("remax", "eval/kl_per_token", ""))
    draw(
        axes[1, 1],
        "step 3: answer length, tokens",
        ("remax", "train/length", "training"),
        ("remax", "eval/length", "held out"),
    )
    draw(
        axes[1, 2],
        "step 3: entropy, nats per token",
        ("remax", "train/entropy", "training"),
        ("remax", "eval/entropy", "held out"),
    )
    figure.savefig(path, dpi=100)


def cell(figure: dict, digits: int = 3) -> str:
    """Such as 0.123 ± 0.004."""
    return f"{figure['mean']:.{digits}f} ± {figure['se']:.{digits}f}"


def filled_up(rows: list[list[str]]) -> str:
    """A table of Markdown; the first row is the head, and shorter ones are filled up."""
    head, *body = rows
    return "\n".join(table(head, [row + [""] * (len(head) - len(row)) for row in body]))


@dataclass(frozen=True)
class Method:
    """A method's answers against the supervised policy's, by the referee.

    Attributes:
        rates: win rates of the seeds in percent, raw and length-controlled.   pooled: of all seeds' comparisons.
    """

    name: str
    seeds: dict[Path, list[Comparison]]  # by the folder of a seed
    rates: dict[str, list[float]]
    pooled: Summary

    @property
    def comparisons(self) -> list[Comparison]:
        return [one for found in self.seeds.values() for one in found]


def read_methods(run: Path) -> list[Method]:
    """In the order in which they were judged; none where `winrates` was not run."""
    folders = [run, *sorted(run.glob("seed_*"), key=lambda folder: int(folder.name.removeprefix("seed_")))]
    judged: dict[str, list[Path]] = {}  # folders of a method's seeds
    for folder in folders:
        for file in sorted((folder / "winrates").glob("*.json"), key=lambda file: file.stat().st_mtime_ns):
            if (folder / "verdicts" / file.name).is_file():
                judged.setdefault(file.stem, []).append(folder)
    methods = []
    for name, found in judged.items():
        texts = [(folder / "winrates" / f"{name}.json").read_text() for folder in found]
        pairs = [json.loads(text)["pairs"][0] for text in texts]
        rates = {kind: [pair[kind]["value"] for pair in pairs] for kind in ("raw", "controlled")}
        seeds = {
            folder: read_annotations(str(folder / "verdicts" / f"{name}.json"), f"--run {run}") for folder in found
        }
        methods.append(Method(name, seeds, rates, summarise([one for rows in seeds.values() for one in rows])))
    return methods


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; not a number for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def mean_of_seeds(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Such as 61.2 ± 0.4; of one seed 61.2."""
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.{digits}f}{error}"


def costs(method: Method) -> list[str]:
    """Nats to the supervised policy, seconds of training, and thousands of generated tokens of a seed.

    Seconds are those of the fastest step of all seeds, times the steps: other work on the machine slows most of them.
    """
    nats, seconds, tokens = [], [], []
    for folder in method.seeds:
        if not (folder / method.name / "metrics.jsonl").is_file():
            return [""] * 3
        rows = read_metrics(folder, method.name)
        steps = [row for row in rows if "train/seconds_per_step" in row]
        seconds += [row["train/seconds_per_step"] for row in steps]
        if "train/kl" in steps[0]:
            nats.append(curve(rows, "eval/kl")[1][-1])
            tokens.append(sum(row["train/tokens_per_second"] * row["train/seconds_per_step"] for row in steps))
    generated = f"{statistics.median(tokens) / 1000:.0f}" if tokens else "0"
    return [mean_of_seeds(nats) if nats else "", f"{len(steps) * min(seconds):.0f}", generated]


def methods_table(methods: Sequence[Method]) -> list[str]:
    """± is one standard error over seeds, brackets a 95 % interval over prompts."""
    rows = []
    for method in methods:
        pooled = method.pooled
        rates = [
            f"{mean_of_seeds(method.rates[kind])} [{rate.low:.1f}, {rate.high:.1f}]"
            for kind, rate in (("raw", pooled.raw), ("controlled", pooled.controlled))
        ]
        lengths = [f"{pooled.longer_wins:.1f}", f"{pooled.characters[0]:.0f}"]
        rows.append([method.name, str(len(method.seeds)), *rates, *lengths, *costs(method)])
    header = ["method", "seeds", "win rate over SFT, %", "length-controlled, %", "longer wins, %", "characters"]
    header += ["nats to SFT", "training, s", "generated, thousand tokens"]
    return table(header, rows) if rows else []


def rates_by_prompt(method: Method, folder: Path) -> np.ndarray:
    """(prompts,) a seed's win rates in percent."""
    found: dict[str, list[float]] = {}
    for one in method.seeds[folder]:
        found.setdefault(one.prompt, []).append(100 * one.p)
    return np.array([statistics.fmean(found[prompt]) for prompt in sorted(found)])


def difference(first: Method, second: Method) -> str:
    """Of raw win rates, paired by seed and prompt.

    It is bold where two 95 % intervals of the mean (Student's t) leave out 0: over at least three seeds, as two may be
    close by chance, and over prompts.
    """
    from scipy.stats import t

    common = [folder for folder in first.seeds if folder in second.seeds]
    found = np.stack([rates_by_prompt(first, folder) - rates_by_prompt(second, folder) for folder in common])
    shown = mean_of_seeds(found.mean(1).tolist(), sign="+")
    if len(common) < 3:
        return shown
    over_seeds = t.ppf(0.975, len(common) - 1) * standard_error(found.mean(1).tolist())
    over_prompts = t.ppf(0.975, found.shape[1] - 1) * standard_error(found.mean(0).tolist())
    return f"**{shown}**" if abs(found.mean()) > max(over_seeds, over_prompts) else shown


def differences_table(methods: Sequence[Method]) -> list[str]:
    """Each method minus each that stands before it."""
    cells = {(b.name, a.name): difference(b, a) for a, b in combinations(methods, 2)}
    names = [method.name for method in methods]
    rows = [[name, *(cells.get((name, other), "") for other in names[:-1])] for name in names[1:]]
    return table(["minus", *names[:-1]], rows) if rows else []


def marks(answer: str) -> int:
    """Bold marks of Markdown."""
    return answer.count("**")


def at_equal_style(comparisons: Sequence[Comparison]) -> str:
    """The win rate in percent at equal characters and bold marks, with a 95 % interval over prompts.

    As the length-controlled rate (remax/evaluation/winrates.py), with a second column for the difference of marks.
    """
    lengths = [len(one.first) - len(one.second) for one in comparisons]
    bold = [marks(one.first) - marks(one.second) for one in comparisons]
    columns = [relative_lengths(np.array(column, dtype=float)) for column in (lengths, bold)]
    features = np.stack([*columns, np.ones(len(comparisons))], axis=1)  # (n, 3)
    p, weight = np.array([one.p for one in comparisons]), np.ones(len(comparisons))
    cost = best_cost(features, p, weight)

    def rate(rows: np.ndarray) -> float:
        return 100 * float(sigmoid(fit(features[rows], p[rows], weight[rows], cost)[-1]))

    low, high = np.percentile([rate(rows) for rows in resampled(comparisons, REFITS)], [2.5, 97.5])
    return f"{rate(np.arange(len(comparisons))):.1f} [{low:.1f}, {high:.1f}]"


def style_table(methods: Sequence[Method]) -> list[str]:
    """What the answers of all seeds look like; those of the supervised policy first."""

    def looks(name: str, answers: Sequence[str]) -> list[str]:
        ends = statistics.fmean(answer.rstrip().endswith((".", "!", "?")) for answer in answers)
        bold = [marks(answer) for answer in answers]
        any_bold = statistics.fmean(n > 0 for n in bold)
        words = statistics.fmean(len(answer.split()) for answer in answers)
        return [name, f"{statistics.fmean(bold):.1f}", f"{any_bold:.0%}", f"{words:.0f}", f"{ends:.0%}"]

    rows = [looks("sft", [one.first for one in methods[0].comparisons]) + [""] * 3] if methods else []
    for method in methods:
        pairs = [(marks(one.second) - marks(one.first), one) for one in method.comparisons]
        more = statistics.fmean((d > 0) + 0.5 * (d == 0) for d, _ in pairs)
        for_more = statistics.fmean(one.verdict if d > 0 else 1 - one.verdict for d, one in pairs if d)
        shares = [f"{share:.0%}" for share in (more, for_more)]
        rows.append(
            [*looks(method.name, [one.second for _, one in pairs]), *shares, at_equal_style(method.comparisons)]
        )
    header = ["answers of all seeds", "bold marks", "with any", "words", "end with `.`, `!`, `?`"]
    header += ["more marks than SFT's", "verdicts for more marks", "win rate at equal characters and marks, %"]
    return table(header, rows) if rows else []


def tables(run: Path) -> str:
    """Markdown of the three stages. Every ± is one standard error over held-out prompts."""
    measured = json.loads((run / "measured.json").read_text())
    perplexity, policy = measured["perplexity"], measured["policy"]
    sft = [["held-out perplexity of the chosen answers", "random weights", "after step 1", "after step 3"]]
    sft.append(
        ["", *(f"{perplexity[k]['perplexity']:.1f} ± {perplexity[k]['se']:.1f}" for k in ("before", "sft", "remax"))]
    )
    judges = [["held-out pairs", "reward model", "referee", "longer wins"]]
    longer = {"accuracy": cell(measured["reward"]["longer_wins"]), "balanced": "0.500"}
    longer |= {"longer_chosen": "1", "shorter_chosen": "0", "equal_length": "0.500"}
    for key, name in (
        ("accuracy", "all"),
        ("balanced", "as if the longer answer won half the time"),
        ("longer_chosen", "the longer answer was chosen"),
        ("shorter_chosen", "the shorter answer was chosen"),
        ("equal_length", "equally long (after the cut)"),
    ):
        pairs = f" ({measured['reward'][key]['n']})" if "n" in measured["reward"][key] else ""
        judges.append([name + pairs, cell(measured["reward"][key]), cell(measured["referee"][key]), longer[key]])
    judges.append(
        [
            "correlation of score and length",
            *(f"{measured[k]['reward_length_correlation']:.2f}" for k in ("reward", "referee")),
            "1",
        ]
    )
    evaluations = {row["step"]: row for row in read_metrics(run, "remax") if "eval/reward" in row}
    first, last = evaluations[0], evaluations[policy["last_step"]]
    answers = [["answers to held-out prompts", "SFT", f"ReMax, step {policy['last_step']}", "difference"]]
    answers[0] += ["the data's chosen, cut", "rejected, cut"]
    for key, name, digits in (
        ("reward", "learned reward", 3),
        ("reward_again", "learned reward of the text, encoded anew", 3),
        ("referee", "referee's reward of the text (not optimised)", 3),
        ("length", "length, tokens", 1),
        ("ended", "share that ended", 3),
        ("repeated", "share of repeated 4-grams", 3),
        ("bold", "bold marks (**) an answer", 2),
    ):
        data = [cell(policy[side][key], digits) if key in policy[side] else "" for side in ("chosen", "rejected")]
        answers.append([name, *(cell(policy[side][key], digits) for side in ("sft", "remax", "difference")), *data])
    for key, judge in (("reward", "learned reward"), ("referee", "referee's reward")):
        for held, alike in (
            ("rise_at_equal_length", "length and ending"),
            ("rise_at_equal_style", "... and bold, repeats"),
        ):
            answers.append([f"rise of {judge} at equal {alike}", "", "", cell(policy[held][key])])
    for key, name in (
        ("kl_per_token", "KL to SFT, nats per token"),
        ("entropy", "entropy, nats per token"),
        ("reference_perplexity", "perplexity under SFT"),
    ):
        before, after = first[f"eval/{key}"], last[f"eval/{key}"]
        answers.append([name, f"{before:.3g}", f"{after:.3g}", f"{after - before:+.3g}"])
    answers.append(
        [
            "correlation of reward and length",
            *(f"{policy[side]['reward_length_correlation']:.2f}" for side in ("sft", "remax")),
        ]
    )
    count = policy["sft"]["reward"]
    answers.append(
        [f"distinct answers of {count['n']}", *(str(policy[side]["distinct_answers"]) for side in ("sft", "remax"))]
    )
    return "\n".join(map(filled_up, (sft, judges, answers)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Table and plot of a run on real data.")
    parser.add_argument("--run", required=True, help="output folder of run.sh; report.md and report.png go there")
    parser.add_argument(
        "--document", help="Markdown whose tables between the marks of methods, differences and style are made anew"
    )
    args = parser.parse_args()
    run = Path(args.run)
    methods = read_methods(run)
    compared = {"methods": methods_table(methods), "differences": differences_table(methods)}
    compared |= {"style": style_table(methods)}
    text = "\n".join([tables(run), *(line for lines in compared.values() for line in lines)])
    (run / "report.md").write_text(text, encoding="utf-8")
    plot(run, run / "report.png")
    if args.document:
        fill(Path(args.document), compared)
    print(text)
    print(f"written to {run / 'report.md'} and {run / 'report.png'}")


if __name__ == "__main__":
    run_main(main)
