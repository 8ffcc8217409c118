"""Applies the faults of faults.py one at a time to a copy of the repository, and says which the tests notice.

    python tests/mutants/run.py [--jobs N] [--list] [--trust] [--only ID ...]

A fault is killed when a test that it names fails. Each of these tests must pass without a fault first, or its failure
would say nothing. Exit status: 0 where at least 95 % of the faults are killed, 1 below, and 2 where a test does not
pass without a fault, or the text that a fault replaces is not found exactly once.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from compileall import compile_dir
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from faults import FAULTS, Fault, Test  # noqa: E402

ENOUGH = 0.95  # share of the faults that must be killed
LIMIT = 300.0  # seconds for a test
COPIED = (
    "remax",
    "utils",
    "tests",
    "benchmarks",
    "examples",
    "step*",
    "docs",
    "*.md",
    "*.toml",
    "setup.py",
    "Makefile",
    ".ci",
)
PASSED, FAILED, LATE = "passed", "failed", "time limit"


def stale(faults: list[Fault]) -> list[str]:
    """What is wrong with the list: texts that are not found exactly once."""
    texts = {fault.file: (ROOT / fault.file).read_text(encoding="utf-8") for fault in faults}
    counts = [(fault, texts[fault.file].count(fault.old)) for fault in faults]
    return [f"{fault.name}: found {n} times in {fault.file}: {fault.old!r}" for fault, n in counts if n != 1]


# --------------------------------------------------------------------------------------- one process per fault, forked


def warm_up() -> None:
    """Imports the libraries once: a fork has them at no cost. Nothing of the project is imported here."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    import _hypothesis_pytestplugin  # noqa: F401
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import hypothesis.strategies  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    assert not {"remax", "utils"} & sys.modules.keys()
    gc.collect()
    gc.freeze()  # pytest collects often, and a fork would go through all of these objects again


def run_test(test: Test, tree: Path, scratch: Path) -> None:
    """In a process of its own: runs a test in `tree`, and exits with another status than 0 where it fails.

    Of a whole file the tests that start further processes are left out: they are slow, and to be named themselves.
    """
    import datasets
    import pytest

    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with the runner
    log = os.open(scratch / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(tree)
    os.environ |= {"PYTHONPATH": str(tree), "HF_DATASETS_CACHE": str(scratch / "cache")}
    datasets.config.HF_DATASETS_CACHE = scratch / "cache"
    sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry) != HERE)]
    if isinstance(test, str):
        options = ["-x", "-q", "-p", "no:cacheprovider", "--durations=0", "--basetemp", str(scratch / "pytest")]
        options += [] if "::" in test else ["-m", "not ranks"]
        os._exit(int(pytest.main([*options, test])))
    os._exit(compare_case(tree, scratch, *test))


def compare_case(tree: Path, scratch: Path, ranks: int, case: str) -> int:
    """1 where a pinned training ends otherwise than it was recorded."""
    sys.path.insert(0, str(tree / "tests" / "references"))
    import record

    folder = scratch / "references"
    folder.mkdir()
    try:
        record.prepare(folder)
        found = record.run(folder, ranks, case)
    except Exception as error:
        print(f"FAILED {case}: {error}", flush=True)
        return 1
    reference = json.loads(record.FILE.read_text())
    expected = {case: reference["outcomes"][str(ranks)][case]}
    lines = record.differences(found, expected, reference["machine"] == record.machine())
    print("".join(f"FAILED {line}\n" for line in lines[:5]), flush=True)
    return int(bool(lines))


