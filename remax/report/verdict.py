"""What a run comes to, in words and in a few figures: the head of the page and of its Markdown twin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from remax.report.runs import Record, Run

CLEAR = 3.0  # standard errors
WORDS = {"good": "Went well", "unclear": "Look closer", "bad": "Did not go well"}
SPLIT = {  # train/seconds_NAME -> what it is called
    "data": "waiting for data",
    "generation": "generation",
    "scoring": "scoring",
    "update": "update",
    "rest": "rest of the steps",
    "checkpoint": "checkpoints",
}


@dataclass(frozen=True)
class Verdict:
    """Whether it went well: `level` is good, unclear or bad; the sentences say why."""

    level: str
    sentences: list[str]

    @property
    def words(self) -> str:
        """The level, said to people."""
        return WORDS[self.level]


def judge(run: Run) -> Verdict:
    """From the first, the best and the last evaluation, and from the remarks."""
    told, level = [], "good"
    (name, sign), (first, best, last) = run.headline, run.milestones
    before, after = first.get(name), best.get(name)
    if before is not None and after is not None:
        course = f"{name.capitalize()} on held-out rows: {number(before)} → {number(after)}"
        course += f" at its best, step {run.best_step} of {run.last_step}" if run.best_step != run.last_step else ""
        errors = standard_errors(first, best) if name == "reward" else None
        if errors is not None:
            course += f", {errors:.1f} standard errors of the difference"
        told.append(course + ".")
        if sign * after <= sign * before:
            level = "bad"
            told.append("No evaluation was better than the start.")
        elif errors is not None and errors < CLEAR:
            level = "unclear"
            told.append(f"That is less than {CLEAR:.0f}: more held-out prompts, or more seeds, would tell.")
    else:
        level = "unclear"
        told.append("There are not two evaluations to compare.")
    told += side_effects(first, last)
    told += ranking(run, last)
    remarks = [row for row in run.remarks if row["kind"] not in ("stopped", "rollback")]
    if remarks:
        kinds = list(dict.fromkeys(str(row["kind"]) for row in remarks))
        told.append(f"The sentinel remarked on: {', '.join(kinds)} (first at step {remarks[0]['step']}).")
        level = "unclear" if level == "good" else level
    if run.state == "stopped":
        level = "bad"
        told.insert(0, f"Stopped at step {run.last_step}. {run.stopped}")
    elif run.state == "unfinished":
        level = "unclear" if level == "good" else level
        told.insert(0, f"Not at its end: the last record is of step {run.last_step}.")
    return Verdict(level, told)


def standard_errors(first: Record, best: Record) -> float | None:
    """By how many standard errors of the difference the reward has grown, as if the evaluations were independent."""
    spreads = [row.get("reward_standard_error") for row in (first, best)]
    if None in spreads or first is best:
        return None
    spread = math.hypot(*(float(value) for value in spreads if value is not None))
    return (best["reward"] - first["reward"]) / spread if spread else None


def side_effects(first: Record, last: Record) -> list[str]:
    """What a higher reward may have cost: length, KL, language, entropy."""
    found = []
    if first.get("length") and last.get("length") is not None and first is not last and "reward" in first:
        change = last["length"] / first["length"] - 1
        words = f"{abs(change):.0%} {'longer' if change > 0 else 'shorter'}" if abs(change) >= 0.05 else "as long"
        found.append(f"Answers are {words} at the end ({number(first['length'])} → {number(last['length'])} tokens).")
    if "reward" in first and last.get("kl") is not None:
        found.append(f"KL to the reference at the end: {number(last['kl'])} nats per answer.")
    if "reward" in first and first.get("perplexity") is not None and last.get("perplexity") is not None:
        course = f"{number(first['perplexity'])} → {number(last['perplexity'])}"
        found.append(f"Perplexity of the data's own answers: {course}.")
    return found


def ranking(run: Run, last: Record) -> list[str]:
    """What else there is to say of a reward model."""
    found = []
    if last.get("longer_wins") is not None:
        found.append(f"Choosing the longer answer would rank {last['longer_wins']:.1%} of the pairs right.")
    if run.calibration:
        found.append(f"Calibration error: {calibration_error(run.calibration):.1%} of certainty.")
    return found


def calibration_error(bins: list[Record]) -> float:
    """Mean distance between confidence and accuracy over the pairs (expected calibration error)."""
    pairs = sum(row["pairs"] for row in bins)
    return math.fsum(row["pairs"] * abs(row["confidence"] - row["accuracy"]) for row in bins) / pairs


def time_split(run: Run) -> dict[str, float]:
    """Seconds of the training by what they went into; `evaluation and start` is what no step accounts for."""
    found = {title: math.fsum(run.series(f"train/seconds_{name}")[1]) for name, title in SPLIT.items()}
    whole = (run.series("run/seconds")[1] or [0.0])[-1]
    found["evaluation and start"] = max(0.0, whole - math.fsum(found.values()))
    return {title: round(value, 2) for title, value in found.items() if value > 0.005}


def facts(run: Run) -> dict[str, str]:
    """What was run, where, and how long."""
    description = run.description
    memory, sizes = run.series("run/peak_memory_gib")[1], run.series("run/parameters")[1]
    found: dict[str, Any] = {
        "state": run.state,
        "steps": run.last_step,
        "time": clock((run.series("run/seconds")[1] or [run.seconds])[-1]),
        "peak memory": f"{max(memory):.2f} GiB" if memory else None,
        "parameters": f"{sizes[0]:,.0f}" if sizes else None,
        "device": f"{description.get('device')} × {description.get('world_size')}",
        "started": str(description.get("started")).replace("T", " "),
        "seed": description.get("seed"),
        "commit": description.get("git_commit"),
        "command": description.get("command"),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def number(value: float) -> str:
    """Three or four significant digits."""
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
