"""Seconds of the named parts of a step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measuring import NOW
from torch.profiler import record_function

MARK = "part of a step: "  # before its name, for a profiler
PARTS = ("generate", "score", "reference", "update")


class Clock:
    """Each moment counts for the innermost part that it lies in, and for `rest` where it lies in none."""

    def __init__(self, seconds: str) -> None:
        self.now = NOW[seconds]
        self.inside, self.since, self.seconds = ["rest"], 0.0, {}

    def turn(self) -> None:
        """Books the time since the last turn."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, part = self.now(), self.inside[-1]
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.since
        self.since = now

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.turn()
        self.inside.append(part)
        try:
            with record_function(MARK + part):
                yield
        finally:
            self.turn()
            self.inside.pop()

    def watch(self, owner: Any, name: str, part: str) -> None:
        """From here on, what happens in this method of an object counts for a part."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*args: Any, **options: Any) -> Any:
            with self(part):
                return method(*args, **options)

        setattr(owner, name, timed)

    @contextmanager
    def step(self) -> Iterator[dict[str, float]]:
        """Measures a step; its parts are in the dictionary when it is over."""
        found: dict[str, float] = {}
        self.turn()
        self.seconds = dict.fromkeys((*PARTS, "rest"), 0.0)
        begin = self.since
        yield found
        self.turn()
        found |= self.seconds | {"step": self.since - begin}
