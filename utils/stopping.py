"""How a rank ends before its time: at a signal, with the launcher that started it, or when its hours are over.

A training's loop is `deferring`: it asks at the end of each step whether to stop, saves, and leaves. Anywhere else a
signal ends the rank at once.

A rank may wait in a collective for ever, where its main thread answers no signal and does not see that the launcher has
gone; a thread beside it does. `utils/launch.sh` says at the end what happened, from the files that the ranks keep in
RANK_FILES: `rank.N` with the process's id, as long as rank N lives; a line in `signal` for each rank that a signal
reached, the first one first; `patience`, the seconds that it may take to save; and `left`, where one has ended by
itself.

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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from utils.launchers import MARKS

GRACE = 10.0  # seconds that a rank has to leave in good order
SAVING = 60.0  # the least seconds that it has where it saves before
LOOK = 0.5  # seconds between two looks at the launcher
PATIENCE = 5.0  # seconds in which a launcher ends the ranks that have lost one of theirs
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
MAX_HOURS = "--max_hours"
UNFINISHED = 75  # exit status: the hours are over, and the rest is for another run; EX_TEMPFAIL of sysexits.h
PR_SET_PDEATHSIG = 1
LOST = re.compile(r"connection (was )?(closed|reset)|broken pipe|remote process exited", re.IGNORECASE)

_began = time.monotonic()  # the program; a clock that nobody sets
_reason: str | None = None  # what ends this rank: a signal's name, or --max_hours
_deferring = _leaving = _watched = False
_allowed = 0.0  # seconds that the loop may take until it has left
_hours = 0.0  # of --max_hours, 0: no limit
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
    global _watched
    _watched = True
    _at_parents_death(signal.SIGKILL)
    if _by_kernel() and "CROSS_RANK" in os.environ and "deepspeed" not in _line(os.getppid()):  # it has gone before
        raise SystemExit(128 + signal.SIGKILL)
    with suppress(OSError):
        _file(f"rank.{_rank()}").write_text(f"{os.getpid()}\n")
    _answer_signals()
    try:
        yield
    except Exception as error:
        if LOST.search(str(error)):  # another rank has ended, and its end is what is to be heard of
            if _reason is not None:
                raise SystemExit(_status(_reason)) from None
            time.sleep(PATIENCE)
        raise
    finally:
        _sign_off()


@contextmanager
def deferring(max_hours: float = 0.0) -> Iterator[None]:
    """Within it, a training's loop, the first signal ends nothing: the loop asks for it, saves and leaves.

    That must happen within 60 seconds, or as many as `allow` was told; then the rank is ended all the same. A second
    SIGINT ends it at once. Without a launcher there is no deadline.

    Args:
        max_hours: Since the start of the program, after which `asked_to_stop` says so; 0: no limit.

    Raises:
        SystemExit: At the end, where a signal came after the loop had asked for the last time.
    """
    global _deferring, _hours, _reason, _leaving
    before = {} if _watched else _answer(SIGNALS)
    _deferring, _hours = True, max_hours
    if signal.getsignal(signal.SIGTERM) is _leave:  # unless it is ignored
        _at_parents_death(signal.SIGTERM)
    try:
        yield
        _deferring = False  # from here on the next signal ends it, and the last one may have been overlooked
        if _reason is not None:
            leave(_reason)
    finally:
        _deferring, _hours = False, 0.0
        _at_parents_death(signal.SIGKILL)
        for number, answer in before.items():
            signal.signal(number, answer)
        if not _watched:  # whoever called the loop goes on as if nothing had been
            _reason, _leaving = None, False


def allow(seconds: float) -> None:
    """The loop may need so long, from a moment in a step on, until it has saved and left."""
    global _allowed
    _allowed = seconds


def asked_to_stop() -> str | None:
    """Why the loop is to save and leave: the name of the signal that this rank was sent, or --max_hours; None: go on.

    Other ranks may be told something else: they have to agree.
    """
    if _reason is None and _hours and time.monotonic() - _began + _allowed >= 3600 * _hours:
        return MAX_HOURS
    return _reason


def leave(reason: str) -> NoReturn:
    """Ends this rank for what it or another one was told by `asked_to_stop`.

    All ranks must have saved before, as the launcher ends the others soon after the first has left.

    Raises:
        SystemExit: With status 128 + the signal's number, or UNFINISHED for --max_hours.
    """
    global _reason, _leaving
    _reason, _leaving = reason, True
    if "RANK_FILES" not in os.environ and reason != MAX_HOURS and os.environ.get("RANK", "0") == "0":
        _say(f"error: stopped by {reason}")
    raise SystemExit(_status(reason))


def _status(reason: str) -> int:
    return UNFINISHED if reason == MAX_HOURS else 128 + signal.Signals[reason]


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
        if _reason is None:
            _file("left").touch()
        _file(f"rank.{_rank()}").unlink()


def _by_kernel() -> bool:
    """Whether a rank hears of its launcher's death from the kernel of Linux.

    srun and mpirun end their ranks by themselves; the thread that started a rank may be a passing one there, and it is
    that thread's end that the kernel would go by.
    """
    started = _watched and not {"CROSS_RANK", "TORCHELASTIC_RUN_ID"}.isdisjoint(os.environ)
    return started and sys.platform == "linux"


def _at_parents_death(number: signal.Signals) -> None:
    """Which signal that is; SIGKILL ends this process whatever it is busy with."""
    if _by_kernel():
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _answer_signals() -> None:
    chain = _chain()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _answer(SIGNALS)
    threading.Thread(target=_watch, args=(reading, chain), name="stopping", daemon=True).start()


def _answer(numbers: Iterable[signal.Signals]) -> dict[signal.Signals, Any]:
    """Takes the signals over, but for those that are ignored; what has answered them so far."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    _forked_children_answer_none()
    before = {number: answer for number in numbers if (answer := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, _leave)
    return before


@cache
def _forked_children_answer_none() -> None:
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_forget)


