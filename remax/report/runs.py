"""What a run has left in its folder, however it ended: read line by line, and a line torn by a kill is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from utils.run import UserError

Record = dict[str, Any]
HEADLINES = {"step1": ("perplexity", -1), "step2": ("accuracy", 1), "step3": ("reward", 1)}  # and which way is better


@dataclass(frozen=True)
class Run:
    """A run as its files tell of it.

    Attributes:
        folder: Its --output_dir.
        name: What it is called beside the others.
        description: run.json.
        records: Those of metrics.jsonl, in their order.
        results: results.json; empty where the run has not come to its end.
        remarks: Of the sentinel and the loop: {step, kind, text}.
        calibration: How sure a reward model is, and how often it is right: {pairs, confidence, accuracy}.
    """

    folder: Path
    name: str
    description: Record
    records: list[Record]
    results: Record = field(default_factory=dict)
    remarks: list[Record] = field(default_factory=list)
    calibration: list[Record] = field(default_factory=list)

    @property
    def arguments(self) -> Record:
        """Its flags."""
        return dict(self.description.get("arguments") or {})

    @property
    def stage(self) -> str:
        """As run.json names it: step1, step2, step3."""
        return str(self.description.get("stage", ""))

    @property
    def headline(self) -> tuple[str, int]:
        """The figure that people look at, and 1 where a higher one is better, else -1."""
        name, sign = HEADLINES.get(self.stage, ("loss", -1))
        return (str(self.arguments.get("best_by") or name), 1) if self.stage == "step3" else (name, sign)

    @property
    def last_step(self) -> int:
        """Of the last record; 0 where there is none."""
        return max((int(record["step"]) for record in self.records), default=0)

    @property
    def stopped(self) -> str | None:
        """Why the run was ended before its time by itself, or None."""
        return next((str(row["text"]) for row in reversed(self.remarks) if row["kind"] == "stopped"), None)

    @property
    def state(self) -> str:
        """`finished`, `stopped`, or `unfinished`: it goes on still, or it was killed."""
        return "finished" if self.results else "stopped" if self.stopped else "unfinished"

    @property
    def seconds(self) -> float:
        """From its start to its last record, of the last start where there were several."""
        started = datetime.fromisoformat(self.description["started"]).timestamp()
        return max(0.0, float(self.records[-1]["time"]) - started) if self.records else 0.0

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        found = [record for record in self.records if record.get(name) is not None]
        return [record["step"] for record in found], [record[name] for record in found]

    @cached_property
    def evaluations(self) -> dict[int, Record]:
        """The evaluations' figures by step, without `eval/`."""
        found: dict[int, Record] = {}
        for record in self.records:
            figures = {key.partition("/")[2]: value for key, value in record.items() if key.startswith("eval/")}
            if figures:
                found[record["step"]] = figures
        return found

    @cached_property
    def best_step(self) -> int:
        """Of the evaluation with the best headline, the first of several; 0 where there is none."""
        name, sign = self.headline
        known = {step: sign * row[name] for step, row in self.evaluations.items() if row.get(name) is not None}
        return max(known, key=lambda step: (known[step], -step)) if known else 0

    @property
    def milestones(self) -> tuple[Record, Record, Record]:
        """The figures of the first, the best and the last evaluation; empty where there is none."""
        steps = (min(self.evaluations, default=0), self.best_step, max(self.evaluations, default=0))
        first, best, last = (self.evaluations.get(step, {}) for step in steps)
        return first, best, last

    def answered(self, kind: str) -> dict[int, Path]:
        """The files of the evaluations' answers by step: `answers`, or `close_ups` with their tokens."""
        named = {path.stem.removeprefix("step_"): path for path in (self.folder / kind).glob("step_*.jsonl")}
        return dict(sorted((int(number), path) for number, path in named.items() if number.isdecimal()))

    def answers(self, kind: str, step: int, most: int | None = None) -> list[Record]:
        """The answers of one evaluation, the first `most` of them; none where none were kept."""
        path = self.answered(kind).get(step)
        rows = read_rows(path, most) if path else []
        return [row for row in rows if "prompt" in row and "answer" in row]


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """The run of a folder.

    Raises:
        UserError: There is none, or its files are no such files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the --output_dir of a run")
    for needed in ("run.json", "metrics.jsonl"):
        if not (folder / needed).is_file():
            inside = sorted(path.parent for path in folder.glob("*/run.json"))
            there = f"; there are runs in {', '.join(map(str, inside[:4]))}" if inside else ""
            raise UserError(f"{folder}: has no {needed}; expected the --output_dir of a run{there}")
    description = read_object(folder / "run.json")
    started = description.get("started")
    if not isinstance(started, str) or not isinstance(description.get("arguments"), dict):
        raise UserError(f"{folder / 'run.json'}: names no start and arguments; expected what a stage has written")
    records = [row for row in read_rows(folder / "metrics.jsonl") if "step" in row and "time" in row]
    others = {name: folder / f"{name}.json" for name in ("results", "calibration")}
    found = {name: read_object(path) if path.is_file() else {} for name, path in others.items()}
    remarks = read_rows(folder / "remarks.jsonl") if (folder / "remarks.jsonl").is_file() else []
    remarks = [row for row in remarks if {"step", "kind", "text"} <= row.keys()]
    bins = found["calibration"].get("bins", [])
    return Run(folder, name or folder.name, description, records, found["results"], remarks, bins)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs of several folders, each named by the end of its path that tells it from the others."""
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    pieces = 1
    while len({path.parts[-pieces:] for path in paths}) < len(paths):
        pieces += 1
    return [read_run(path, "/".join(path.parts[-pieces:])) for path in paths]


def read_object(path: Path) -> Record:
    """A file of one json object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a json object") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is a {type(found).__name__}; expected a json object")
    return found


def read_rows(path: Path, most: int | None = None) -> list[Record]:
    """The json objects of a file of one a line, of its first `most` lines; what is none (a torn line) is left out."""
    found = []
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in islice(file, most):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                found.append(row)
    return found


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Means over the last `window` values; the first ones over what there is."""
    return [math.fsum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
