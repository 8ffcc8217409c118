"""What the demo has learnt: base, fine-tuned and ReMax model on prompts that none of them was trained on.

    python -m remax.demo.report --output_dir output/demo

reads what `remax.demo.prepare` and the stages' training_scripts/demo/run_demo.sh have written below that folder, or
step 2 alone in the place of steps 1 and 2 (`hydra_sft`, one model that is both their results). It
prints a table and writes it to report.md, the same numbers to summary.json, reward, KL and length over the steps to
training.png, and answers before and after to samples.md. The corpus knows the true reward of every answer, so that
nobody has to believe the learned one.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from remax.core.batches import to_device
from remax.demo import corpus
from remax.demo.corpus import Estimate
from remax.engines.base import FrozenEngine
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.policy import Actor, Reference
from remax.engines.scorer import Reward
from remax.evaluation.answers import answer_prompts
from remax.evaluation.policy import evaluate_policy
from remax.evaluation.ranking import pair_scores, ranking_accuracy, wins
from remax.generation.decoder import GenerationSettings
from remax.models.loading import quiet_libraries
from remax.models.policy import load_policy
from remax.models.reward_model import load_reward_model
from remax.report.runs import Run, moving_average, read_run
from utils.data.encoding import Encoder, Names, encode_rows
from utils.data.loaders import COLLATORS, KINDS, eval_order, make_loader
from utils.data.preferences import load_data_set
from utils.run import UserError, describe_run, run_main
from utils.tokenizer import load_tokenizer

POLICIES = ("base", "SFT", "ReMax")
ENOUGH_STANDARD_ERRORS = 3.0
ENOUGH_OF_THE_GAP = 0.5
SAMPLES = 12  # prompts in samples.md
BATCH_SIZE = 100
PLOT = "![reward, KL and length over the steps of ReMax](training.png)\n"


def main() -> None:
    """Measures, writes the files and prints the table."""
    args = parse()
    quiet_libraries()
    started = time.perf_counter()
    output = Path(args.output_dir)
    hydra = (output / "hydra_sft").is_dir()
    stage_places = {name: "hydra_sft" if hydra and name != "remax" else name for name in ("sft", "reward", "remax")}
    stages = {name: read_stage(output / place) for name, place in stage_places.items()}
    places = {"base": "models/actor", "SFT": stage_places["sft"], "reward": stage_places["reward"]}
    folders = {name: output / place for name, place in (places | {"ReMax": "remax/actor"}).items()}
    for folder in folders.values():
        if not (folder / "config.json").is_file():
            raise UserError(f"--output_dir {output}: {folder} holds no model; run the stages again (make demo)")
    summary, answers = measure(output / "data", folders, stages, args.seed)
    names = {"plot": "training.png", "samples": "samples.md", "summary": "summary.json", "report": "report.md"}
    files = {name: output / file for name, file in names.items()}
    plot(files["plot"], stages["remax"], summary)
    files["samples"].write_text(samples(answers), encoding="utf-8")
    summary["seconds"] = {stage.folder.name: round(stage.seconds, 1) for stage in stages.values()}
    summary["seconds"]["report"] = round(time.perf_counter() - started, 1)
    summary["verdict"] = dict(zip(("passed", "text"), verdict(summary), strict=True))
    summary["paths"] = {name: str(path) for name, path in (folders | files).items()}
    summary["run"] = describe_run(args, "demo")
    summary["seeds"] = {"report": args.seed} | {name: stage.arguments["seed"] for name, stage in stages.items()}
    files["summary"].write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    text = table(summary)
    files["report"].write_text(f"# What the demo has learnt\n\n```\n{text.strip()}\n```\n\n{PLOT}", encoding="utf-8")
    print(text)
    if args.check and not summary["verdict"]["passed"]:
        sys.exit(1)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m remax.demo.report", description="Reports what the demo has learnt.")
    parser.add_argument("--output_dir", default="output/demo", help="the demo's folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled answers (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit with status 1 when the goals are not reached")
    return parser.parse_args(argv)


def read_stage(folder: Path) -> Run:
    """A stage's run; UserError where it has not come to its end."""
    for name in ("run.json", "metrics.jsonl", "results.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"--output_dir {folder.parent}: {folder} has no {name}; expected the three stages of the demo, run to "
                "their end (make demo)"
            )
    return read_run(folder)


