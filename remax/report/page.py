"""The page: what the runs' folders hold, cut to a size that a browser likes, in one file that asks no network.

Everything that comes from a run goes into one block of json, in which no `<` stands, and the script shows it as text.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from remax.report.runs import Record, Run, read_object
from remax.report.verdict import facts, judge, time_split

POINTS = 400  # of a curve, at most; more are drawn as means of neighbours
EVALUATIONS = 12  # whose answers are shown, at most
ROWS = 200  # answers of an evaluation that are shown without their tokens, at most
BUDGET = 400_000  # characters of answers, and again of what is told token by token, all runs together
NUMBERS = 5  # significant digits
HIDDEN = ("local_rank", "notices", "config")
T = TypeVar("T")


def page(runs: Sequence[Run], markdown: str) -> str:
    """The whole file.

    Args:
        markdown: Shown where no script runs.
    """
    title = "Report: " + ", ".join(run.name for run in runs)
    source = files("remax.report")
    parts = {
        "title": html.escape(title),
        "style": source.joinpath("page.css").read_text(encoding="utf-8"),
        "script": source.joinpath("page.js").read_text(encoding="utf-8"),
        "data": embedded(data_of(runs)),
        "markdown": html.escape(markdown),
    }
    template = source.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], template)


def embedded(data: Any) -> str:
    """As json that may stand in a script element: nothing in it can end the element, or begin a comment in it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text.encode("utf-8", "replace").decode()  # half of a surrogate pair, which json may hold and a file may not


