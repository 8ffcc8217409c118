"""Reward functions in their own process: whatever one does, the rank gets numbers or one line that names the sample."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from remax.rewards import process
from remax.rewards.functions import SampleError
from remax.rewards.process import Worker, load_function, worker_environment
from utils.run import UserError

PROMPTS, ANSWERS = ["p", "pp", "ppp"], ["a", "", "aaa"]
RULES = """
    import asyncio, ctypes, os, re, resource, signal, subprocess, sys, threading, time
    from pathlib import Path

    def length(prompt, answer):
        return len(answer)

    def divide(prompt, answer):
        return 1 / len(answer)

    def right(prompts, answers, solution, ended, tokens=None):
        return [10 * (a == s) + 2 * e + (tokens is None) for a, s, e in zip(answers, solution, ended)]

    async def remote(prompt, answer):
        await asyncio.sleep(0.05)
        return len(answer)

    # ------------------------------------------------------------------------------------ what takes too long

    def slow(prompt, answer):
        time.sleep(0.0 if answer else 30.0)
        return 1.0

    def deaf(prompt, answer):
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        while not answer:
            try:
                time.sleep(5.0)
            except BaseException:
                pass
        return 1.0

    def native(prompt, answer):
        return 1.0 if answer else sum(range(10**12))

    def runaway_expression(prompt, answer):
        return bool(re.match(r"(x+x+)+y", "x" * (0 if answer else 40)))

    def slow_batch(prompts, answers):
        time.sleep(30.0)

    def slow_number(prompt, answer):
        class Number:
            def __float__(self):
                time.sleep(30.0)
        return 1.0 if answer else Number()

    async def slow_remote(prompt, answer):
        await asyncio.sleep(0.0 if answer else 30.0)
        return 1.0

    async def slow_remote_batch(prompts, answers):
        await asyncio.sleep(30.0)

    async def blocking_remote(prompt, answer):
        await asyncio.sleep(0.01)
        return slow(prompt, answer)

    async def deaf_remote(prompt, answer):
        while not answer:
            try:
                await asyncio.sleep(5.0)
            except BaseException:
                pass
        return 1.0

    def starts_others(prompt, answer):
        here = Path(__file__).parent
        for name, own_session in (("child", False), ("session", True)):
            child = subprocess.Popen(["sleep", "60"], start_new_session=own_session)
            (here / name).write_text(str(child.pid))
        time.sleep(30.0)

    # ------------------------------------------------------------------------------------------ what dies

    def leave(prompt, answer):
        return 1.0 if answer else os._exit(0)

    def die(prompt, answer):
        return 1.0 if answer else os.kill(os.getpid(), signal.SIGKILL)

    def crash(prompts, answers):
        return ctypes.string_at(0)

    def raise_anything(prompt, answer):
        if not answer:
            raise KeyboardInterrupt("no")
        return 1.0

    def close_all(prompt, answer):
        if not answer:
            os.closerange(0, 1000)
        return 1.0

    def close_and_stay(prompt, answer):
        if not answer:
            os.closerange(0, 1000)
            time.sleep(30.0)
        return 1.0

    def write_all(prompt, answer):
        if not answer:
            for descriptor in range(3, 20):
                try:
                    os.write(descriptor, b"\\x07" * 64)
                except OSError:
                    pass
            time.sleep(5.0)
        return 1.0

    def too_much_memory(prompt, answer):
        limits = resource.getrlimit(resource.RLIMIT_AS)
        if not answer:
            resource.setrlimit(resource.RLIMIT_AS, (2**32, limits[1]))
            bytearray(2**40)
        return 1.0

    # ------------------------------------------------------------------------------------- what does no harm

    def fork(prompt, answer):
        os.fork()
        return len(answer)

    def fork_that_stays(prompt, answer):
        if os.fork() == 0:
            time.sleep(60)
        return len(answer)

    def close_output(prompt, answer):
        for descriptor in (1, 2):
            try:
                os.close(descriptor)
            except OSError:
                pass
        return len(answer)

    def alarm(prompt, answer):
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(1000)
        return len(answer)

    def rubbish(prompt, answer):
        os.write(1, b"\\x00\\xffrubbish\\n")
        sys.stdout = None
        return len(answer)

    def threads(prompt, answer):
        threading.Thread(target=time.sleep, args=(60,)).start()
        return len(answer)

    def seen(prompt, answer):
        return sum(name in sys.modules for name in ("torch", "transformers", "numpy"))

    def number(prompt, answer):
        return os.getpid()
