"""What ends a run from outside ends all of it: the real launcher, two ranks, a process for reward functions each."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from utils import stopping

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="module")
def hangup_is_not_ignored() -> Iterator[None]:
    """Under nohup it is, by all that the tests start, too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


# Rank 0 waits in a collective, where Python answers no signal, for rank 1, which never comes. Before that, each rank
# has seen that a signal to a child, and the end of a program that it has started, leave it alone.
PROGRAM = """
import os, signal, subprocess, sys, time
from utils.run import run_main

def main():
    if not (child := os.fork()):
        time.sleep(1000)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    subprocess.run([sys.executable, "-c", "from utils.run import run_main; run_main(lambda: None)"], check=True)
    assert os.path.exists(os.environ["RANK_FILES"] + "/rank." + os.environ["RANK"])
    from remax.rewards.process import load_function
    load_function("rules.py:fair")(["a prompt"], ["an answer"])
    import torch.distributed as dist
    dist.init_process_group("gloo")
    open("ready." + os.environ["RANK"], "w").close()
    if os.environ["RANK"] == "0":
        dist.barrier()
    time.sleep(1000)

run_main(main)
"""
# Stands in for a training's loop: a step takes a tenth of a second, a rank tells the other one that it is to stop, by a
# file, and both wait for one another before they leave. The script has less patience than the saving takes.
LOOP = """
import os, sys, time
from pathlib import Path
from utils import stopping
from utils.run import run_main

RANK, STOP = os.environ["RANK"], Path("stop")

def main():
    with stopping.deferring():
        stopping.allow(9.0)
        Path("ready." + RANK).touch()
        while not (reason := stopping.asked_to_stop() or (STOP.exists() and STOP.read_text())):
            time.sleep(0.1)
        whole = Path("stop." + RANK)
        whole.write_text(reason)
        whole.replace(STOP)
        time.sleep(4)
        Path("saved." + RANK).touch()
        while not all(Path("saved." + rank).exists() for rank in "01"):
            time.sleep(0.1)
        stopping.leave(reason)

run_main(main)
"""
SCRIPT = f"""
source {ROOT}/utils/launch.sh
DATA=data OUTPUT=result PATIENCE=${{PATIENCE_FOR_TEST:-$PATIENCE}}
launch
"""
LIMIT = 30  # seconds within which all must have ended