def _hold() -> None:
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def _forget() -> None:
    """A forked child, such as a DataLoader's, ends as any process; it would write into the pipe of this one."""
    with suppress(ValueError):
        if _watched:
            signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) is _leave:
                signal.signal(number, signal.SIG_DFL)
    _let_go()


def _leave(number: int, frame: FrameType | None) -> None:
    """The main thread's answer, as soon as it runs, to the first signal: what is open is closed on the way out."""
    global _reason
    if _reason is None:
        _reason = signal.Signals(number).name
        if not _deferring:
            raise SystemExit(128 + number)
        if not _watched:
            _say(f"{_reason}: saved after this step; from now on Ctrl-C ends it at once")
    elif number == signal.SIGINT and not _watched:
        raise KeyboardInterrupt


def _watch(signals: int, chain: list[tuple[int, int]]) -> None:
    """The thread: notes the first signal, ends what does not leave, and makes a signal of the launcher's death."""
    global _reason
    first, end = None, float("inf")
    while (now := time.monotonic()) < end:
        came = os.read(signals, 64) if select.select([signals], [], [], LOOK)[0] else b""
        gone = first is None and any(_parent(child) != parent for child, parent in chain)
        for number in came:
            if first is None and number in SIGNALS:
                first = signal.Signals(number)
                patience = max(SAVING, _allowed) if _deferring else GRACE
                end = now + LOOK + patience
                _note(first, gone, patience)
            elif number == signal.SIGINT:
                end = 0.0
        if gone and first is None:
            os.kill(os.getpid(), signal.SIGTERM)
        if first is not None and _one_has_ended():  # what the others wait for never comes
            end = min(end, now + LOOK + GRACE)
    assert first is not None  # as nothing else sets the end
    _reason = first.name
    _sign_off()
    os._exit(128 + first)


def _note(number: signal.Signals, gone: bool, patience: float) -> None:
    """Tells the script, where one has started this; otherwise rank 0 says it."""
    if _leaving:
        return
    saves = _deferring and _rank() == "0"
    if saves:
        _say(f"{number.name}: saved after this step, within {patience:.0f} s; from now on Ctrl-C ends it at once")
    if "RANK_FILES" in os.environ:
        with suppress(OSError):
            if _deferring:
                whole = _file(f"patience.{_rank()}")
                whole.write_text(f"{patience:.0f}\n")
                whole.replace(_file("patience"))
            if not gone:  # that, the script sees by itself
                with _file("signal").open("a") as file:
                    file.write(f"{number.name} {_rank()}\n")
    elif _rank() == "0" and not saves:
        why = f"stopped by {number.name}: sent by hand, or by the launcher when another rank has ended"
        _say(f"error: {'stopped, as the launcher has gone' if gone else why}")


def _say(line: str) -> None:
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())  # also from within a print, which a signal has interrupted


def _one_has_ended() -> bool:
    """Whether another rank of this machine has ended by itself, or was killed, as far as a script keeps their files."""
    if "RANK_FILES" not in os.environ:
        return False
    if _file("left").exists():
        return True
    for file in Path(os.environ["RANK_FILES"]).glob("rank.*"):
        try:
            os.kill(int(file.read_text()), 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError):  # just written, or just gone
            continue
    return False


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
