"""Rewards that are plain Python functions of texts.

A function is found by its name and called in the manner that its parameters ask for, and errors say which sample it
failed on.

    def short(prompt, answer):               # one sample at a time -> a number
    def short(prompts, answers):             # lists -> as many numbers: a list, an array, a tensor
    async def short(prompt, answer):         # a remote scorer: all samples of a batch are awaited together

Nothing heavy is imported here: a wrong name is refused before torch is.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from utils.run import UserError

LARGEST = 3.4e38  # of float32, in which rewards are kept
GRACE = 1.0  # seconds after which an async function that blocks its loop is interrupted from outside
MANNERS = "(prompt, answer) for one sample, or (prompts, answers) for lists of them, passed by name"


class SampleError(Exception):
    """What went wrong with sample `index` of a batch; None: with the batch as a whole."""

    def __init__(self, index: int | None, what: str):
        super().__init__(what)
        self.index = index


class TimeOut(BaseException):
    """Raised inside a function that takes too long; no Exception, so that its own `except Exception` lets it pass."""


@dataclass(frozen=True)
class RewardFunction:
    """A function with what its signature says of it."""

    entry: str  # `module:function` as it was given, for errors
    function: Callable[..., Any]
    batched: bool  # takes lists
    asynchronous: bool

    def __call__(self, prompts: Sequence[str], answers: Sequence[str], timeout: float = 0.0) -> list[float]:
        """One finite number for each of B samples.

        Args:
            timeout: Seconds for a sample, or for a batched call; 0: none.

        Raises:
            SampleError: The function raised, took too long, or gave something else than finite numbers.
        """
        prompts, answers, count = list(prompts), list(answers), len(prompts)  # lists of its own, that it may change
        with _staying_here():
            values = self._values(prompts, answers, timeout)
        if self.batched:
            values = _as_list(values, count)
        return [_number(value, i) for i, value in enumerate(values)]

    def _values(self, prompts: list[str], answers: list[str], timeout: float) -> Any:
        """What the function returns: of a batched one that, of another a list."""
        if self.asynchronous:
            # One that calls something blocking stops the loop and its clock with it.
            with _locating(None), _time_limit(timeout + GRACE if timeout else 0.0, timeout):
                return _event_loop().run_until_complete(self._awaited(prompts, answers, timeout))
        if self.batched:
            with _locating(None), _time_limit(timeout):
                return self.function(prompts=prompts, answers=answers)
        values = []
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            with _locating(i), _time_limit(timeout):
                values.append(self.function(prompt=prompt, answer=answer))
        return values

    async def _awaited(self, prompts: list[str], answers: list[str], timeout: float) -> Any:
        if self.batched:
            return await _in_time(self.function(prompts=prompts, answers=answers), None, timeout)
        tasks = [
            asyncio.ensure_future(_in_time(self.function(prompt=prompt, answer=answer), i, timeout))
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _in_time(value: Awaitable[Any], index: int | None, timeout: float) -> Any:
    async def contained() -> Any:
        try:
            return await value
        except SystemExit as error:  # out of a task it would stop the loop
            raise SampleError(index, _in_words(error)) from error

    with _locating(index):
        try:
            return await asyncio.wait_for(contained(), timeout or None)
        except asyncio.TimeoutError:
            raise TimeOut(timeout) from None


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the whole run: clients of remote scorers keep their connections on the loop they first ran in."""
    return asyncio.new_event_loop()


@contextlib.contextmanager
def _locating(index: int | None) -> Iterator[None]:
    """What is raised inside becomes a SampleError of sample `index`."""
    try:
        yield
    except SampleError:
        raise
    except TimeOut as error:
        raise SampleError(index, f"no answer within {error.args[0]:g} s (--reward_fn_timeout)") from None
    # sys.exit would end this rank alone, without a word and with status 0.
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        raise SampleError(index, _in_words(error)) from error


@contextlib.contextmanager
def _staying_here() -> Iterator[None]:
    """The working folder afterwards is that of before: --output_dir may be relative to it."""
    here = os.open(".", os.O_RDONLY)
    try:
        yield
    finally:
        os.fchdir(here)
        os.close(here)


@contextlib.contextmanager
def _time_limit(seconds: float, told: float | None = None) -> Iterator[None]:
    """Raises TimeOut inside after this many seconds; 0: never.

    It uses the interval timer's signal, since only that interrupts a regular expression that runs away, and since the
    function stays in the main thread. It needs Unix; code that never comes back from a C library is not interrupted.

    The error names `told`, where that is another limit.
    """
    if not seconds:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeOut(told or seconds)

    handler = signal.signal(signal.SIGALRM, stop)
    # Once more every second, in case the function swallows the first.
    before = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # again, should the alarm have come between the function's return and that line
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