"""


@pytest.fixture(scope="module")
def rules(tmp_path_factory) -> Path:
    """A file of functions, each with its own way to go wrong."""
    path = tmp_path_factory.mktemp("functions") / "rules.py"
    path.write_text(textwrap.dedent(RULES))
    return path


def failure(entry: str, timeout: float = 0.0) -> SampleError:
    function, began = load_function(entry), time.monotonic()
    with pytest.raises(SampleError) as caught:
        function(PROMPTS, ANSWERS, None, timeout)
    assert time.monotonic() - began < 4.0
    return caught.value


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("name", ["length", "remote"])
def test_numbers_come_back(rules, name):
    for timeout in (0.0, 30.0):
        assert load_function(f"{rules}:{name}")(PROMPTS, ANSWERS, None, timeout) == [1.0, 0.0, 3.0]


def test_a_function_is_given_what_it_takes(rules):
    columns = {"solution": ["a", "b", "aaa"], "ended": [True, True, False], "unused": [object()] * 3}
    function = load_function(f"{rules}:right")
    assert function(PROMPTS, ANSWERS, columns) == [13.0, 3.0, 11.0]
    assert (function.takes, function.needs) == ({"solution", "ended", "tokens"}, {"solution", "ended"})


@pytest.mark.parametrize(
    ("name", "index"),
    [
        *dict.fromkeys(("slow", "deaf", "native", "runaway_expression", "slow_number"), 1).items(),
        *{"slow_batch": None, "slow_remote": 1, "slow_remote_batch": None, "blocking_remote": 1}.items(),
        ("deaf_remote", None),
    ],
)
def test_a_time_out_names_the_sample_whatever_the_function_does(rules, name, index):
    error = failure(f"{rules}:{name}", timeout=0.2)
    assert (error.index, str(error)) == (index, "no answer within 0.2 s (--reward_fn_timeout)")


def test_a_time_out_ends_all_that_the_function_started(rules):
    error = failure(f"{rules}:starts_others", timeout=0.5)
    assert str(error).startswith("no answer within 0.5 s")
    started = [int((rules.parent / name).read_text()) for name in ("child", "session")]
    assert until(lambda: not any(map(alive, started)))


def test_the_limit_is_for_a_sample_and_not_for_all_of_them(rules):
    sleeps = rules.parent / "sleeps.py"
    sleeps.write_text("import time\ndef f(prompt, answer):\n    time.sleep(0.25)\n    return 1")
    assert load_function(f"{sleeps}:f")(["p"] * 4, ["a"] * 4, None, 0.6) == [1.0] * 4


@pytest.mark.parametrize(
    ("name", "index", "words"),
    [
        ("divide", 1, "ZeroDivisionError: division by zero (rules.py, line 9: return 1 / len(answer))"),
        ("leave", 1, "its process ended with status 0 instead of answering"),
        ("die", 1, "its process was killed by SIGKILL (which is also what happens when memory runs out)"),
        ("crash", None, "its process was killed by SIGSEGV"),
        ("raise_anything", 1, "KeyboardInterrupt: no (rules.py, line "),
        ("close_all", None, process.CLOSED),
        ("close_and_stay", 1, process.CLOSED),
        ("write_all", None, process.WRITTEN),
        ("too_much_memory", 1, "MemoryError (rules.py, line "),
    ],
)
def test_a_death_is_named_with_its_sample(rules, name, index, words, capsys):
    error = failure(f"{rules}:{name}")
    assert str(error).startswith(words) and (error.index == index or name == "close_all")
    died = words.startswith("its process")
    assert str(error).endswith(", twice in a row") == died
    assert not capsys.readouterr().err  # the error alone tells
    assert load_function(f"{rules}:length")(PROMPTS, ANSWERS) == [1.0, 0.0, 3.0]  # the next one starts anew


@pytest.mark.parametrize("how", ["os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)", "ctypes.string_at(0)"])
def test_a_death_that_does_not_come_again_costs_nothing_but_time(tmp_path, how, capsys):
    path, trace = tmp_path / "dies.py", tmp_path / "dead"
    path.write_text(
        "import ctypes, os, signal\nfrom pathlib import Path\ncalls = []\n"
        "def f(prompt, answer):\n    calls.append(answer)\n"
        f"    if len(calls) == 3 and not Path({str(trace)!r}).exists():\n"
        f"        Path({str(trace)!r}).touch()\n        {how}\n    return len(answer)\n"
    )
    function = load_function(f"{path}:f")
    assert function(PROMPTS, ANSWERS) == [1.0, 0.0, 3.0] and trace.exists()
    assert function(PROMPTS, ANSWERS) == [1.0, 0.0, 3.0]
    assert capsys.readouterr().err.count("started again\n") == 1


@pytest.mark.parametrize("name", ["fork", "fork_that_stays", "close_output", "alarm", "rubbish", "threads"])
def test_what_does_no_harm_is_let_alone(rules, name):
    process._worker.stop()  # one whose output is open
    function = load_function(f"{rules}:{name}")
    for _ in range(2):
        assert function(PROMPTS, ANSWERS, None, 5.0) == [1.0, 0.0, 3.0]


def test_one_process_serves_all_functions_and_imports_nothing_heavy(rules):
    number, seen = load_function(f"{rules}:number"), load_function(f"{rules}:seen")
    pids = number(PROMPTS, ANSWERS) + number(PROMPTS, ANSWERS)
    assert len(set(pids)) == 1 and pids[0] != os.getpid()
    worker = Worker()
    try:
        worker.find(f"{rules}:seen")
        assert worker.ask(("call", f"{rules}:seen", ["p"], ["a"], {}, 0.0), 5.0, "late") == {"values": [0.0]}
    finally:
        worker.stop()
    assert seen.batched is False


def test_what_it_draws_is_the_same_in_every_run(tmp_path):
    path = tmp_path / "draws.py"
    path.write_text(
        "import random, numpy, torch\ndef f(prompts, answers):\n"
        "    return [random.random(), numpy.random.rand(), torch.rand(()), random.random()]"
    )
    draws = []
    for _ in range(2):
        process._worker.stop()
        draws.append(load_function(f"{path}:f")(["p"] * 4, ["a"] * 4))
    assert draws[0] == draws[1] and len(set(draws[0])) == 4


def test_its_own_print_goes_where_the_runs_does(rules, tmp_path, root):
    (tmp_path / "loud.py").write_text("print('imported')\ndef f(prompt, answer):\n    print('called')\n    return 1.0")
    done = run_python("print(load_function('loud.py:f')(['p'], ['a']), flush=True)", tmp_path, root)
    assert done.stdout.split() == ["imported", "called", "[1.0]"]


def run_python(code: str, folder: Path, root: Path, **options) -> subprocess.CompletedProcess[str]:
    code = f"from remax.rewards.process import _worker, load_function\n{code}"
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=30, env=environment, **options
    )


# ------------------------------------------------------------------------------------------------------ start and end


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import time; time.sleep(60)", "its module was not imported within 0.5 s (while its module was imported)"),
        ("import os; os._exit(0)", "its process ended with status 0 instead of answering (while its module was"),
        ("import sys; sys.exit(0)", "{path} cannot be imported: SystemExit: 0 (starts.py, line 1: "),
        ("raise KeyboardInterrupt", "KeyboardInterrupt (starts.py, line 1: raise KeyboardInterrupt)"),
        ("import os; os.closerange(3, 999)", "it closed a descriptor that is not its own"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch, text, words):
    monkeypatch.setattr(process, "IMPORT_LIMIT", 0.5 if "sleep" in text else 30.0)
    path = tmp_path / "starts.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_function(f"{path}:f")
    assert str(caught.value).startswith(f"--reward_fn {path}:f: {words.format(path=path)}")


def test_files_are_found_from_the_rank_s_folder_and_modules_on_its_search_path(tmp_path, monkeypatch):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rules.py").write_text(f"def f(prompt, answer): return {len(folder)}")
        (tmp_path / folder / f"judge_of_{folder}.py").write_text("def f(prompt, answer): return 7")
        monkeypatch.chdir(tmp_path / folder)
        load_function.cache_clear()
        process._worker.stop()
        assert load_function("./rules.py:f")(["p"], ["a"]) == [len(folder)]
    monkeypatch.syspath_prepend(tmp_path / "here")
    process._worker.stop()
    assert load_function("judge_of_here:f")(["p"], ["a"]) == [7.0]
    assert load_function("judge_of_there:f")(["p"], ["a"]) == [7.0]  # a file below the working folder
    load_function.cache_clear()


def test_it_does_not_outlive_its_rank(rules, root):
    # Also not one in a native loop, nor what it has started: nobody is left to stop them.
    code = f"""
        import os, signal, threading, time
        function = load_function({str(rules)!r} + ":starts_others")
        def leave():
            while not os.path.exists({str(rules.parent / "session")!r}): time.sleep(0.02)
            print(_worker.process.pid, _worker._guard.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=leave).start()
        function(["p"], ["a"])
    """
    for name in ("child", "session"):
        (rules.parent / name).unlink(missing_ok=True)
    done = run_python(textwrap.dedent(code), rules.parent, root)
    assert done.returncode == -signal.SIGKILL
    started = [int((rules.parent / name).read_text()) for name in ("child", "session")]
    pids = [*map(int, done.stdout.split()), *started]
    assert len(pids) == 4 and until(lambda: not any(map(alive, pids)))


def test_the_rank_ends_at_once_and_the_module_may_say_goodbye(tmp_path, root):
    text = "import atexit\natexit.register(print, 'goodbye')\ndef f(prompt, answer): return 1.0"
    (tmp_path / "rules.py").write_text(text)
    began = time.monotonic()
    code = "load_function('rules.py:f'); print(_worker.process.pid, _worker._guard.pid, flush=True)"
    done = run_python(code, tmp_path, root)
    *pids, word = done.stdout.split()
    assert word == "goodbye" and done.returncode == 0 and time.monotonic() - began < process.LEAVE
    assert not any(alive(int(pid)) for pid in pids)


@pytest.mark.parametrize(
    ("rank", "visible", "gpu"),
    [
        ({}, None, None),
        ({"LOCAL_RANK": "1"}, "4,6", "6"),
        ({"LOCAL_RANK": "1"}, None, "1"),
        ({"LOCAL_RANK": "1"}, "6", "6"),  # a launcher that shows each rank its own
        ({"LOCAL_RANK": "0"}, "", ""),
    ],
)
def test_cuda_is_the_ranks_gpu(monkeypatch, rank, visible, gpu):
    for name in ("LOCAL_RANK", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (rank | {"MASTER_ADDR": "a", "RANK": "3"}).items():
        monkeypatch.setenv(name, value)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    environment = worker_environment()
    assert environment.get("CUDA_VISIBLE_DEVICES") == gpu
    assert environment["RANK"] == "3" and not {"MASTER_ADDR", "LOCAL_RANK"} & environment.keys()
