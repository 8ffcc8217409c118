"""Watches the figures of every step for the known ways in which such trainings go wrong, and says what to do.

The sentinel is one of the trainer's watchers. It keeps short averages of reduced figures and compares them with limits
(`Thresholds`) and with the run's own first steps. Whatever it decides, it decides from numbers that are equal on all
ranks, so that all ranks warn, and stop, at the same step.

A warning is given once, and again when it still holds `repeat_after` steps later. Some findings are fatal: nothing good
can follow. The trainer logs the step, then calls `stop_if_fatal`, which raises `TrainingStopped` on every rank.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from remax.core.rollout import Rollout
from remax.training.alarms import COMPARED, Alarm, Thresholds, drift_alarms, fatal_alarms
from utils.metrics import warn
from utils.run import NotFinite, TrainingStopped


@dataclass
class Sentinel:
    """One of the trainer's watchers.

    The KL is counted from the first step's: there the policy is the reference, and what is left is truncation (top_p).

    Attributes:
        vocabulary: Number of words, whose logarithm is the largest entropy.
        warn: Takes each warning, on every rank.
        remark: Takes it too: its kind, the whole line, and the step.
        fatal: Why training must stop, None as long as it need not.
    """

    vocabulary: int
    thresholds: Thresholds = field(default_factory=Thresholds)
    warn: Callable[[str], None] = warn
    remark: Callable[[str, str, int], None] = lambda kind, text, step: None
    fatal: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.recent: dict[str, deque[float]] = {}
        self.start: dict[str, list[float]] = {name: [] for name in COMPARED}
        self.told: dict[str, int] = {}
        self.first_kl: float | None = None
        self.overflows = self.nonfinite = 0
        self.lost = False
        self.gradient_known = False  # some engines cannot tell their gradient's norm

    def __call__(self, step: int, rollout: Rollout, figures: dict[str, float]) -> dict[str, float]:
        """Judges a step.

        Returns:
            A further figure: `alarms`, the number of warnings that hold.
        """
        alarms = self.judge(figures)
        for alarm in alarms:
            self.raise_alarm(step, alarm)
        return {"alarms": float(len(alarms))}

    def judge(self, figures: dict[str, float]) -> list[Alarm]:
        """Takes one step's reduced figures in, and returns what is wrong now."""
        limits = self.thresholds
        kl = figures.get("kl", 0.0) / max(figures["length"], 1e-9)
        if self.first_kl is None and math.isfinite(kl):
            self.first_kl = kl
        excess = kl - (self.first_kl or 0.0)
        self._count_streaks(figures)
        followed = {name: figures[name] for name in (*COMPARED, "reward_length_correlation", "zero_advantages")}
        for name, value in {**followed, "kl_per_token": kl, "kl_excess": excess}.items():
            if math.isfinite(value):
                self.recent.setdefault(name, deque(maxlen=limits.window)).append(value)
                if name in self.start and len(self.start[name]) < limits.first:
                    self.start[name].append(value)
        recent = {
            name: sum(values) / len(values)
            for name, values in self.recent.items()
            if len(values) >= (limits.kl_after if name.startswith("kl") else limits.window)
        }
        start = {name: sum(values) / len(values) for name, values in self.start.items() if name in recent}
        return [
            *fatal_alarms(figures, self.overflows, self.nonfinite, excess, limits),
            *drift_alarms(recent, start, self.vocabulary, limits),
        ]

    def _count_streaks(self, figures: dict[str, float]) -> None:
        skipped, norm = bool(figures.get("skipped")), figures.get("grad_norm", math.nan)
        self.gradient_known = self.gradient_known or math.isfinite(norm)
        self.overflows = self.overflows + 1 if skipped else 0
        bad = self.gradient_known and not math.isfinite(norm) and not skipped
        bad = bad or not (math.isfinite(figures["loss"]) and math.isfinite(figures["reward"]))
        self.nonfinite = self.nonfinite + 1 if bad else 0

    def raise_alarm(self, step: int, alarm: Alarm) -> None:
        """Keeps a fatal alarm for `stop_if_fatal`, and gives a warning that was not given lately."""
        if alarm.fatal:
            self.lost = self.lost or alarm.kind == "not finite"
            self.fatal = self.fatal or alarm.message(step)
        elif alarm.kind not in self.told or step - self.told[alarm.kind] >= self.thresholds.repeat_after:
            self.told[alarm.kind] = step
            self.warn(f"warning, {alarm.message(step)}")
            self.remark(alarm.kind, alarm.message(step), step)

    def stop_if_fatal(self, further: str = "") -> None:
        """Ends a training that is lost; `further` is said last.

        Raises:
            TrainingStopped: There was a fatal alarm; on every rank.
        """
        if self.fatal is not None:
            raise (NotFinite if self.lost else TrainingStopped)(". ".join(filter(None, [self.fatal, further])))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge as this one would have: numbers, strings, lists and dicts only."""
        return {
            "recent": {name: list(values) for name, values in self.recent.items()},
            "start": self.start,
            "told": self.told,
            "first_kl": self.first_kl,
            "streaks": [self.overflows, self.nonfinite],
            "gradient_known": self.gradient_known,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.recent = {name: deque(values, self.thresholds.window) for name, values in state["recent"].items()}
        self.start = {name: list(values) for name, values in state["start"].items()}
        self.told, self.first_kl = dict(state["told"]), state["first_kl"]
        self.overflows, self.nonfinite = state["streaks"]
        self.gradient_known = state["gradient_known"]
        self.fatal, self.lost = None, False
