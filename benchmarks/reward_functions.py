"""What a reward function costs in its own process, above what it costs in this one.

    python benchmarks/reward_functions.py

A function that counts words, and GSM8K's with a column of reference answers, score the same batches in both ways, one
right after the other and in turns first and second, so that whatever else the machine does hits them alike.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from remax.rewards.functions import find_function
from remax.rewards.process import load_function

EXAMPLES = Path(__file__).resolve().parents[1] / "step3_rlhf_finetuning" / "example_rewards.py"
BATCHES = ((16, 200), (64, 200), (256, 200), (64, 2000), (256, 1000))  # rows, words of an answer
HEAD = "| function | rows | words | in this process | in its own | more for each batch |"


def texts(rows: int, words: int) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Prompts of 60 words, answers of so many, and reference answers."""
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join("".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(count))

    references = [f"{text(40)}\n#### {i}" for i in range(rows)]
    return [text(60) for _ in range(rows)], [f"{text(words)} {i}" for i in range(rows)], {"answer": references}


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def described(values: list[float]) -> str:
    """Median and range, in milliseconds."""
    low, middle, high = (1e3 * f(values) for f in (min, statistics.median, max))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of a reward function's own process")
    parser.add_argument("--repeats", type=int, default=200, help="calls of each function in each way, for each batch")
    args = parser.parse_args()
    print("Milliseconds a call: median (smallest to largest).", "", HEAD, "| --- |" + " ---: |" * 5, sep="\n")
    for name in ("words", "gsm8k"):
        here, apart = find_function(f"{EXAMPLES}:{name}"), load_function(f"{EXAMPLES}:{name}")
        for rows, words in BATCHES:
            prompts, answers, columns = texts(rows, words)
            ways = (
                lambda: here(prompts, answers, columns),  # noqa: B023 (called before the next round)
                lambda: apart(prompts, answers, columns, 60.0),  # noqa: B023
            )
            assert ways[0]() == ways[1]()
            times: list[list[float]] = [[], []]
            for i in range(args.repeats):
                for k in (i % 2, 1 - i % 2):
                    times[k].append(seconds(ways[k]))
            more = [b - a for a, b in zip(*times, strict=True)]
            print(f"| `{name}` | {rows} | {words} |", " | ".join(map(described, (*times, more))), "|", flush=True)


if __name__ == "__main__":
    main()
