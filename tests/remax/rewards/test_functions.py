"""Reward functions: found by name, called in the manner of their parameters, and every failure names its sample."""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from remax.rewards.functions import RewardFunction, SampleError, load_function
from utils.run import UserError

PROMPTS, ANSWERS = ["p", "pp", "ppp"], ["a", "", "aaa"]


@pytest.fixture
def write(tmp_path):
    """write("def f(prompt, answer): ...") -> the file's path."""

    def write(text: str, name: str = "rules.py") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


# ------------------------------------------------------------------------------------------------------------- manners


@pytest.fixture
def four_manners(write) -> str:
    return write("""
        import asyncio, torch
        import numpy as np

        def single(answer, prompt, scale=10):
            return scale * len(prompt) + len(answer)

        def lists(prompts, answers):
            return [single(a, p) for p, a in zip(prompts, answers)]

        def array(prompts, answers):
            return np.array(lists(prompts, answers), dtype=np.float32)

        def tensor(*, prompts, answers, **options):
            return torch.tensor(lists(prompts, answers)).double()

        async def remote(prompt, answer):
            await asyncio.sleep(0.3)
            return single(answer, prompt)

        async def remote_lists(prompts, answers):
            await asyncio.sleep(0)
            return lists(prompts, answers)

        class Scorer:
            def __call__(self, prompt, answer):
                return np.float32(single(answer, prompt))

        scorer = Scorer()
    """)


@pytest.mark.parametrize("name", ["single", "lists", "array", "tensor", "remote", "remote_lists", "scorer"])
def test_each_manner_gives_a_number_for_each_sample(name, four_manners):
    # 10 * characters of the prompt + characters of the answer
    function, began = load_function(f"{four_manners}:{name}"), time.monotonic()
    for timeout in (0.0, 30.0):
        assert function(PROMPTS, ANSWERS, timeout) == [11.0, 20.0, 33.0]
    assert time.monotonic() - began < 1.7  # 3 remote samples of .3 s together, twice: one after the other they take 1.8
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_yes_is_1():
    assert RewardFunction("f", lambda prompt, answer: answer == "a", False, False)(PROMPTS, ANSWERS) == [1.0, 0.0, 0.0]


def test_clients_of_remote_scorers_keep_their_loop(write):
    function = load_function(
        write("""
            import asyncio
            loops = set()

            async def f(prompt, answer):
                loops.add(asyncio.get_running_loop())
                return len(loops)
        """)
        + ":f"
    )
    assert function(PROMPTS, ANSWERS, 5.0) == function(PROMPTS, ANSWERS, 5.0) == [1.0] * 3


# ------------------------------------------------------------------------------------------------------------ failures


def failure(function, batched: bool = False, timeout: float = 0.0) -> SampleError:
    asynchronous = asyncio.iscoroutinefunction(function)
    with pytest.raises(SampleError) as caught:
        RewardFunction("f", function, batched, asynchronous)(PROMPTS, ANSWERS, timeout)
    return caught.value


def divide(prompt, answer):
    return 1 / len(answer)


async def divide_remote(prompt, answer):
    return divide(prompt, answer)


@pytest.mark.parametrize("function", [divide, divide_remote])
def test_an_exception_is_told_with_its_line(function):
    error = failure(function)
    assert error.index == 1
    pattern = r"ZeroDivisionError: division by zero \(test_functions\.py, line \d+: return 1 / len\(answer\)\)"
    assert re.fullmatch(pattern, str(error))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "returned None; expected a number"),
        ("3", "returned '3' (str); expected a number"),
        ([1.0], "returned [1.0] (list); expected a number"),
        (1j, "returned 1j (complex); expected a number"),
        (torch.ones(2), "returned tensor([1., 1.]) (Tensor); expected a number"),
        (math.nan, "returned nan (float); expected a finite number"),
        (-math.inf, "returned -inf (float); expected a finite number"),
        (1e39, "returned 1e+39 (float); expected a finite number"),  # infinite in float32
    ],
)
def test_what_is_no_finite_number(value, words):
    error = failure(lambda prompt, answer: value if answer == "" else 1.0)
    assert (error.index, str(error)) == (1, words)
    error = failure(lambda prompts, answers: [1.0, value, 2.0], batched=True)
    assert (error.index, str(error)) == (1, words)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1.0, 2.0], "returned 2 values; expected 3 numbers, one for each answer"),
        (np.zeros(4), "returned 4 values; expected 3 numbers"),
        (None, "returned None; expected 3 numbers"),
        (1.0, "returned 1.0 (float); expected 3 numbers"),
        ("123", "returned '123' (str); expected 3 numbers"),
        ({"a": 1, "b": 2, "c": 3}, "returned {'a': 1, 'b': 2, 'c': 3} (dict); expected 3 numbers"),
    ],
)
def test_what_is_no_list_of_as_many_numbers(value, words):
    error = failure(lambda prompts, answers: value, batched=True)
    assert error.index is None and str(error).startswith(words)


def test_an_exception_in_a_batched_call_belongs_to_no_sample():
    error = failure(lambda prompts, answers: prompts[7], batched=True)
    assert error.index is None and str(error).startswith("IndexError: list index out of range (test_functions")


def leave(prompt, answer):
    sys.exit(0)


async def leave_remote(prompt, answer):
    sys.exit(0)


async def give_up(prompt, answer):
    raise asyncio.CancelledError


@pytest.mark.parametrize("timeout", [0.0, 5.0])
@pytest.mark.parametrize(
    ("function", "words"), [(leave, "SystemExit: 0"), (leave_remote, "SystemExit: 0"), (give_up, "CancelledError")]
)
def test_a_function_cannot_end_its_rank_silently(function, words, timeout):
    assert str(failure(function, timeout=timeout)).startswith(words)