def measure(
    data: Path, folders: dict[str, Path], stages: dict[str, Run], seed: int
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The summary's figures, and each policy's sampled answers: rows {prompt, answer, reward, true_reward, length}.

    Every policy gives each held-out prompt one answer at temperature 1, as in training, and a greedy one.
    """
    config = EngineConfig()
    tokenizers = {name: load_tokenizer(str(folders[name])) for name in (*POLICIES, "reward")}
    longest = {name: stage.arguments["max_seq_len"] for name, stage in stages.items() if name != "remax"}
    longest_prompt = stages["remax"].arguments["max_prompt_seq_len"]
    rows = load_data_set(str(data), cache_dir=None, announce=False)[1]

    def loader(stage: int, tokenizer: PreTrainedTokenizerBase, max_len: int) -> DataLoader:
        encoded = encode_rows(rows, Encoder(KINDS[stage], tokenizer, max_len), cache_dir=None, names=Names("eval"))
        collate = partial(COLLATORS[KINDS[stage]], pad_id=tokenizer.pad_token_id)
        return make_loader(encoded, eval_order(len(encoded)), BATCH_SIZE, collate)

    def actor(name: str) -> Actor:
        tokenizer = tokenizers[name]
        policy = load_policy(str(folders[name]), "--output_dir", dtype=config.torch_dtype, tokenizer=tokenizer)
        longest_answer = stages["remax"].arguments["max_answer_seq_len"]
        generation = GenerationSettings(longest_answer, tokenizer.pad_token_id)
        return Actor(FrozenEngine(policy, config), generation=generation)

    reward_model = load_reward_model(
        str(folders["reward"]), "--output_dir", dtype=config.torch_dtype, tokenizer=tokenizers["reward"]
    )
    reward = Reward(FrozenEngine(reward_model, config))
    actors = {name: actor(name) for name in POLICIES}
    reference = Reference(actors["SFT"].engine)
    figures: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    for name, policy in actors.items():
        prompts = loader(2, tokenizers[name], longest_prompt)
        demonstrations = loader(0, tokenizers[name], longest["sft"])
        sampled = evaluate_policy(
            policy, reference, reward, prompts, tokenizers[name], answers=demonstrations, seed=seed
        )
        answers[name] = [
            row | {"true_reward": corpus.true_reward(row["prompt"], row["answer"])} for row in sampled.answers
        ]
        asked = [row["prompt"] for row in answers[name]]
        best_guesses = answer_prompts(policy, tokenizers[name], asked, batch_size=BATCH_SIZE, samples=0)
        figures[name] = {
            "true_reward": asdict(corpus.estimate([row["true_reward"] for row in answers[name]], asked)),
            "true_reward_greedy": asdict(
                corpus.mean_true_reward(asked, [found["greedy"][0].text for found in best_guesses])
            ),
            "learned_reward": asdict(corpus.estimate([row["reward"] for row in answers[name]], asked)),
        } | {key: sampled.figures[key] for key in ("perplexity", "length", "ended", "kl", "entropy")}
    pairs = loader(1, tokenizers["reward"], longest["reward"])
    ranking = ranking_accuracy(reward, pairs)
    with torch.no_grad():
        right = [won for batch in pairs for won in wins(torch.sub(*pair_scores(reward, to_device(batch)))).tolist()]
    accuracy = corpus.estimate(right, rows["prompt"])
    best = corpus.estimate([corpus.best_reachable(row["prompt"]) for row in answers["SFT"]]).mean
    before, after = (Estimate(**figures[name]["true_reward"]) for name in ("SFT", "ReMax"))
    summary = {
        "answers": len(answers["SFT"]),
        "prompts": len({row["prompt"] for row in answers["SFT"]}),
        "policies": figures,
        "best_reachable": best,
        "standard_errors_above_sft": corpus.standard_errors_above(after, before),
        "gap_closed": corpus.gap_closed(after, before, best),
        "reward_model": {
            "accuracy": ranking["accuracy"],
            "accuracy_standard_error": accuracy.standard_error,
            "accuracy_ceiling": corpus.accuracy_ceiling(rows),  # preferences are drawn, the better answer loses some
            "longer_wins": ranking["longer_wins"],
            "margin": ranking["margin"],
            "pairs": accuracy.count,
        },
    }
    return summary, answers


def verdict(summary: dict[str, Any]) -> tuple[bool, str]:
    """Whether both goals are reached, and the sentence that says so."""
    errors, gap = summary["standard_errors_above_sft"], summary["gap_closed"]
    passed = errors >= ENOUGH_STANDARD_ERRORS and gap >= ENOUGH_OF_THE_GAP
    text = (
        f"ReMax's true reward is {errors:.1f} standard errors above SFT's (wanted: {ENOUGH_STANDARD_ERRORS:.0f}), "
        f"and has gone {gap:.0%} of the way from there to the best reachable (wanted: {ENOUGH_OF_THE_GAP:.0%})"
    )
    return passed, ("GOALS REACHED: " if passed else "GOALS NOT REACHED: ") + text


def shown(form: str, value: Any) -> str:
    """The value in this form; rounding that falls below 0 is no "-0.0"."""
    text = form.format(value)
    return text if text.strip("-0.%") else text.removeprefix("-")


def table(summary: dict[str, Any]) -> str:
    """The summary, aligned."""
    with_error = "{0[mean]:.2f} ± {0[standard_error]:.2f}"
    figures = [
        ("true reward", "true_reward", with_error),
        ("true reward, greedy answers", "true_reward_greedy", with_error),
        ("learned reward", "learned_reward", with_error),
        ("perplexity of the corpus' answers", "perplexity", "{:.2f}"),
        ("answer length, tokens", "length", "{:.1f}"),
        ("answers that end", "ended", "{:.0%}"),
        ("entropy, nats per token", "entropy", "{:.2f}"),
        ("KL to SFT, nats per answer", "kl", "{:.1f}"),
    ]
    rows = [("", list(POLICIES))]
    rows += [
        (title, [shown(form, summary["policies"][name][key]) for name in POLICIES]) for title, key, form in figures
    ]
    width = max(len(title) for title, _ in rows)
    ranking, seconds = summary["reward_model"], summary["seconds"]
    rule = "-" * (width + 3 * 17)
    return "\n".join(
        [
            "",
            f"{summary['answers']} answers to {summary['prompts']} held-out prompts, sampled at temperature 1; ± 1 "
            "standard error over prompts",
            rule,
            *(f"{title:<{width}}" + "".join(f"{cell:>17}" for cell in cells) for title, cells in rows),
            rule,
            f"best reachable true reward: {summary['best_reachable']:.2f}",
            f"reward model: {ranking['accuracy']:.1%} ± {ranking['accuracy_standard_error']:.1%} of {ranking['pairs']} "
            "held-out pairs ranked as preferred",
            f"    (by the true reward {ranking['accuracy_ceiling']:.1%}, since preferences are noisy; by length "
            f"{ranking['longer_wins']:.1%})",
            "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
            "",
            textwrap.fill(summary["verdict"]["text"], width=len(rule)),
            "",
            *(f"{name:<8} {path}" for name, path in summary["paths"].items()),
        ]
    )


def samples(answers: dict[str, list[dict[str, Any]]]) -> str:
    """Some prompts, spread over the data set, with the answers before and after training, as Markdown."""
    count = len(answers["SFT"])
    lines = [
        "# Answers before and after training",
        "",
        "Sampled at temperature 1 on held-out prompts. The true reward is the corpus' own measure; the learned one is "
        "the reward model's score, all that ReMax has seen.",
    ]
    for i in range(0, count, max(1, count // SAMPLES)):
        lines += ["", f"**{readable(answers['SFT'][i]['prompt'])}**", ""]
        lines += ["| model | answer | true reward | learned reward |", "|---|---|---:|---:|"]
        for name in POLICIES:
            row = answers[name][i]
            lines.append(f"| {name} | {readable(row['answer'])} | {row['true_reward']:.2f} | {row['reward']:.2f} |")
    return "\n".join(lines) + "\n"


def readable(text: str) -> str:
    """Text in one line of a Markdown table: an untrained model writes anything."""
    text = text.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:").strip()
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    for mark in "\\`*_[]<>|":
        shown = shown.replace(mark, "\\" + mark)
    return shown or "(empty)"


TRAIN, BASELINE, HELD_OUT, GOAL = "#8fb4d9", "#e3b77c", "#1f4e79", "#5a8f3c"


def plot(path: Path, stage: Run, summary: dict[str, Any]) -> None:
    """Learned reward, true reward, KL and length over ReMax's steps: training as lines, held-out prompts as points."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.8), dpi=130, layout="constrained")
    axes = dict(zip(("learned", "true", "kl", "length"), figure.subplots(2, 2, sharex=True).flat, strict=True))

    def lines(axis: Axes, name: str, label: str, color: str) -> None:
        steps, values = stage.series(f"train/{name}")
        axis.plot(steps, values, color=color, linewidth=0.8, alpha=0.45)
        axis.plot(steps, moving_average(values, max(1, len(values) // 15)), color=color, linewidth=2, label=label)

    def points(
        axis: Axes, steps: Sequence[int], values: Sequence[float], errors: Sequence[float] | None = None
    ) -> None:
        label = "held-out prompts" + (" (± 1 standard error)" if errors else "")
        style: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linewidth": 1.2, "capsize": 3, "zorder": 3}
        axis.errorbar(steps, values, errors, color=HELD_OUT, label=label, **style)

    def held_out(axis: Axes, name: str, errors: str | None = None) -> None:
        points(axis, *stage.series(f"eval/{name}"), stage.series(f"eval/{errors}")[1] if errors else None)

    lines(axes["learned"], "baseline", "greedy answers in training", BASELINE)
    lines(axes["learned"], "reward", "sampled answers in training", TRAIN)
    held_out(axes["learned"], "reward", "reward_standard_error")

    steps, rewards = true_rewards_over_steps(stage)
    if not steps:  # the stage ran without --save_answers: only its two ends are known
        steps = [0, stage.series("eval/reward")[0][-1]]
        rewards = [Estimate(**summary["policies"][name]["true_reward"]) for name in ("SFT", "ReMax")]
    points(axes["true"], steps, [r.mean for r in rewards], [r.standard_error for r in rewards])
    axes["true"].axhline(summary["best_reachable"], color=GOAL, linestyle="--", linewidth=1.5, label="best reachable")

    for name in ("kl", "length"):
        lines(axes[name], name, "sampled answers in training", TRAIN)
        held_out(axes[name], name)

    titles = {
        "learned": ("Learned reward", "reward model's score", ""),
        "true": ("True reward", "points", ""),
        "kl": ("KL to the fine-tuned model", "nats per answer", "optimizer step"),
        "length": ("Answer length", "tokens", "optimizer step"),
    }
    for name, axis in axes.items():
        title, ylabel, xlabel = titles[name]
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set(ylabel=ylabel, xlabel=xlabel)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.legend(frameon=False, fontsize=8, loc="best")
    figure.suptitle("ReMax on the built-in corpus", fontsize=13)
    figure.savefig(path)


def true_rewards_over_steps(stage: Run) -> tuple[list[int], list[Estimate]]:
    """Steps, and the true reward of the answers that the stage has kept of each evaluation (--save_answers)."""
    rows_of = {step: stage.answers("answers", step) for step in stage.answered("answers")}
    texts = [([row["prompt"] for row in rows], [row["answer"] for row in rows]) for rows in rows_of.values()]
    return list(rows_of), [corpus.mean_true_reward(*of_step) for of_step in texts]


if __name__ == "__main__":
    run_main(main)
