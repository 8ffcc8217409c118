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

ROOT = Path(__file__).resolve().parents[2]
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
SCRIPT = f"""
source {ROOT}/utils/launch.sh
DATA=data OUTPUT=result
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
def start(tmp_path_factory) -> Iterator[Callable[[], Run]]:
    """start(): a script that has come so far that its ranks wait."""
    if not Path("/proc/self/environ").is_file():
        pytest.skip("no /proc")
    runs: list[Run] = []

    def start() -> Run:
        # Below the range that the system takes free ports from, which so many starts at once may be given twice.
        port = 21000 + os.getpid() % 500 * 16 + len(runs)
        folder = tmp_path_factory.mktemp("run")
        stage = folder / "step/training_scripts"
        stage.mkdir(parents=True)
        (folder / "step/main.py").write_text(PROGRAM)
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
                | {"MARK": mark, "NUM_GPUS": "2", "MASTER_PORT": str(port), "PATH": path, "DS_ACCELERATOR": "cpu"},
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
    runs = [start() for _ in CASES]
    end = time.monotonic() + 300
    while not all((run.folder / f"ready.{rank}").exists() for run in runs for rank in "01"):
        for run in runs:
            assert run.script.poll() is None and time.monotonic() < end, (run.folder / "console").read_text()
        time.sleep(0.1)
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
    end = time.monotonic() + LIMIT
    for run, (who, name, status, last) in zip(runs, CASES, strict=True):
        case = f"{name} to the {who}"
        assert run.script.wait(end - time.monotonic()) == status, case
        while left := run.processes():
            assert time.monotonic() < end, (case, left)
            time.sleep(0.1)
        console = (run.folder / "console").read_text()
        assert console == (run.folder / "result/training.log").read_text(), case
        if last:
            assert console.splitlines()[-1].startswith(last), (case, console)
        assert "Traceback" not in console and console.count("error:") == bool(last), (case, console)