class Run(NamedTuple):
    """A script that runs in a folder, and the mark that its processes have in their environment."""

    script: subprocess.Popen
    folder: Path
    mark: str

    def processes(self) -> dict[int, list[str]]:
        """Command lines of all that belongs to the run, by process id."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if f"MARK={self.mark}".encode() in (place / "environ").read_bytes().split(b"\0"):
                    found[int(place.name)] = (place / "cmdline").read_text().split("\0")
            except OSError:
                continue
        return found

    def pid(self, who: str) -> int:
        if who == "script":
            return self.script.pid
        words = {"runner": "bin/deepspeed", "launcher": "deepspeed.launcher.launch"}
        word = words.get(who) or who.replace("rank ", "--local_rank=")
        (found,) = (pid for pid, line in self.processes().items() if any(part.endswith(word) for part in line[:5]))
        return found


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Iterator[Callable[..., Run]]:
    """start(program): a script of two ranks that run the program."""
    if not Path("/proc/self/environ").is_file():
        pytest.skip("no /proc")
    runs: list[Run] = []

    def start(program: str, **environment: str) -> Run:
        # Below the range that the system takes free ports from, which so many starts at once may be given twice.
        port = 21000 + os.getpid() % 500 * 16 + len(runs)
        folder = tmp_path_factory.mktemp("run")
        stage = folder / "step/training_scripts"
        stage.mkdir(parents=True)
        (folder / "step/main.py").write_text(program)
        (stage / "run.sh").write_text(SCRIPT)
        (folder / "rules.py").write_text("def fair(prompt, answer):\n    return 1.0\n")
        mark = uuid.uuid4().hex
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        with (folder / "console").open("wb") as console:
            script = subprocess.Popen(
                ["bash", stage / "run.sh"],
                cwd=folder,
                env=inherited
                | {"MARK": mark, "NUM_GPUS": "2", "MASTER_PORT": str(port), "PATH": path, "DS_ACCELERATOR": "cpu"}
                | environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        runs.append(Run(script, folder, mark))
        return runs[-1]

    yield start
    for run in runs:
        for pid in run.processes():
            os.kill(pid, signal.SIGKILL)


# To whom, which signal, the script's exit status, its last line.
CASES = [
    ("script", "SIGTERM", 143, "error: stopped by SIGTERM, which was sent to this script"),
    ("script, twice, while its ranks hang", "SIGINT", 130, "error: stopped by SIGINT, which was sent to this script"),
    ("script", "SIGKILL", -9, ""),
    ("runner", "SIGTERM", 143, "error: the launcher was killed by signal 15"),
    ("launcher", "SIGTERM", 143, "error: the launcher was told to stop, and sent SIGTERM to the ranks"),
    ("launcher", "SIGKILL", 137, "error: the launcher was killed"),
    ("rank 1", "SIGUSR1", 138, "error: stopped by SIGUSR1, which was sent to rank 1"),
    ("rank 1", "SIGKILL", 137, "error: rank 1 was killed by signal 9 (by hand, or by the system"),
]


@pytest.mark.ranks
def test_a_signal_ends_all_with_one_line(start):
    runs = [start(PROGRAM) for _ in CASES]
    until_ready(runs)
    for run, (who, name, _, _) in zip(runs, CASES, strict=True):
        assert any("remax.rewards.worker" in " ".join(line) for line in run.processes().values())
        if "hang" in who:
            for rank in "01":
                os.kill(run.pid(f"rank {rank}"), signal.SIGSTOP)
        os.kill(run.pid(who.split(",")[0]), signal.Signals[name])
    time.sleep(1)
    for run, (who, name, _, _) in zip(runs, CASES, strict=True):
        if "twice" in who:
            assert run.script.poll() is None
            os.kill(run.pid("script"), signal.Signals[name])
    for console in ends_of(runs, CASES):
        assert "saved after" not in console


def until_ready(runs: list[Run]) -> None:
    end = time.monotonic() + 300
    while not all((run.folder / f"ready.{rank}").exists() for run in runs for rank in "01"):
        for run in runs:
            assert run.script.poll() is None and time.monotonic() < end, (run.folder / "console").read_text()
        time.sleep(0.1)


def ends_of(runs: list[Run], cases: list[tuple[str, str, int, str]], limit: float = LIMIT) -> list[str]:
    """The consoles of runs that end as the cases say, and leave nothing behind."""
    end, consoles = time.monotonic() + limit, []
    for run, (who, name, status, last) in zip(runs, cases, strict=True):
        case = f"{name} to the {who}"
        assert run.script.wait(end - time.monotonic()) == status, (case, (run.folder / "console").read_text())
        while left := run.processes():
            assert time.monotonic() < end, (case, left)
            time.sleep(0.1)
        console = (run.folder / "console").read_text()
        assert console == (run.folder / "result/training.log").read_text(), case
        if last:
            assert console.splitlines()[-1].startswith(last), (case, console)
        assert "Traceback" not in console and console.count("error:") == bool(last), (case, console)
        consoles.append(console)
    return consoles


# The last one's ranks cannot both save.
IN_A_LOOP = [
    ("script", "SIGUSR1", 138, "error: stopped by SIGUSR1, which was sent to this script"),
    ("runner", "SIGTERM", 143, "error: the launcher was killed by signal 15"),
    ("launcher", "SIGTERM", 143, "error: the launcher was told to stop, and sent SIGTERM to the ranks"),
    ("launcher", "SIGKILL", 137, "error: the launcher was killed"),
    ("rank 1", "SIGHUP", 129, "error: stopped by SIGHUP, which was sent to rank 1"),
    ("rank 1", "SIGKILL", 137, "error: rank 1 was killed by signal 9 (by hand, or by the system"),
]


@pytest.mark.ranks
def test_a_loop_is_left_when_all_have_saved(start):
    runs = [start(LOOP, PATIENCE_FOR_TEST="4") for _ in IN_A_LOOP]
    until_ready(runs)
    for run, (who, name, _, _) in zip(runs, IN_A_LOOP, strict=True):
        os.kill(run.pid(who), signal.Signals[name])
    consoles = ends_of(runs, IN_A_LOOP, limit=60)
    for run, (who, name, _, _) in zip(runs, IN_A_LOOP, strict=True):
        saved = [(run.folder / f"saved.{rank}").exists() for rank in "01"]
        assert saved == [True, (who, name) != ("rank 1", "SIGKILL")], (who, name)
    assert "SIGUSR1: saved after this step, within 60 s; from now on Ctrl-C ends it at once" in consoles[0]


# --------------------------------------------------------------------------------- a rank alone, and no launcher at all

ALONE = """
import os, sys, time
from utils import stopping
from utils.run import run_main