def test_a_function_may_change_its_lists():
    def use_up(prompts, answers):
        return [float(len(prompts.pop()) + len(answers.pop())) for _ in range(2)]

    assert str(failure(use_up, batched=True)).startswith("returned 2 values; expected 3 numbers")
    prompts = list(PROMPTS)
    assert (
        RewardFunction("f", lambda prompts, answers: [prompts.clear()] and [1.0] * 3, True, False)(prompts, ANSWERS)
        == [1.0] * 3
    )
    assert prompts == PROMPTS


def test_the_working_folder_stays(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    function = load_function(
        write("""
            import os
            os.chdir("data")
            def f(prompt, answer):
                os.chdir("data")  # a relative one: twice would fail
                return answer != ""
        """)
        + ":f"
    )
    assert Path.cwd() == tmp_path
    assert [function(["p"], [answer]) for answer in ("", "a")] == [[0.0], [1.0]] and Path.cwd() == tmp_path
    assert failure(lambda prompt, answer: os.chdir("data")) and Path.cwd() == tmp_path


# ----------------------------------------------------------------------------------------------------------- time-outs


def slow(prompt, answer):
    time.sleep(0.0 if answer else 30.0)
    return 1.0


def busy(prompt, answer):
    while not answer:
        pass
    return 1.0


def patient(prompt, answer):
    while not answer:
        try:
            time.sleep(5.0)
        except Exception:  # a time-out is none
            pass
    return 1.0


def runaway_expression(prompt, answer):
    return bool(re.match(r"(x+x+)+y", "x" * (0 if answer else 40)))


def slow_batch(prompts, answers):
    time.sleep(30.0)


async def slow_remote(prompt, answer):
    await asyncio.sleep(0.0 if answer else 30.0)
    return 1.0


async def blocking_remote(prompt, answer):
    return slow(prompt, answer)


@pytest.mark.parametrize(
    ("function", "index"),
    [
        (slow, 1),
        (busy, 1),
        (patient, 1),
        (runaway_expression, 1),
        (slow_batch, None),
        (slow_remote, 1),
        (blocking_remote, 1),
    ],
)
def test_a_time_out_names_the_sample(function, index):
    began = time.monotonic()
    error = failure(function, batched=function is slow_batch, timeout=0.2)
    assert 0.2 <= time.monotonic() - began < 4.0
    assert (error.index, str(error)) == (index, "no answer within 0.2 s (--reward_fn_timeout)")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_alarm_of_the_caller_still_rings():
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        assert RewardFunction("f", slow, False, False)(["p"], ["a"], 5.0) == [1.0]
        time.sleep(0.3)
        assert rung == [True]
    finally:
        signal.signal(signal.SIGALRM, handler)


# ------------------------------------------------------------------------------------------------------------- finding


def refused(entry: str) -> str:
    with pytest.raises(UserError) as caught:
        load_function(entry)
    assert str(caught.value).startswith(f"--reward_fn {entry}: ")
    return str(caught.value).removeprefix(f"--reward_fn {entry}: ")


def test_a_file_is_imported_once_and_a_module_of_the_working_folder_is_found(write, tmp_path, monkeypatch):
    write("calls = []\ndef f(prompt, answer):\n    calls.append(1)\n    return len(calls)\ndef g(prompt, answer): pass")
    write("def f(prompt, answer):\n    return 5", "package/judge_of_the_tests.py")
    monkeypatch.chdir(tmp_path)
    f, g = load_function(f"{tmp_path}/rules.py:f"), load_function("./rules.py:g")
    assert f(["p"], ["a"]) + f(["p"], ["a"]) == [1.0, 2.0]
    assert g.function.__globals__ is f.function.__globals__
    assert load_function("package.judge_of_the_tests:f")(["p"], ["a"]) == [5.0]
    assert load_function("rules:f").function is f.function


def test_what_cannot_be_found(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write("from math import pi\ndef shortness(prompt, answer): pass\ndef _own(): pass")
    for entry in ("rules", "rules.py", "rules.py:", "a/b:f", ":f", "rules:f g"):
        assert refused(entry).startswith("expected module:function or file.py:function")
    assert refused("nowhere.py:f").startswith(f"no such file nowhere.py (looked from {tmp_path})")
    assert refused("no_such_module.rules:f").startswith("no module no_such_module.rules; install it, put its folder on")
    assert refused(f"{path}:shortnes") == f"{path} has no shortnes; it has shortness"
    assert refused(f"{path}:xyz") == f"{path} has no xyz; it has shortness"
    assert refused(f"{path}:pi") == "pi is a float; expected a function"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import numpyy", "ModuleNotFoundError: No module named 'numpyy' (broken.py, line 1: import numpyy)"),
        ("def f(:", "SyntaxError: invalid syntax (broken.py, line 1)"),
        ("\nx = 1 / 0", "ZeroDivisionError: division by zero (broken.py, line 2: x = 1 / 0)"),
    ],
)
def test_a_module_that_cannot_be_imported_says_where(text, words, write):
    path = write(text, "broken.py")
    assert refused(f"{path}:f") == f"{path} cannot be imported: {words}"


@pytest.mark.parametrize(
    "parameters",
    ["", "prompt", "prompt, answers", "prompt, answer, truth", "*texts", "prompt, answer, /"],
)
def test_other_parameters_are_refused(parameters, write):
    path = write(f"def f({parameters}): return 1.0")
    expected = "(prompt, answer) for one sample, or (prompts, answers) for lists of them, passed by name"
    assert refused(f"{path}:f") == f"takes ({parameters}); expected {expected}"


def test_nothing_heavy_is_imported(root):
    code = "import sys, remax.rewards.functions, remax.rewards.sources; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
