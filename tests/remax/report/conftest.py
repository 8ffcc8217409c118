"""The folder of a run as a stage leaves it, made by hand: every figure can be worked out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

STARTED = "2026-03-01T10:00:00+00:00"
SECOND = 1772359200.0  # the same
EVIL = "</script><script>document.title = 'broken'</script><!-- é \u2028 <b>*|`"


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def close_up(step: int, i: int) -> dict:
    """Answer i of an evaluation: reward step / 10 + i, length 4 + i, KL 0.3 * step + i."""
    words = [f"step{step}", " says", f" {EVIL}" if i == 1 else " figs", *[" and"] * i, "</s>"]
    kl = [0.1 * step, 0.2 * step, *[1.0] * i, 0.0, 0.0]
    return {
        "prompt": f"\n\nHuman: question {i}?\n\nAssistant:",
        "answer": "".join(words[:-1]),
        "length": len(words),
        "reward": step / 10 + i,
        "reward/rules": -1.0,
        "greedy": "The greedy one.",
        "greedy_reward": 0.5,
        "tokens": words,
        "kl": kl[: len(words)],
        "advantage": [0.5 - x for x in kl][: len(words)],
    }


def evaluation(step: int) -> dict:
    """Reward 1 + step / 20 with standard error 0.3, at step 0, and 0.4 later; length 10 + step / 5."""
    error = 0.4 if step else 0.3
    figures = {"reward": 1 + step / 20, "reward_standard_error": error, "kl": step / 10, "length": 10 + step / 5}
    figures |= {"perplexity": 2.0 + step / 100, "ended": 1.0}
    return {f"eval/{name}": value for name, value in figures.items()} | {
        "run/seconds": 2.0 * step + 1,
        "run/peak_memory_gib": 1.5,
        **({} if step else {"run/parameters": 1000.0}),
    }


@pytest.fixture(scope="session")
def make_run():
    """make_run(folder) -> a finished run of step 3 with 30 steps, a second each, and evaluations every tenth.

    Its keywords go into its arguments; with `stage="step2"` it is a reward model's.
    """

    def make(folder: Path, stage: str = "step3", **arguments) -> Path:
        folder.mkdir(parents=True)
        given = {"best_by": "reward", "seed": 1234, "output_dir": str(folder), "data_path": ["a", "b"]} | arguments
        run = {"stage": stage, "command": f"python main.py --data_path '{EVIL}'", "arguments": given, "seed": 1234}
        run |= {"git_commit": "abc", "versions": {"torch": "2.9"}, "world_size": 2, "device": "cpu", "started": STARTED}
        (folder / "run.json").write_text(json.dumps(run))
        records = []
        for step in range(31):
            time = {"step": step, "time": SECOND + 10 + step}
            if step:
                train = {"reward": step / 20 + step % 2, "baseline": 1.0, "kl": 0.1 * step, "length": 10.0, "loss": 0.1}
                seconds = {"generation": 0.5, "scoring": 0.25, "update": 0.25}
                train |= {f"seconds_{name}": value for name, value in seconds.items()} | {"seconds_per_step": 1.0}
                records.append(time | {f"train/{name}": value for name, value in train.items()})
            if step % 10 == 0:
                records.append(time | (evaluation(step) if stage == "step3" else of_pairs(step)))
        (folder / "metrics.jsonl").write_text(lines(records))
        (folder / "results.json").write_text(json.dumps({"before": {"reward": 1.0}, "after": {"reward": 2.5}}))
        if stage == "step3":
            (folder / "close_ups").mkdir()
            for step in range(0, 31, 10):
                rows = [close_up(step, i) for i in range(3)]
                (folder / "close_ups" / f"step_{step:06d}.jsonl").write_text(lines(rows))
        else:
            bins = [(10, 0.6, 0.7), (30, 0.9, 0.8)]
            bins = [dict(zip(("pairs", "confidence", "accuracy"), row, strict=True)) for row in bins]
            (folder / "calibration.json").write_text(json.dumps({"bins": bins}))
        return folder

    return make


def of_pairs(step: int) -> dict:
    return {"eval/accuracy": 0.5 + step / 100, "eval/longer_wins": 0.6, "run/seconds": 2.0 * step + 1}
