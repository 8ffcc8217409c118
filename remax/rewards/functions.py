"""Rewards that are plain Python functions of texts.

A function is found by its name and called in the manner that its parameters ask for, and errors say which sample it
failed on.

    def short(prompt, answer):               # one sample at a time -> a number
    def short(prompts, answers):             # lists -> as many numbers: a list, an array, a tensor
    async def short(prompt, answer):         # a remote scorer: all samples of a batch are awaited together
    def right(prompts, answers, solution):   # with the data's column `solution`

What is here calls a function in this process. A run has its own process for it, see `remax.rewards.process`.
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
import reprlib
import sys
import traceback
import types
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from utils.run import UserError

LARGEST = 3.4e38  # of float32, in which rewards are kept
LONGEST = 500  # characters of an exception's message that errors show
OWN_NAMES = {True: ("prompts", "answers"), False: ("prompt", "answer")}  # of the parameters, by `batched`
MANNERS = "(prompt, answer) for one sample, or (prompts, answers) for lists of them, passed by name"
OF_ANSWERS = ("ended", "tokens")  # what functions may take beside columns of the data
EVERY = "*"  # in `takes`: any column

Columns = Mapping[str, Sequence[Any]]  # name -> B values
Begin = Callable[[int | None, bool], None]  # told which sample the function works on, and whether its time starts


class SampleError(Exception):
    """What went wrong with sample `index` of a batch; None: with the batch as a whole."""

    def __init__(self, index: int | None, what: str):
        super().__init__(what)
        self.index = index


def too_late(seconds: float) -> str:
    """What is said of a function that has taken longer."""
    return f"no answer within {seconds:g} s (--reward_fn_timeout)"


@dataclass(frozen=True)
class RewardFunction:
    """A function with what its signature says of it."""

    entry: str  # `module:function` as it was given, for errors
    function: Callable[..., Any]
    batched: bool  # takes lists
    asynchronous: bool
    takes: frozenset[str] = frozenset()  # further parameters: columns of the data and OF_ANSWERS; EVERY for **kwargs
    needs: frozenset[str] = frozenset()  # those of them that have no default

    def __call__(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        columns: Columns | None = None,
        timeout: float = 0.0,
        begin: Begin = lambda index, anew: None,
    ) -> list[float]:
        """One finite number for each of B samples.

        Args:
            columns: What else is known of the samples; the function is given what it takes of it.
            timeout: Seconds for a sample of an asynchronous function, or for its batched call; 0: none. Another one is
                not interrupted: for that it needs a process of its own.

        Raises:
            SampleError: The function raised, took too long, or gave something else than finite numbers.
        """
        # Lists of its own, that it may change.
        given = dict(zip(OWN_NAMES[self.batched], (list(prompts), list(answers)), strict=True))
        given |= {name: list(values) for name, values in taken(columns, self.takes, self.batched).items()}
        with _staying_here():
            begin(None, True)
            if self.batched:
                with _locating(None):
                    values = self.function(**given)
                    if self.asynchronous:
                        values = _event_loop().run_until_complete(_in_time(values, timeout))
                return [_number(value, i) for i, value in enumerate(_as_list(values, len(prompts)))]
            samples = [{name: values[i] for name, values in given.items()} for i in range(len(prompts))]
            if self.asynchronous:
                return _event_loop().run_until_complete(self._awaited(samples, timeout, begin))
            numbers = []
            for i, sample in enumerate(samples):
                begin(i, True)
                with _locating(i):
                    numbers.append(_number(self.function(**sample), i))
            return numbers

    async def _awaited(self, samples: Sequence[Mapping[str, Any]], timeout: float, begin: Begin) -> list[float]:
        async def value(i: int) -> float:
            with _locating(i):
                return _number(await _in_time(_watched(self.function(**samples[i]), i, begin), timeout), i)

        tasks = [asyncio.ensure_future(value(i)) for i in range(len(samples))]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def taken(columns: Columns | None, takes: Set[str], batched: bool) -> Columns:
    """The columns that a function takes; one named as its own first two parameters cannot be passed."""
    known = (columns or {}).items()
    return {name: values for name, values in known if {EVERY, name} & takes and name not in OWN_NAMES[batched]}


@types.coroutine
def _watched(coroutine: Coroutine[Any, Any, Any], index: int, begin: Begin) -> Generator[Any, Any, Any]:
    """Runs it, and tells when it is this sample's turn: one that never yields can be named."""
    step: Callable[[Any], Any] = coroutine.send
    sent: Any = None
    while True:
        begin(index, False)
        try:
            waits_for = step(sent)
        except StopIteration as done:
            return done.value
        finally:
            begin(None, False)
        try:
            step, sent = coroutine.send, (yield waits_for)
        except BaseException as error:
            step, sent = coroutine.throw, error


