"""Where rewards come from: the entries of --reward_model_name_or_path and --reward_fn, with weights and short names.

Nothing heavy is imported here: flags are checked with it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.data.names import split_weight


@dataclass(frozen=True)
class Source:
    """One part of the reward."""

    name: str  # folder or hub name of a model, `module:function` of a function
    weight: float  # below 0 for a penalty
    label: str  # a short name for logs, distinct among all parts


def reward_sources(models: Sequence[str], functions: Sequence[str]) -> tuple[list[Source], list[Source]]:
    """Models and functions from their entries, each `name` or `name:weight` (default 1).

    Raises:
        UserError: A weight is 0 or no number.
    """
    split = [split_weight(entry, "--reward_model_name_or_path", negative=True) for entry in models]
    split += [split_weight(entry, "--reward_fn", negative=True) for entry in functions]
    parts = [re.split(r"[/\\]", str(Path(name).expanduser().absolute()))[1:] for name, _ in split[: len(models)]]
    parts += [re.split(r"[/\\.:]", name.replace(".py:", ":")) for name, _ in split[len(models) :]]
    labels = distinct([_plain(part[-1]) for part in parts], [_plain("-".join(part[-2:])) for part in parts])
    sources = [
        Source(name, 1.0 if weight is None else weight, label)
        for (name, weight), label in zip(split, labels, strict=True)
    ]
    return sources[: len(models)], sources[len(models) :]


def distinct(short: Sequence[str], longer: Sequence[str]) -> list[str]:
    """The short names, where several are equal the longer ones, and where those are equal too with a number."""
    seen = Counter(short)
    taken: list[str] = []
    for name in (name if seen[name] == 1 else other for name, other in zip(short, longer, strict=True)):
        number, free = 1, name
        while free in taken:
            number += 1
            free = f"{name}-{number}"
        taken.append(free)
    return taken


def _plain(name: str) -> str:
    """Only signs that every reader of the metrics takes in a name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "reward"