def data_of(runs: Sequence[Run]) -> Record:
    """What the page shows."""
    prompts: dict[str, int] = {}
    rows = [row for i, run in enumerate(runs) for row in browsed(run, i, prompts, BUDGET // len(runs))]
    return {
        "runs": [described(run) for run in runs],
        "differences": differences(runs),
        "prompts": list(prompts),
        "rows": rows,
    }


def described(run: Run) -> Record:
    """A run without its answers."""
    verdict, (first, best, last) = judge(run), run.milestones
    return {
        "name": run.name,
        "stage": run.stage,
        "headline": run.headline[0],
        "verdict": {"level": verdict.level, "words": verdict.words, "sentences": verdict.sentences},
        "facts": facts(run),
        "first": first,
        "best": best,
        "last": last,
        "best_step": run.best_step,
        "train": curves(run, "train"),
        "eval": curves(run, "eval"),
        "memory": points(run, "run/peak_memory_gib"),
        "seconds": time_split(run),
        "remarks": [{name: row[name] for name in ("step", "kind", "text")} for row in run.remarks],
        "resumed": [start["resumed_after"] for start in starts(run) if start.get("resumed_after") is not None],
        "calibration": calibration(run),
        "settings": {name: shown(value) for name, value in run.arguments.items() if name not in HIDDEN},
        "versions": dict(run.description.get("versions") or {}),
    }


def calibration(run: Run) -> list[Record]:
    """Of the reward model: the run's own, or of step 3 the first one's that lies where it was trained."""
    names = run.arguments.get("reward_model_name_or_path") or []
    places = [place for name in map(str, names) for place in (name, name.rpartition(":")[0]) if place]  # PATH:WEIGHT
    notes = [Path(place, "calibration.json") for place in places]
    of_models = [list(read_object(note).get("bins", [])) for note in notes if note.is_file()]
    return next(filter(None, [run.calibration, *of_models]), [])


def starts(run: Run) -> list[Record]:
    """Each start of the run, the last one last."""
    return [*run.description.get("starts", []), run.description]


def shown(value: Any) -> str:
    """A setting as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Settings that are not the same in all runs: the name, then a value for each run."""
    tables = [run.arguments | {"commit": run.description.get("git_commit")} for run in runs]
    tables = [
        table | {f"version of {name}": value for name, value in (run.description.get("versions") or {}).items()}
        for run, table in zip(runs, tables, strict=True)
    ]
    names = list(dict.fromkeys(name for table in tables for name in table if name not in HIDDEN))
    found = [[name, *(shown(table.get(name)) for table in tables)] for name in names]
    return [row for row in found if len(set(row[1:])) > 1]


# --------------------------------------------------------------------------------------------------------------- curves


def curves(run: Run, group: str) -> Record:
    """The figures of one group: their steps, minutes since the start, and a value or null for each step."""
    records = [row for row in run.records if any(name.startswith(group + "/") for name in row)]
    names = dict.fromkeys(name for row in records for name in row if name.startswith(group + "/"))
    start = run.records[0]["time"] if run.records else 0.0
    parts = list(buckets(records, POINTS))
    return {
        "steps": [part[-1]["step"] for part in parts],
        "minutes": [round((part[-1]["time"] - start) / 60, 3) for part in parts],
        "series": {name.partition("/")[2]: [mean(row.get(name) for row in part) for part in parts] for name in names},
        "averaged": max(map(len, parts), default=1),
    }


def points(run: Run, name: str) -> Record:
    """One metric as a curve."""
    steps, values = run.series(name)
    return {"steps": steps, "values": [rounded(value) for value in values]}


def buckets(values: Sequence[T], most: int) -> Iterable[Sequence[T]]:
    """The values in order, in at most `most` parts of equal size."""
    size = math.ceil(len(values) / most) or 1
    return (values[start : start + size] for start in range(0, len(values), size))


def mean(values: Iterable[float | None]) -> float | None:
    """Of the values that are there."""
    known = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    return rounded(math.fsum(known) / len(known)) if known else None


def rounded(value: float) -> float:
    return float(f"{value:.{NUMBERS}g}")


# -------------------------------------------------------------------------------------------------------------- answers


def browsed(run: Run, index: int, prompts: dict[str, int], budget: int) -> list[Record]:
    """Answers of some evaluations, as far as they fit: the last one's first, then the first one's and the best one's.

    A row has the run's index, step, prompt (an index into `prompts`, which grows), answer, length and reward; of a
    close-up also what `remax.evaluation.close_ups` tells. Before and after are answers to one prompt of one place.
    """
    rows: list[Record] = []
    left = {"texts": budget, "tokens": budget}
    for step in chosen(sorted({*run.answered("close_ups"), *run.answered("answers")}), run.best_step):
        close = run.answers("close_ups", step)
        looked_at = {(row["prompt"], row["answer"]) for row in close}
        others = [row for row in run.answers("answers", step, ROWS) if (row["prompt"], row["answer"]) not in looked_at]
        seen: dict[str, int] = {}
        for row in [*close, *others]:
            prompt, answer = str(row["prompt"]), str(row["answer"])
            place = seen[prompt] = seen.get(prompt, -1) + 1
            size = len(answer) + len(str(row.get("greedy", ""))) + 80 + (0 if prompt in prompts else len(prompt))
            if size > left["texts"]:
                continue
            left["texts"] -= size
            of_prompt = {"prompt": prompts.setdefault(prompt, len(prompts)), "place": place}
            entry: Record = {"run": index, "step": step, **of_prompt, "answer": answer, **numbers(row)}
            if isinstance(row.get("greedy"), str):
                entry["greedy"] = row["greedy"]
            rows.append(entry | tokens(row, left))
    return sorted(rows, key=lambda row: row["step"])


def numbers(row: Mapping[str, Any]) -> Record:
    """Length, reward and its parts, the greedy answer's reward, and the KL of a close-up."""
    found = {
        name: rounded(value)
        for name, value in row.items()
        if isinstance(value, (int, float)) and math.isfinite(value) and name.startswith(("length", "reward", "greedy"))
    }
    return found | ({"kl": rounded(math.fsum(row["kl"]))} if finite(row.get("kl")) else {})


def tokens(row: Mapping[str, Any], left: dict[str, int]) -> Record:
    """A close-up's tokens with what is told of each, while there is room."""
    texts = row.get("tokens")
    told = {f"token_{name}": row[name] for name in ("kl", "advantage") if finite(row.get(name))}
    size = len(json.dumps([texts, told]))
    if not isinstance(texts, list) or not told or size > left["tokens"]:
        return {}
    left["tokens"] -= size
    return {"tokens": [str(text) for text in texts]} | told


def finite(values: Any) -> bool:
    """Whether these are numbers, one for each token."""
    known = isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)
    return known and all(map(math.isfinite, values))


def chosen(steps: Sequence[int], best: int) -> list[int]:
    """At most `EVALUATIONS` of them, in the order of their weight: the last, the first, the best, and some between."""
    if not steps:
        return []
    spread = [steps[round(i * (len(steps) - 1) / (EVALUATIONS - 1))] for i in range(EVALUATIONS)]
    order = [steps[-1], steps[0], *([best] if best in steps else []), *spread]
    return list(dict.fromkeys(order))[:EVALUATIONS]