async def _in_time(coroutine: Any, timeout: float) -> Any:
    async def contained() -> Any:
        try:
            return await coroutine
        except (SystemExit, KeyboardInterrupt) as error:  # out of a task it would stop the loop
            raise SampleError(None, in_words(error)) from error

    try:
        return await asyncio.wait_for(contained(), timeout or None)
    except asyncio.TimeoutError:
        raise SampleError(None, too_late(timeout)) from None


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the whole run: clients of remote scorers keep their connections on the loop they first ran in."""
    return asyncio.new_event_loop()


@contextlib.contextmanager
def _locating(index: int | None) -> Iterator[None]:
    """What is raised inside becomes a SampleError of sample `index`."""
    try:
        yield
    except SampleError as error:
        raise SampleError(index, str(error)) from error.__cause__
    # sys.exit would end the process without a word and with status 0.
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        raise SampleError(index, in_words(error)) from error


@contextlib.contextmanager
def _staying_here() -> Iterator[None]:
    """The working folder afterwards is that of before: --output_dir may be relative to it."""
    here = os.getcwd()  # and no descriptor, which the function may close
    try:
        yield
    finally:
        os.chdir(here)


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
    if type(value) is float and abs(value) <= LARGEST:  # nearly all of them
        return value
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
    text = reprlib.repr(value)  # which goes through the beginning of what is large
    text = text if len(text) <= 60 else text[:57] + "..."
    return text if value is None else f"{text} ({type(value).__name__})"


def in_words(error: BaseException) -> str:
    """The error with the innermost line of the function's own file.

    Such as `ZeroDivisionError: division by zero (rules.py, line 4: return 1 / len(answer))`.
    """
    ours = (str(Path(__file__).parent), str(Path(asyncio.__file__).parent), "<frozen importlib")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    where = ""
    if frames:
        line = [f for f in frames if f.filename == frames[0].filename][-1]
        where = f" ({Path(line.filename).name}, line {line.lineno}: {line.line})"
    try:
        message = str(error).strip().splitlines()
    except Exception:  # one of the user's own making
        message = []
    return type(error).__name__ + (f": {message[0][:LONGEST]}" if message else "") + where


@functools.cache
def find_function(entry: str, flag: str = "--reward_fn") -> RewardFunction:
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
    """A function that is at hand, called in this process and in the manner that its parameters ask for.

    Args:
        entry: its name in errors; by default its own.

    Raises:
        UserError: it has other parameters.
    """
    entry = entry or getattr(function, "__name__", repr(function))
    asynchronous = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
    return RewardFunction(entry, function, *_manner(function, f"{flag} {entry}", asynchronous))


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
        raise UserError(f"{given}: {source} cannot be imported: {in_words(error)}") from error


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


def _manner(
    function: Callable[..., Any], given: str, asynchronous: bool
) -> tuple[bool, bool, frozenset[str], frozenset[str]]:
    """(batched, asynchronous, takes, needs) of a `RewardFunction`; whether the data has what it needs is seen later."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise UserError(f"{given}: its parameters cannot be read; expected {MANNERS}") from None
    parameters = signature.parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    by_position = any(p.kind == p.POSITIONAL_ONLY and p.default is p.empty for p in parameters)
    takes = {p.name for p in named} | ({EVERY} if any(p.kind == p.VAR_KEYWORD for p in parameters) else set())
    needs = {p.name for p in named if p.default is p.empty}
    for batched, own in OWN_NAMES.items():  # lists first: (prompts, answers, prompt, answer) takes two columns
        if set(own) <= takes and not by_position:
            return batched, asynchronous, frozenset(takes - {*own}), frozenset(needs - {*own})
    raise UserError(f"{given}: takes {signature}; expected {MANNERS}")
