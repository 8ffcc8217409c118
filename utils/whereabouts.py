"""Where each rank is, so that one that has waited in vain can say where the others were last seen.

`at` costs a step nothing: a thread beside it tells the other ranks, every few seconds, by the store at which they met.
nccl aborts a process whose collective is late, before anything could be said; so rank 0 says it a little earlier.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from utils.stopping import LOST

if TYPE_CHECKING:
    from torch.distributed import TCPStore

EVERY = 10.0  # seconds between two words to the others
ANSWER = timedelta(seconds=5)  # in which the store answers, or is gone
EARLY = 0.9  # of the time-out, after which rank 0 says where the ranks are
LATE = re.compile(r"timed out waiting|monitoredbarrier|wait timeout", re.IGNORECASE)

_places: list[str] = []
_since = time.monotonic()
_board: "Board | None" = None


@contextmanager
def at(place: str) -> Iterator[None]:
    """This rank is there inside: in "step 12", and inside of that in "update"."""
    global _since
    _places.append(place)
    _since = time.monotonic()
    try:
        yield
    except Exception as error:
        if not hasattr(error, "place"):
            error.place = _here()  # type: ignore[attr-defined]
        raise
    finally:
        _places.pop()
        _since = time.monotonic()


def _here() -> tuple[str, float]:
    """The place in words, and for how many seconds."""
    place = f"in {' of '.join(reversed(_places))}" if _places else "outside of the steps"
    return place, time.monotonic() - _since


class Board:
    """What the ranks tell one another: each writes its own place down, and reads the others' when it needs them."""

    def __init__(self, store: "TCPStore", rank: int, ranks: int, timeout: timedelta) -> None:
        self.store, self.rank, self.ranks, self.timeout = store, rank, ranks, timeout.total_seconds()
        self.told_of, self.over = 0.0, threading.Event()
        threading.Thread(target=self._tell, name="whereabouts", daemon=True).start()

    def _tell(self) -> None:
        while True:
            place, seconds = _here()
            try:
                self.store.set(_key(self.rank), place)
            except RuntimeError:  # rank 0 has gone, and the store with it
                return
            if self.rank == 0 and seconds > EARLY * self.timeout and self.told_of != _since:
                self.told_of = _since
                line = f"note: rank 0 has been {place} for {_minutes(seconds)}; {self.others()}"
                print(line, file=sys.stderr, flush=True)
            if self.over.wait(EVERY):
                return

    def others(self) -> str:
        """Where they were last seen: "rank 1, 3 was last seen in update of step 12"."""
        found: dict[str, list[int]] = {}
        with suppress(RuntimeError):
            for rank in range(self.ranks):
                if rank != self.rank and self.store.check([_key(rank)]):
                    found.setdefault(self.store.get(_key(rank)).decode(), []).append(rank)
        seen = "; ".join(f"rank {_listed(ranks)} was last seen {there}" for there, ranks in found.items())
        return seen or "of the others nothing is known"


def open_board(rank: int, ranks: int, timeout: timedelta) -> None:
    """From here on this rank tells the others where it is; they wait for one another for as long as `timeout`."""
    from torch.distributed import TCPStore

    global _board
    with suppress(RuntimeError, KeyError):  # they have met elsewhere, and nothing will be known
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=ANSWER, wait_for_workers=False)
        _board = Board(store, rank, ranks, timeout)


def close_board() -> None:
    """The ranks part."""
    global _board
    if _board is not None:
        _board.over.set()
    _board = None


def waited_in_vain(error: RuntimeError) -> str | None:
    """One line for an error of a collective in which other ranks were late, or from which they have gone.

    None: it is something else.
    """
    text, (place, seconds) = str(error), getattr(error, "place", _here())
    if _board is None or not (LATE.search(text) or LOST.search(text)):
        return None
    waited = f"rank {_board.rank} waited {_minutes(seconds)} {place}"
    return f"{waited} for a rank that has {'ended' if LOST.search(text) else 'not come'}; {_board.others()}"


def _key(rank: int) -> str:
    return f"whereabouts/{rank}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _listed(ranks: list[int]) -> str:
    """The first ones, of many."""
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} others"
