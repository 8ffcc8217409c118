"""Bounds on other people's code: time, memory, and nothing left behind."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from utils.bounds import BoundsExceeded, bounded

ROOT = Path(__file__).resolve().parents[2]


def test_what_takes_too_long_is_stopped():
    start = time.monotonic()
    with pytest.raises(BoundsExceeded, match="it takes longer than 0.1 s"), bounded(0.1, 1000):
        while True:
            pass
    assert time.monotonic() - start < 5


def test_what_takes_too_much_memory_is_stopped():
    held = []
    with pytest.raises(BoundsExceeded, match="it takes more than 50 MB"), bounded(60, 50):
        while True:
            held.append(bytearray(b"x" * 2**20))


def test_the_memory_of_whoever_started_this_process_does_not_count():
    child = "from utils.bounds import bounded\nwith bounded(60, 50):\n    held = bytearray(b'x' * 2**20) * 100"
    held = bytearray(b"x" * 2**20) * 300
    done = subprocess.run([sys.executable, "-c", child], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert len(held) and done.stderr.strip().endswith("BoundsExceeded: it takes more than 50 MB")


def test_what_keeps_the_bounds_goes_on_and_nothing_is_left_behind():
    former = signal.getsignal(signal.SIGALRM)
    for exceeded in (False, True):
        with pytest.raises(BoundsExceeded) if exceeded else bounded(60, 1000):
            if exceeded:
                with bounded(0, 1000):
                    time.sleep(0.2)
    assert signal.getsignal(signal.SIGALRM) is former and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_other_threads_have_no_bounds():
    done = []

    def run():
        with bounded(0, 0):
            done.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [True]
