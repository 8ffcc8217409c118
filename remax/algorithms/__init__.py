"""The algorithms of step 3, by the name that --algo takes; torch only."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from remax.algorithms.base import Algorithm
from remax.algorithms.grpo import GRPO
from remax.algorithms.inpo import INPO
from remax.algorithms.kl import KLPenalty, build_penalty
from remax.algorithms.ppo import PPO
from remax.algorithms.raft import RAFT, SuperHF
from remax.algorithms.reinforce import Reinforce
from remax.algorithms.remax import ReMax
from remax.algorithms.rloo import RLOO

ALGORITHMS: dict[str, type[Algorithm]] = {
    "remax": ReMax,
    "reinforce": Reinforce,
    "rloo": RLOO,
    "grpo": GRPO,
    "ppo": PPO,
    "raft": RAFT,
    "superhf": SuperHF,
    "inpo": INPO,
}

__all__ = ["ALGORITHMS", "Algorithm", "KLPenalty", "build_algorithm", "build_penalty"]


def readers(setting: str) -> list[str]:
    """The algorithms that know a setting."""
    return [name for name, kind in ALGORITHMS.items() if setting in {f.name for f in fields(kind) if f.init}]


def build_algorithm(name: str, **settings: Any) -> Algorithm:
    """The algorithm called `name`; a setting that is None keeps the algorithm's own default.

    Raises:
        ValueError: The name is unknown, or a setting is out of range or one that this algorithm does not read.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm {name!r} is unknown; choose from {', '.join(ALGORITHMS)}")
    given = {setting: value for setting, value in settings.items() if value is not None}
    kind = ALGORITHMS[name]
    for setting, value in list(given.items()):
        if name in readers(setting):
            continue
        if getattr(kind, setting, None) != value:
            known_by = ", ".join(readers(setting)) or "no algorithm"
            raise ValueError(f"{setting}={value} does nothing in {name}; it belongs to {known_by}")
        del given[setting]  # such as epochs=1, which is what it does anyway
    return kind(**given)
