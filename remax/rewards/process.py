"""Reward functions in a process of their own, one for each rank, which is started once and serves all of them.

Whatever a function does, the rank goes on or ends with one line: a time-out kills the process with all that it started,
its death is named with the sample that it worked on, where a second process dies of the same batch, and it does not
outlive the rank. It is started anew and not forked, so it holds no copy of what the rank has on the GPU.

Nothing heavy is imported here: a wrong name is refused before torch is.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

from remax.rewards.functions import OF_ANSWERS, Columns, SampleError, taken, too_late
from remax.rewards.sources import Source
from remax.rewards.worker import INDEX, LENGTH, LOST, PROGRESS, REQUEST, SINCE, WHOLE
from utils.run import UserError, rank_of_launcher

IMPORT_LIMIT = 600.0  # seconds that a function's module may take to import
LOOK = 0.1  # seconds after which a process that does not answer is looked at
GRACE = 1.0  # seconds after which an async function that blocks its loop is stopped from outside
LEAVE = 5.0  # seconds in which the process may end by itself
BLOCK = 2**16  # bytes read at once
# The rank's search path, before anything else is imported.
START = "import sys; sys.path[:] = sys.argv[3:]; from remax.rewards.worker import main; main(*map(int, sys.argv[1:3]))"
# A shell that waits for a word. Where the rank has gone without one, it kills the process and what that has started.
GUARD = """
trap "" HUP INT TERM
read -r word && exit
below() { for child in $(cat /proc/$1/task/*/children); do echo $child; below $child; done; }
kill -KILL $(below $0) -$0
"""
CLOSED = "it closed a descriptor that is not its own, by which its process is connected"
WRITTEN = "it wrote into a descriptor that is not its own, by which its process is connected"
OF_LAUNCHERS = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Died(SampleError):
    """The process has ended by itself, or was killed."""


@dataclass(frozen=True)
class WorkerFunction:
    """A function in the worker process; the fields are those of `RewardFunction`."""

    entry: str
    batched: bool
    asynchronous: bool
    takes: frozenset[str]
    needs: frozenset[str]

    def __call__(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        columns: Columns | None = None,
        timeout: float = 0.0,
    ) -> list[float]:
        """As a `RewardFunction`, of any of which `timeout` limits a sample, or the call where it takes lists.

        A process that dies may not be the function's fault: its batch is given to a new one, once.

        Raises:
            SampleError: As there, or its process died twice, or could not be reached any more.
        """
        try:
            return self._ask(prompts, answers, columns, timeout)
        except Died as error:
            died = str(error)
        try:
            rewards = self._ask(prompts, answers, columns, timeout)
        except Died as error:
            raise SampleError(error.index, f"{error}, twice in a row") from None
        on_rank = f" on rank {rank_of_launcher()}" if "RANK" in os.environ else ""
        print(f"warning{on_rank}: --reward_fn {self.entry}: {died}; started again", file=sys.stderr, flush=True)
        return rewards

    def _ask(
        self, prompts: Sequence[str], answers: Sequence[str], columns: Columns | None, timeout: float
    ) -> list[float]:
        _worker.find(self.entry)  # again, where the process is a new one
        further = {name: list(values) for name, values in taken(columns, self.takes, self.batched).items()}
        request = ("call", self.entry, list(prompts), list(answers), further, timeout)
        # One that calls something blocking stops its loop, and the clock with it.
        limit = timeout + GRACE if timeout and self.asynchronous else timeout
        try:
            reply = _worker.ask(request, limit, too_late(timeout))
        except SampleError as error:  # the process may have left any number where the index was
            known = error.index is not None and 0 <= error.index < len(prompts)
            raise type(error)(error.index if known else None, str(error)) from None
        if "values" in reply:
            return reply["values"]
        raise SampleError(reply.get("index"), reply.get("error") or reply["refused"])


@functools.cache
def load_function(entry: str, flag: str = "--reward_fn") -> WorkerFunction:
    """The function of an entry `module:function` or `path/to/file.py:function`, in this rank's worker process.

    A module is one that Python finds, or else a file below the working folder. Each is imported once.

    Raises:
        UserError: There is no such module or function, the module cannot be imported, or the function has other
            parameters.
    """
    found = _worker.find(entry, flag)
    names = {name: frozenset(found[name]) for name in ("takes", "needs")}
    return WorkerFunction(entry, found["batched"], found["asynchronous"], **names)


def asked_columns(functions: Iterable[Source]) -> frozenset[str]:
    """The columns of the data that some function of --reward_fn takes."""
    return frozenset().union(*(load_function(source.name).takes for source in functions)) - {*OF_ANSWERS}


class Worker:
    """The process, which is started when it is first asked."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()

    def find(self, entry: str, flag: str = "--reward_fn") -> dict[str, Any]:
        """What is known of a function, which is imported where this process has not done it yet."""
        with self._lock:
            if self.process is None or entry not in self._found:
                late = f"its module was not imported within {IMPORT_LIMIT:g} s"
                try:
                    reply = self.ask(("find", entry, flag, os.getcwd()), IMPORT_LIMIT, late)
                except SampleError as error:
                    raise UserError(f"{flag} {entry}: {error} (while its module was imported)") from None
                if problem := reply.get("refused") or reply.get("error"):
                    raise UserError(problem if problem.startswith(flag) else f"{flag} {entry}: {problem}")
                self._found[entry] = reply
            return self._found[entry]

    def ask(self, request: tuple[Any, ...], limit: float, late: str) -> dict[str, Any]:
        """The reply to a request.

        Args:
            limit: Seconds that the function may work on one sample, or on a whole batch; 0: no limit.
            late: What is said where it takes longer.

        Raises:
            SampleError: There is no reply; the process is ended.
        """
        with self._lock:
            if self.process is None:
                self._start()
            INDEX.pack_into(self._progress, 0, WHOLE)
            SINCE.pack_into(self._progress, INDEX.size, time.monotonic())
            reply = None
            try:
                self._send(pickle.dumps(request))
                reply = json.loads(self._receive(limit, late))
                return reply
            except ValueError:  # no JSON
                raise SampleError(self._at()[0], WRITTEN) from None
            finally:
                if reply is None:
                    self.stop(leave=0.0)

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._memory = _memory()
        self._progress = mmap.mmap(self._memory, PROGRESS)
        ends = (theirs.fileno(), self._memory)
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", START, *map(str, (*ends, *sys.path))],
            stdin=subprocess.DEVNULL,
            stdout=_descriptor(sys.stdout),
            stderr=_descriptor(sys.stderr),
            pass_fds=ends,
            env=worker_environment(),
            start_new_session=True,
        )
        theirs.close()
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, str(self.process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._found: dict[str, dict[str, Any]] = {}
        self._owner = os.getpid()
        self._channel.settimeout(LOOK)
        atexit.register(self.stop)

    def _send(self, request: bytes) -> None:
        written = 0
        while written < len(request):
            written += os.pwrite(self._memory, memoryview(request)[written:], REQUEST + written)
        try:
            self._channel.sendall(LENGTH.pack(len(request)))
        except OSError:
            self._explain()

    def _receive(self, limit: float, late: str) -> bytes:
        """The reply; ValueError where it is none."""
        received = bytearray()
        while not received.endswith(b"\n"):
            try:
                block = self._channel.recv(BLOCK)
            except TimeoutError:
                self._look(limit, late)
                continue
            except OSError:
                block = b""
            if not block:
                self._explain()
            received += block
            if not received.startswith(b"{"):
                raise ValueError
        return bytes(received)

    def _look(self, limit: float, late: str) -> None:
        """Raises SampleError where the process has gone, or the function has no time left."""
        process = self._running()
        if process.poll() is not None:
            self._explain()
        at = self._at()
        if limit and not time.monotonic() - at[1] <= limit:
            time.sleep(0.01)
            if self._at() == at:  # and is not just going on to the next sample
                raise SampleError(at[0], late)

    def _explain(self) -> NoReturn:
        """Says why the process cannot be reached any more."""
        process, (index, _) = self._running(), self._at()
        try:
            status = process.wait(1.0)
        except subprocess.TimeoutExpired:
            status = LOST
        if status == LOST:
            what = CLOSED
        elif status < 0:
            known = {*map(int, signal.Signals)}
            name = signal.Signals(-status).name if -status in known else f"signal {-status}"
            what = f"its process was killed by {name}"
            what += " (which is also what happens when memory runs out)" * (status == -signal.SIGKILL)
        else:
            what = f"its process ended with status {status} instead of answering"
        raise (SampleError if status == LOST else Died)(index, what)

    def _at(self) -> tuple[int | None, float]:
        """The sample that the function works on, None for the whole batch, and since when."""
        (index,), (since,) = INDEX.unpack_from(self._progress), SINCE.unpack_from(self._progress, INDEX.size)
        return None if index == WHOLE else index, since

    def _running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None  # as while it is asked
        return self.process

    def stop(self, leave: float = LEAVE) -> None:
        """Ends the process, and whatever it has started; it has `leave` seconds to do so by itself."""
        if self.process is None or os.getpid() != self._owner:
            return
        process, self.process = self.process, None
        atexit.unregister(self.stop)
        self._channel.close()
        if leave:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(leave)
        elsewhere = list(_descendants(process.pid))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid in elsewhere:  # those in sessions of their own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        self._guard.communicate(b"done\n")
        self._progress.close()
        os.close(self._memory)


def worker_environment() -> dict[str, str]:
    """What the process is told: RANK and WORLD_SIZE are the rank's, and `cuda` is the rank's GPU.

    What would make a library join the ranks' process group is left out.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    local, visible = os.environ.get("LOCAL_RANK", ""), os.environ.get("CUDA_VISIBLE_DEVICES")
    if local.isdigit():
        devices = [local] if visible is None else visible.split(",")
        own = 0 if visible is None else int(local)
        if own < len(devices) and devices[own]:
            environment["CUDA_VISIBLE_DEVICES"] = devices[own]
    return environment


def _memory() -> int:
    """Descriptor of memory that two processes can map."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("reward_fn")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.truncate(memory, PROGRESS)
    return memory


def _descriptor(stream: TextIO) -> int | None:
    """Where a stream goes, and a function's own print too; None: where the rank's descriptor of that number goes."""
    try:
        stream.flush()
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def _descendants(pid: int) -> Iterator[int]:
    """The children of a process, and theirs; on Linux."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, task.read_text().split()):
                yield child
                yield from _descendants(child)


_worker = Worker()
