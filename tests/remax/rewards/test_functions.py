"""Reward functions: found by name, called in the manner of their parameters, and every failure names its sample."""

from __future__ import annotations

import asyncio
import math
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from remax.rewards.functions import RewardFunction, SampleError, find_function, reward_function
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
    function, began = find_function(f"{four_manners}:{name}"), time.monotonic()
    for timeout in (0.0, 30.0):
        assert function(PROMPTS, ANSWERS, timeout=timeout) == [11.0, 20.0, 33.0]
    assert time.monotonic() - began < 1.7  # 3 remote samples of .3 s together, twice: one after the other they take 1.8


def test_a_yes_is_1():
    assert RewardFunction("f", lambda prompt, answer: answer == "a", False, False)(PROMPTS, ANSWERS) == [1.0, 0.0, 0.0]


def test_clients_of_remote_scorers_keep_their_loop(write):
    function = find_function(
        write("""
            import asyncio
            loops = set()

            async def f(prompt, answer):
                loops.add(asyncio.get_running_loop())
                return len(loops)
        """)
        + ":f"
    )
    assert function(PROMPTS, ANSWERS, timeout=5.0) == function(PROMPTS, ANSWERS, timeout=5.0) == [1.0] * 3


KNOWN = {"solution": ["x", "", "aaa"], "answer": [1, 2, 3], "prompts": "abc", "ended": [True, False, True]}


@pytest.mark.parametrize(
    ("function", "takes", "needs", "expected"),
    [
        (lambda prompt, answer, solution: answer == solution, {"solution"}, {"solution"}, [0.0, 1.0, 1.0]),
        (lambda prompts, answers, *, answer: answer, {"answer"}, {"answer"}, [1.0, 2.0, 3.0]),
        (lambda prompts, answers, prompt=None, answer=0: answer, {"prompt", "answer"}, set(), [1.0, 2.0, 3.0]),
        (lambda prompt, answer, nowhere=7: nowhere, {"nowhere"}, set(), [7.0] * 3),
        (lambda prompt, answer, ended, tokens=9: ended * tokens, {"ended", "tokens"}, {"ended"}, [9.0, 0.0, 9.0]),
        # its own names go before columns that are called so
        (lambda prompt, answer, **rest: len(rest) + 10 * ("answer" in rest), {"*"}, set(), [3.0] * 3),
        (lambda prompts, answers, **rest: [len(rest), *rest["answer"][:2]], {"*"}, set(), [3.0, 1.0, 2.0]),
    ],
)
def test_a_function_is_given_the_columns_that_it_takes(function, takes, needs, expected):
    found = reward_function(function)
    assert (found.takes, found.needs) == (takes, needs)
    assert found(PROMPTS, ANSWERS, KNOWN) == expected


def test_an_asynchronous_function_is_given_columns_too():
    async def right(prompt, answer, solution):
        await asyncio.sleep(0)
        return answer == solution

    async def count(prompts, answers, solution):
        return [len(text) for text in solution]

    assert reward_function(right)(PROMPTS, ANSWERS, KNOWN) == [0.0, 1.0, 1.0]
    assert reward_function(count)(PROMPTS, ANSWERS, KNOWN) == [1.0, 0.0, 3.0]


# ------------------------------------------------------------------------------------------------------------ failures


def failure(function, batched: bool = False, timeout: float = 0.0) -> SampleError:
    asynchronous = asyncio.iscoroutinefunction(function)
    with pytest.raises(SampleError) as caught:
        RewardFunction("f", function, batched, asynchronous)(PROMPTS, ANSWERS, timeout=timeout)
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
    error = failure(function, timeout=timeout)
    assert str(error).startswith(words) and error.index == 0


def test_what_is_large_is_shown_in_part():
    class Own(Exception):
        def __str__(self):
            raise RuntimeError

    def fails(prompt, answer):
        raise Own if answer else ValueError("x" * 10**6)

    assert str(failure(fails)).startswith("Own (test_functions")
    assert len(str(failure(lambda prompt, answer: fails(prompt, "")))) < 700
    began = time.monotonic()
    assert len(str(failure(lambda prompt, answer: [1.0] * 10**7))) < 200 and time.monotonic() - began < 1.0


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
    function = find_function(
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


# ------------------------------------------------------------------------------------------------------------- finding


def refused(entry: str) -> str:
    with pytest.raises(UserError) as caught:
        find_function(entry)
    assert str(caught.value).startswith(f"--reward_fn {entry}: ")
    return str(caught.value).removeprefix(f"--reward_fn {entry}: ")


def test_a_file_is_imported_once_and_a_module_of_the_working_folder_is_found(write, tmp_path, monkeypatch):
    write("calls = []\ndef f(prompt, answer):\n    calls.append(1)\n    return len(calls)\ndef g(prompt, answer): pass")
    write("def f(prompt, answer):\n    return 5", "package/judge_of_the_tests.py")
    monkeypatch.chdir(tmp_path)
    f, g = find_function(f"{tmp_path}/rules.py:f"), find_function("./rules.py:g")
    assert f(["p"], ["a"]) + f(["p"], ["a"]) == [1.0, 2.0]
    assert g.function.__globals__ is f.function.__globals__
    assert find_function("package.judge_of_the_tests:f")(["p"], ["a"]) == [5.0]
    assert find_function("rules:f").function is f.function


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
    ["", "prompt", "prompt, answers", "answer, truth", "*texts", "**options", "prompt, answer, /"],
)
def test_other_parameters_are_refused(parameters, write):
    path = write(f"def f({parameters}): return 1.0")
    expected = "(prompt, answer) for one sample, or (prompts, answers) for lists of them, passed by name"
    assert refused(f"{path}:f") == f"takes ({parameters}); expected {expected}"


def test_nothing_heavy_is_imported(root):
    code = "import sys, remax.rewards.process, remax.rewards.sources; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
