"""How much the demo's figures vary: one table of several runs of `make demo`, each with a seed of its own.

    make demo-seeds SEEDS="0 1 2"

runs them one after the other and ends with

    python -m remax.demo.seeds output/demo_seed_0.json output/demo_seed_1.json output/demo_seed_2.json

which reads their summaries, prints a row for each seed and the range over all, and writes the same to
output/demo_seeds.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.run import UserError, run_main

Summary = Mapping[str, Any]


def of(name: str, figure: str, digits: int = 2) -> tuple[Callable[[Summary], float], str]:
    """A policy's figure, and how it is written."""

    def read(summary: Summary) -> float:
        found = summary["policies"][name][figure]
        return float(found["mean"] if isinstance(found, Mapping) else found)

    return read, f"{{:.{digits}f}}"


COLUMNS: dict[str, tuple[Callable[[Summary], float], str]] = {
    "SFT perplexity": of("SFT", "perplexity"),
    "reward model's accuracy": (lambda summary: summary["reward_model"]["accuracy"], "{:.1%}"),
    "its ceiling": (lambda summary: summary["reward_model"]["accuracy_ceiling"], "{:.1%}"),
    "true reward: base": of("base", "true_reward"),
    "SFT": of("SFT", "true_reward"),
    "ReMax": of("ReMax", "true_reward"),
    "ReMax, greedy": of("ReMax", "true_reward_greedy"),
    "standard errors above SFT": (lambda summary: summary["standard_errors_above_sft"], "{:.1f}"),
    "gap closed": (lambda summary: summary["gap_closed"], "{:.0%}"),
    "learned reward: SFT": of("SFT", "learned_reward"),
    "ReMax ": of("ReMax", "learned_reward"),
    "KL, nats per answer": of("ReMax", "kl", 1),
    "seconds": (lambda summary: sum(summary["seconds"].values()), "{:.0f}"),
}


def main() -> None:
    """Reads the summaries, prints the table and writes it beside the first of them."""
    parser = argparse.ArgumentParser(prog="python -m remax.demo.seeds", description="The demo's figures over seeds.")
    parser.add_argument("summaries", nargs="+", help="summary.json of each run")
    files = [Path(name) for name in parser.parse_args().summaries]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file; expected the summary.json of a run of make demo")
    text = table([json.loads(file.read_text(encoding="utf-8")) for file in files])
    output = files[0].with_name("demo_seeds.md")
    output.write_text(text, encoding="utf-8")
    print(f"{text}\nwritten to {output}")


def table(summaries: Sequence[Summary]) -> str:
    """Markdown: a row for each run, and the lowest and highest figure of all."""
    figures = {title: [read(summary) for summary in summaries] for title, (read, _) in COLUMNS.items()}
    forms = [form for _, form in COLUMNS.values()]
    rows = [["seed", *(title.strip() for title in figures)], ["---"] * (len(figures) + 1)]
    for i, summary in enumerate(summaries):
        values = [found[i] for found in figures.values()]
        rows.append([str(summary["seeds"]["report"]), *map(str.format, forms, values)])
    pairs = list(zip(forms, figures.values(), strict=True))
    ranges = [(form.format(min(found)), form.format(max(found))) for form, found in pairs]
    rows.append(["range", *(low if low == high else f"{low} to {high}" for low, high in ranges)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    run_main(main)
