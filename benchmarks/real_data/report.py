"""The table (markdown) and the plot (PNG) of a run, from its metrics.jsonl files and measured.json."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from measuring import fill, table

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


def methods_table(run: Path) -> list[str]:
    """Each method's answers against the supervised policy's, by the referee; none where `winrates` was not run."""
    rows = []
    for file in sorted((run / "winrates").glob("*.json"), key=lambda file: file.stat().st_mtime_ns):  # as they were run
        (pair,) = json.loads(file.read_text())["pairs"]
        rates = [f"{r['value']:.1f} [{r['low']:.1f}, {r['high']:.1f}]" for r in (pair["raw"], pair["controlled"])]
        longer = f"{pair['longer_wins']:.1f}"
        rows.append([file.stem, *rates, f"{pair['discrete']['value']:.1f}", longer, f"{pair['characters'][0]:.0f}"])
    header = [
        "method",
        "win rate over SFT, %",
        "length-controlled, %",
        "by verdicts, %",
        "longer wins, %",
        "characters",
    ]
    return table(header, rows) if rows else []


def tables(run: Path) -> str:
    """Markdown. Every ± is one standard error over held-out prompts."""
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
        for fit, alike in (
            ("rise_at_equal_length", "length and ending"),
            ("rise_at_equal_style", "... and bold, repeats"),
        ):
            answers.append([f"rise of {judge} at equal {alike}", "", "", cell(policy[fit][key])])
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
    return "\n".join([*map(filled_up, (sft, judges, answers)), *methods_table(run)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Table and plot of a run on real data.")
    parser.add_argument("--run", required=True, help="output folder of run.sh; report.md and report.png go there")
    parser.add_argument("--document", help="Markdown whose table between the marks of `methods` is made anew")
    args = parser.parse_args()
    run = Path(args.run)
    text = tables(run)
    (run / "report.md").write_text(text, encoding="utf-8")
    plot(run, run / "report.png")
    if args.document:
        fill(Path(args.document), {"methods": methods_table(run)})
    print(text)
    print(f"written to {run / 'report.md'} and {run / 'report.png'}")


if __name__ == "__main__":
    run_main(main)