stopping.GRACE, stopping.SAVING, stopping.LOOK = 0.3, float(sys.argv[1]), 0.1

def main():
    with stopping.deferring(float(sys.argv[2])):
        stopping.allow(float(sys.argv[3]))
        print("ready", flush=True)
        while not (reason := stopping.asked_to_stop()):
            time.sleep(0.01)
        print("saving", flush=True)
        time.sleep(float(sys.argv[4]))
        stopping.leave(reason)

run_main(main)
"""


def alone(*, saving=60.0, hours=0.0, allowed=0.0, takes=0.0, launched: Path | None = None) -> subprocess.Popen[str]:
    """A process in a loop, which torchrun seems to have started where it is `launched`, with that folder for files."""
    arguments = map(str, (saving, hours, allowed, takes))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    if launched:
        environment |= {"RANK": "0", "TORCHELASTIC_RUN_ID": "none", "RANK_FILES": str(launched)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", ALONE, *arguments], cwd=ROOT, env=environment, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("launched", [True, False])
@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1"])
def test_the_loop_hears_of_the_signal_and_leaves_by_it(tmp_path, launched, name):
    process = alone(launched=tmp_path if launched else None)
    process.send_signal(signal.Signals[name])
    output, errors = process.communicate(timeout=30)
    assert (output, process.returncode) == ("saving\n", 128 + signal.Signals[name])
    said = [f"{name}: saved after this step", *([] if launched else [f"error: stopped by {name}"])]
    assert [line.startswith(words) for line, words in zip(errors.splitlines(), said, strict=True)] == [True] * len(said)


@pytest.mark.parametrize("launched", [True, False])
def test_a_second_interrupt_ends_it_at_once(tmp_path, launched):
    process = alone(takes=60.0, launched=tmp_path if launched else None)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)  # it is leaving already
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


def test_a_rank_that_does_not_come_to_save_ends_after_what_it_was_allowed(tmp_path):
    process, began = alone(saving=0.1, allowed=1.0, takes=60.0, launched=tmp_path), time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143 and time.monotonic() - began >= 1.0
    assert (tmp_path / "patience").read_text() == "1\n" and (tmp_path / "signal").read_text() == "SIGTERM 0\n"


@pytest.mark.parametrize("trace", ["a dead rank", "one that left"])
def test_it_does_not_wait_for_a_rank_that_has_ended(tmp_path, trace):
    process = alone(takes=60.0, launched=tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / ("left" if "left" in trace else "rank.1")).write_text(f"{dead.pid}\n")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143


def test_the_hours_leave_room_for_what_the_loop_may_need():
    began = time.monotonic()
    process = alone(hours=3602 / 3600, allowed=3600.5)
    output, errors = process.communicate(timeout=30)
    assert (output, errors, process.returncode) == ("saving\n", "", stopping.UNFINISHED)
    assert 1.0 < time.monotonic() - began


def test_outside_of_a_loop_nothing_is_asked():
    assert stopping.asked_to_stop() is None
    with stopping.deferring(1e-9):
        assert stopping.asked_to_stop() == "--max_hours"
    assert stopping.asked_to_stop() is None


def test_a_signal_after_the_last_look_ends_it_at_the_end_of_the_loop():
    answer = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(SystemExit) as stop, stopping.deferring():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.value.code == 138
    assert signal.getsignal(signal.SIGUSR1) == answer and stopping.asked_to_stop() is None


def test_a_forked_child_of_a_loop_answers_signals_as_any_process():
    with stopping.deferring():
        if not (child := os.fork()):
            time.sleep(60)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
