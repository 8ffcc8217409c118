"""Ranks as processes that are forked from one which has imported everything: a start takes a second, not ten.

They are processes of their own, with a log, a session and a run's variables; SIGKILL takes from them all that they had
in memory, as it does from those of a launcher.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from record import environment

IMPORTED = ("deepspeed", "remax.cli.validate", "remax.stages.finetune", "remax.stages.rlhf", "torch.utils.tensorboard")


def import_everything() -> None:
    """What the programs of the stages import; this process must not compute anything with several threads."""
    torch.set_num_threads(1)
    for module in IMPORTED:
        importlib.import_module(module)


def fork(action: Callable[[], object], log: Path, variables: dict[str, str], folder: Path) -> int:
    """A process in `folder` that ends after `action`, with the status of a program; its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()  # so that a signal to the parent's terminal is not theirs
        os.environ.update(variables)
        os.chdir(folder)
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        action()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


class Ranks:
    """The ranks of one start of a program.

    Args:
        program: A stage's main.py.
        folder: Where they run.
        log: What they print; that of rank 1 and further ones lies beside it.
    """

    def __init__(self, program: Path, flags: list[str], ranks: int, folder: Path, log: Path):
        def action() -> None:
            sys.argv = [str(program), *flags]
            runpy.run_path(str(program), run_name="__main__")

        common = environment(folder, ranks)
        self.started, self.log = time.monotonic(), log
        self.status: dict[int, int] = {}
        self.pids = [
            fork(action, log if not rank else log.with_suffix(f".{rank}"), common | of_rank(rank), folder)
            for rank in range(ranks)
        ]

    def send(self, number: signal.Signals, ranks: int | None = None) -> None:
        """A signal to the first `ranks` of them; None: to all."""
        for pid in self.pids[:ranks]:
            if pid not in self.status:
                os.kill(pid, number)

    def over(self) -> bool:
        """Whether all have ended; one that fails takes the others along, as a launcher does."""
        for pid in self.pids:
            if pid not in self.status:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.status[pid] = os.waitstatus_to_exitcode(status)
        return len(self.status) == len(self.pids)

    def wait(self, timeout: float = 300.0) -> int:
        """The first status that is not 0, when all have ended; after the time-out they are killed."""
        end = time.monotonic() + timeout
        while not self.over():
            if time.monotonic() > end or any(self.status.values()):
                time.sleep(5 if time.monotonic() < end else 0)  # for its neighbours to end by themselves
                self.send(signal.SIGKILL)
            time.sleep(0.01)
        return next((status for status in self.status.values() if status), 0)

    def kill(self) -> None:
        """SIGKILL to all, at once."""
        self.send(signal.SIGKILL)
        while not self.over():
            time.sleep(0.001)


def of_rank(rank: int) -> dict[str, str]:
    """The variables of one rank."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}