@dataclass
class Job:
    """A test that is running in a copy, and those that follow if it passes."""

    tests: tuple[Test, ...]
    fault: Fault | None
    tree: Path
    scratch: Path
    process: int = 0
    started: float = 0.0
    seconds: float = 0.0  # of the tests before

    def start(self) -> None:
        """Starts the first of the tests."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        sys.stdout.flush()
        self.started, self.process = time.monotonic(), os.fork()
        if self.process == 0:
            try:
                run_test(self.tests[0], self.tree, self.scratch)
            finally:
                os._exit(1)

    def result(self) -> str | None:
        """How they went; None: not over yet."""
        process, status = os.waitpid(self.process, os.WNOHANG)
        late = time.monotonic() - self.started > LIMIT
        if process == 0 and not late:
            return None
        self.kill()
        self.seconds += time.monotonic() - self.started
        if process == 0:
            os.waitpid(self.process, 0)
            return LATE
        if status or len(self.tests) == 1:
            return FAILED if status else PASSED
        self.tests = self.tests[1:]
        self.start()
        return None

    def kill(self) -> None:
        """Ends the test, and the ranks that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process, signal.SIGKILL)

    def reason(self) -> str:
        """What failed, in a few words."""
        lines = (self.scratch / "log.txt").read_text(errors="replace").splitlines()
        told = [line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
        return (told or lines[-1:] or ["nothing said"])[0][:160]


class Workers:
    """Runs tests in so many copies of the repository at a time."""

    def __init__(self, folder: Path, jobs: int):
        self.free = [copy(folder / f"copy{i}") for i in range(jobs)]
        self.folder, self.number = folder, 0
        self.running: list[Job] = []

    def start(self, tests: tuple[Test, ...], fault: Fault | None) -> None:
        tree = self.free.pop()
        if fault is not None:
            file = tree / fault.file
            file.write_text(file.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
        self.number += 1
        self.running.append(Job(tests, fault, tree, self.folder / f"run{self.number}"))
        self.running[-1].start()

    def wait(self) -> tuple[Job, str]:
        """The next job that is over; its copy is as before."""
        while True:
            for job in self.running:
                if (result := job.result()) is not None:
                    self.running.remove(job)
                    if job.fault is not None:
                        shutil.copy(ROOT / job.fault.file, job.tree / job.fault.file)
                    self.free.append(job.tree)
                    return job, result
            time.sleep(0.05)


def copy(tree: Path) -> Path:
    tree.mkdir()
    for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
        else:
            shutil.copy(path, tree / path.name)
    for name in ("remax", "utils"):  # bytecode that is valid by content: files change within a second, at equal length
        compile_dir(tree / name, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return tree


def run_all(workers: Workers, work: list[tuple[tuple[Test, ...], Fault | None]], tell: Any) -> None:
    """All of it, as copies come free."""
    try:
        for tests, fault in work:
            if not workers.free:
                finish(workers, tell)
            workers.start(tests, fault)
        while workers.running:
            finish(workers, tell)
    finally:
        for job in workers.running:
            job.kill()


def finish(workers: Workers, tell: Any) -> None:
    job, result = workers.wait()
    tell(job, result)
    shutil.rmtree(job.scratch, ignore_errors=True)


# -------------------------------------------------------------------------------------------------------------- report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time, each in its own copy")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these faults, or all that begin so")
    parser.add_argument("--trust", action="store_true", help="take it for granted that the tests pass without a fault")
    parser.add_argument("--list", action="store_true", help="name the faults and end")
    args = parser.parse_args()
    faults = [f for f in FAULTS if args.only is None or f.name.startswith(tuple(args.only))]
    if args.list:
        print("\n".join(f"{fault.name:<32} {fault.file}: {fault.breaks}" for fault in faults))
        return 0
    if lines := stale(faults):
        print("stale:\n" + "\n".join(lines))
        return 2
    warm_up()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started, broken, killed, survivors = time.monotonic(), [], 0, []

    def tell_baseline(job: Job, result: str) -> None:
        if result != PASSED:
            broken.append(job.tests)
            print(f"does not pass without a fault ({result}): {job.tests[0]}: {job.reason()}", flush=True)

    def tell_fault(job: Job, result: str) -> None:
        nonlocal killed
        killed += result != PASSED
        if result == PASSED:
            survivors.append(job.fault)
        how = f"SURVIVED: {job.fault.breaks}" if result == PASSED else f"killed by {job.reason()}"
        print(
            f"{job.fault.name:<32} {job.seconds:4.0f} s  {how if result != LATE else 'killed by the time limit'}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        workers = Workers(Path(folder), args.jobs)
        single = [] if args.trust else list(dict.fromkeys(test for fault in faults for test in fault.tests))
        run_all(workers, [((test,), None) for test in single], tell_baseline)
        passing = [f for f in faults if not any((test,) in broken for test in f.tests)]
        print(f"{len(single) - len(broken)} of {len(single)} tests were seen to pass without a fault", flush=True)
        run_all(workers, [(fault.tests, fault) for fault in passing], tell_fault)
    share = killed / max(len(faults), 1)
    print(f"{killed} of {len(faults)} faults killed ({share:.1%}) in {(time.monotonic() - started) / 60:.0f} minutes")
    if survivors:
        print("survivors: " + ", ".join(fault.name for fault in survivors))
    return 2 if broken else int(share < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())
