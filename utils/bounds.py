"""A bound on what a piece of somebody else's Python may take."""

import contextlib
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

LOOK_EVERY = 0.05  # seconds


class BoundsExceeded(Exception):
    """The message says which."""


@contextlib.contextmanager
def bounded(seconds: float, megabytes: float) -> Iterator[None]:
    """Raises BoundsExceeded inside, after so much time or so much more memory.

    It looks by an interval timer, as only a signal interrupts a loop; so it does nothing outside the main thread, and
    one long call of a C library is judged at its end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    until, most = time.monotonic() + seconds, peak_resident() + megabytes * 2**20

    def look(number: int, frame: FrameType | None) -> None:
        if time.monotonic() > until:
            raise BoundsExceeded(f"it takes longer than {seconds:g} s")
        if peak_resident() > most:
            raise BoundsExceeded(f"it takes more than {megabytes:g} MB")

    former = signal.signal(signal.SIGALRM, look)
    try:
        signal.setitimer(signal.ITIMER_REAL, LOOK_EVERY, LOOK_EVERY)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        look(0, None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def peak_resident() -> int:
    """The most bytes of memory that this process has held."""
    status = Path("/proc/self/status")  # getrusage would count the process that this one was forked from
    if status.is_file() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory() -> float:
    """Bytes of this machine's memory that a process may still take; infinity where the system does not say."""
    table = Path("/proc/meminfo")
    if table.is_file() and (free := re.search(r"MemAvailable:\s*(\d+) kB", table.read_text())):
        return int(free[1]) * 1024
    return float("inf")