def _as_list(values: Any, count: int) -> list[Any]:
    """The numbers of a batched call, of which there must be `count`."""
    expected = f"expected {count} numbers, one for each answer"
    values = values.tolist() if hasattr(values, "tolist") else values  # arrays and tensors, of any device
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes, Mapping, Set)):
        raise SampleError(None, f"returned {_shown(values)}; {expected}")
    if len(values) != count:
        raise SampleError(None, f"returned {len(values)} values; {expected}")
    return list(values)


def _number(value: Any, index: int) -> float:
    try:
        if isinstance(value, (str, bytes)):  # float("3") would do, and hide a parser that found nothing
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # tensors of many numbers raise the last
        raise SampleError(index, f"returned {_shown(value)}; expected a number") from None
    if not math.isfinite(number) or abs(number) > LARGEST:
        raise SampleError(index, f"returned {_shown(value)}; expected a finite number")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return text if value is None else f"{text} ({type(value).__name__})"


def _in_words(error: BaseException) -> str:
    """The error with the innermost line of the function's own file.

    Such as `ZeroDivisionError: division by zero (rules.py, line 4: return 1 / len(answer))`.
    """
    ours = (__file__, str(Path(asyncio.__file__).parent), "<frozen importlib")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    where = ""
    if frames:
        line = [f for f in frames if f.filename == frames[0].filename][-1]
        where = f" ({Path(line.filename).name}, line {line.lineno}: {line.line})"
    message = str(error).strip().splitlines()
    return type(error).__name__ + (f": {message[0]}" if message else "") + where


@functools.cache
def load_function(entry: str, flag: str = "--reward_fn") -> RewardFunction:
    """The function of an entry `module:function` or `path/to/file.py:function`.

    A module is one that Python finds, or else a file below the working folder. Each is imported once.

    Raises:
        UserError: There is no such module or function, the module cannot be imported, or the function has other
            parameters.
    """
    source, _, name = entry.rpartition(":")
    is_file = source.endswith(".py")
    if not name.isidentifier() or not (is_file or all(part.isidentifier() for part in source.split("."))):
        raise UserError(f"{flag} {entry}: expected module:function or file.py:function, followed by :weight if wanted")
    module = _import(source, is_file, f"{flag} {entry}")
    if not hasattr(module, name):
        own = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        near = difflib.get_close_matches(name, own, n=3) or sorted(own)[:10]
        raise UserError(f"{flag} {entry}: {source} has no {name}; it has {', '.join(near) or 'no function at all'}")
    function = getattr(module, name)
    if not callable(function):
        raise UserError(f"{flag} {entry}: {name} is a {type(function).__name__}; expected a function")
    return reward_function(function, entry, flag)


def reward_function(function: Callable[..., Any], entry: str = "", flag: str = "--reward_fn") -> RewardFunction:
    """A function that is at hand, called in the manner that its parameters ask for.

    Args:
        entry: its name in errors; by default its own.

    Raises:
        UserError: it has other parameters.
    """
    entry = entry or getattr(function, "__name__", repr(function))
    asynchronous = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
    return RewardFunction(entry, function, _batched(function, f"{flag} {entry}"), asynchronous)


def _import(source: str, is_file: bool, given: str) -> ModuleType:
    # A module may lie below the working folder, which a launcher leaves out.
    path = Path(source).expanduser() if is_file else Path(*source.split(".")).with_suffix(".py")
    if is_file and not path.is_file():
        raise UserError(f"{given}: no such file {path} (looked from {Path.cwd()})")
    by_name = not is_file and (_is_importable(source) or not path.is_file())
    try:
        with _staying_here():
            return importlib.import_module(source) if by_name else _import_file(path.resolve())
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) and by_name else None
        if missing and f"{source}.".startswith(f"{missing}."):
            raise UserError(
                f"{given}: no module {source}; install it, put its folder on PYTHONPATH, or give the path of a file "
                f"(looked from {Path.cwd()})"
            ) from None
        raise UserError(f"{given}: {source} cannot be imported: {_in_words(error)}") from error


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):  # a parent that is missing, or is no package
        return False


def _import_file(path: Path) -> ModuleType:
    """The file as a module of its own, under a name that hides no other."""
    name = f"reward_file:{path}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # as for every file that ends with .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _batched(function: Callable[..., Any], given: str) -> bool:
    """Whether the parameters are (prompts, answers) and not (prompt, answer); further ones must have defaults."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise UserError(f"{given}: its parameters cannot be read; expected {MANNERS}") from None
    parameters = signature.parameters.values()
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    for wanted, batched in (({"prompt", "answer"}, False), ({"prompts", "answers"}, True)):
        if needed <= wanted <= by_name:
            return batched
    raise UserError(f"{given}: takes {signature}; expected {MANNERS}")
