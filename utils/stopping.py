"""How a rank ends before its time: at a signal, or with the launcher that started it.

A rank may wait in a collective for ever, where its main thread answers no signal and does not see that the launcher has
gone; a thread beside it does. `utils/launch.sh` says at the end what happened, from the files that the ranks keep in
RANK_FILES: `rank.N` with the process's id, as long as rank N lives; a line in `signal` for each rank that a signal
reached, the first one first; and `left`, where one has ended by itself.

Light to import, as it is among a program's first steps.
"""

import ctypes
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from utils.launchers import MARKS

GRACE = 10.0  # seconds that a rank has to leave in good order
LOOK = 0.5  # seconds between two looks at the launcher
PATIENCE = 5.0  # seconds in which a launcher ends the ranks that have lost one of theirs
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1
LOST = re.compile(r"connection (was )?(closed|reset)|broken pipe|remote process exited", re.IGNORECASE)

_first: signal.Signals | None = None  # what ends this rank
_held = threading.local()  # the signals that a thread had blocked before it forks


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it a rank of a launcher ends with that launcher, and at the first signal with status 128 + its number.

    A second SIGINT ends it at once. A process that no launcher has started, and a signal that is ignored by the wish of
    whoever started it (`nohup`), are left alone.
    """
    if not _of_launcher():
        yield
        return
    _die_with_parent()
    with suppress(OSError):
        _file(f"rank.{_rank()}").write_text(f"{os.getpid()}\n")
    _answer_signals()
    try:
        yield
    except Exception as error:
        if LOST.search(str(error)):  # another rank has ended, and its end is what is to be heard of
            time.sleep(PATIENCE)
        raise
    finally:
        _sign_off()


def _of_launcher() -> bool:
    """Whether deepspeed (CROSS_RANK is set by it alone), torchrun, srun or mpirun has started this process as a rank.

    What a rank starts finds the same variables, and is none.
    """
    if "RANK" not in os.environ or {"CROSS_RANK", "TORCHELASTIC_RUN_ID", *MARKS}.isdisjoint(os.environ):
        return False
    return os.environ.setdefault("RANK_PID", str(os.getpid())) == str(os.getpid())


def _rank() -> str:
    return os.environ["RANK"]


def _file(name: str) -> Path:
    return Path(os.environ.get("RANK_FILES") or os.devnull, name)  # without a folder it cannot be written


def _sign_off() -> None:
    with suppress(OSError):
        if _first is None:
            _file("left").touch()
        _file(f"rank.{_rank()}").unlink()


def _die_with_parent() -> None:
    """The kernel of Linux ends this process with the launcher, whatever it is busy with.

    srun and mpirun do so by themselves; the thread that started a rank may be a passing one there, and it is that
    thread's end that the kernel would go by.
    """
    if sys.platform == "linux" and not {"CROSS_RANK", "TORCHELASTIC_RUN_ID"}.isdisjoint(os.environ):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if "CROSS_RANK" in os.environ and "deepspeed" not in _line(os.getppid()):  # it has gone before
            raise SystemExit(128 + signal.SIGKILL)


def _answer_signals() -> None:
    chain = _chain()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_forget)
    threading.Thread(target=_watch, args=(reading, chain), name="stopping", daemon=True).start()


def _hold() -> None:
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def _forget() -> None:
    """A forked child, such as a DataLoader's, ends as any process; it would write into the pipe of this one."""
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) is _leave:
                signal.signal(number, signal.SIG_DFL)
    _let_go()


def _leave(number: int, frame: FrameType | None) -> None:
    """The main thread's answer, as soon as it runs, to the first signal: what is open is closed on the way out."""
    global _first
    if _first is None:
        _first = signal.Signals(number)
        raise SystemExit(128 + number)


def _watch(signals: int, chain: list[tuple[int, int]]) -> None:
    """The thread: notes the first signal, ends what does not leave, and makes a signal of the launcher's death."""
    global _first
    first, gone, end = None, False, float("inf")
    while time.monotonic() < end:
        came = os.read(signals, 64) if select.select([signals], [], [], LOOK)[0] else b""
        for number in came:
            if first is None and number in SIGNALS:
                first, end = signal.Signals(number), time.monotonic() + GRACE
                _note(first, gone)
            elif number == signal.SIGINT:
                end = 0.0
        if first is None and any(_parent(child) != parent for child, parent in chain):
            gone = True
            os.kill(os.getpid(), signal.SIGTERM)
    assert first is not None  # as nothing else sets the end
    _first = first
    _sign_off()
    os._exit(128 + first)


def _note(number: signal.Signals, gone: bool) -> None:
    """Tells the script, where one has started this; otherwise rank 0 says it."""
    if "RANK_FILES" in os.environ:
        with suppress(OSError):
            if not gone:  # that, the script sees by itself
                with _file("signal").open("a") as file:
                    file.write(f"{number.name} {_rank()}\n")
    elif _rank() == "0":
        why = f"stopped by {number.name}: sent by hand, or by the launcher when another rank has ended"
        with suppress(OSError):
            print(f"error: {'stopped, as the launcher has gone' if gone else why}", file=sys.stderr, flush=True)


def _chain() -> list[tuple[int, int]]:
    """Processes and their parents, from this one up to the script: none may change."""
    me, launcher = os.getpid(), os.getppid()
    chain = [(me, launcher)]
    if "CROSS_RANK" in os.environ:  # deepspeed is two processes, and most signals end the upper one alone
        upper = _parent(launcher)
        if "deepspeed" in _line(upper):
            chain.append((launcher, upper))
            script = _parent(upper)
            if os.environ.get("SCRIPT_PID") == str(script):
                chain.append((upper, script))
    return chain


def _parent(pid: int) -> int:
    """The process's parent; 0: it has gone."""
    if pid == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
