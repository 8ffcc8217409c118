"""Where the time of a step goes, operator by operator, as torch's profiler tells it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rlhf_ways.clock import MARK
from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")


def operators(side: Any, rows: list[list[int]]) -> dict[str, dict[str, float]]:
    """Takes a step: of each part the CPU seconds of its operators, by name, without those that they call."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        side.step(rows)
    events = found.events()
    parts = [(event.time_range, event.name.removeprefix(MARK)) for event in events if event.name.startswith(MARK)]
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        if event.name.startswith(MARK):
            continue
        begin, end = event.time_range.start, event.time_range.end
        around = [(of.elapsed_us(), part) for of, part in parts if of.start <= begin and end <= of.end]
        seconds[min(around, default=(0, "rest"))[1]][event.name] += event.self_cpu_time_total / 1e6
    return {part: dict(ops) for part, ops in seconds.items()}


def lines(way: str, seconds: dict[str, dict[str, float]], most: int = 6) -> list[list[str]]:
    """Rows of a table: a part, all its operators, its matrix products, and the largest of the others."""
    rows = []
    for part, ops in sorted(seconds.items(), key=lambda item: -sum(item[1].values())):
        others = sorted(((name, s) for name, s in ops.items() if name not in PRODUCTS), key=lambda item: -item[1])
        largest = ", ".join(f"{name.removeprefix('aten::')} {s:.2f}" for name, s in others[:most])
        products = sum(ops.get(name, 0.0) for name in PRODUCTS)
        rows.append([way, part, f"{sum(ops.values()):.2f}", f"{products:.2f}", largest])
    return rows
