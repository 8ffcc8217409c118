"""Programs as forks of one process that has imported everything: a start takes a tenth of a second, not eight seconds.

They are processes of their own, each in a session of its own, with its own variables, folder and log. The process that
forks starts at the first of them, and ends with the one that asked for it. The memory that all share is out of the
garbage collector's sight: DeepSpeed collects for each engine, which would take a third of a second each time.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from unittest.mock import patch

from utils.distributed import LAUNCHER_VARIABLES, free_port

ROOT = Path(__file__).resolve().parents[1]
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # a process that has used a GPU could not be forked


@cache
def context() -> ForkServerContext:
    """What forks."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.preloaded"])
    early = {**ON_CPU, "HF_HOME": hub().name}  # an empty one: no test is to depend on what this machine has downloaded
    early["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with patch.dict(os.environ, early):
        forkserver.ensure_running()
    return found


@cache
def hub() -> tempfile.TemporaryDirectory:
    """Removed at the end of this process."""
    return tempfile.TemporaryDirectory()


def inherited() -> dict[str, str]:
    """This process's variables, without those that a launcher of an outer run may have left behind."""
    return {name: value for name, value in os.environ.items() if name not in (*LAUNCHER_VARIABLES, "LOCAL_SIZE")}


def start(
    program: str | Path,
    arguments: list[object],
    *,
    folder: Path,
    out: Path,
    err: Path | None = None,
    environment: Mapping[str, object] | None = None,
) -> ForkServerProcess:
    """A program as `python program arguments` would start it in `folder` on a machine without GPUs.

    Args:
        out: Where it prints; stderr too, unless `err` is another file.
        environment: Variables beside those of this process.
    """
    variables = inherited() | ON_CPU | {name: str(value) for name, value in (environment or {}).items()}
    told = (str(program), [str(word) for word in arguments], folder, variables, out, err or out)
    process = context().Process(target=_run, args=told)
    process.start()
    return process


def _run(program: str, arguments: list[str], folder: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    """In the fork."""
    import datasets

    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    # What is read where Python or a library starts.
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    datasets.config.HF_DATASETS_CACHE = environment.get("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE)
    for descriptor, file in ((1, out), (2, err)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(folder)
    sys.argv = [program, *arguments]
    sys.path.insert(0, str(Path(program).parent))
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def wait(process: ForkServerProcess, timeout: float) -> int | None:
    """The exit status, negative for a signal; None: it has taken longer, and was killed."""
    process.join(timeout)
    status = process.exitcode
    kill(process)
    return status


def kill(*processes: ForkServerProcess) -> None:
    """SIGKILL to those that still run, and to what they have started."""
    for process in processes:
        if process.exitcode is None:
            with suppress(ProcessLookupError):  # it has no session of its own yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
    for process in processes:
        process.join()


def run_ranks(
    program: str | Path,
    arguments: list[object],
    *,
    folder: Path,
    logs: list[Path],
    timeout: float,
    environment: Mapping[str, object] | None = None,
) -> None:
    """Runs as many ranks of a program as there are logs, to their end.

    Raises:
        RuntimeError: One has failed, or they take too long; with the ends of all logs.
    """
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": len(logs), **(environment or {})}
    own = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(len(logs))]
    ranks = [
        start(program, arguments, folder=folder, out=log, environment=variables)
        for log, variables in zip(logs, own, strict=True)
    ]
    until = time.monotonic() + timeout
    try:
        while any(codes := [rank.exitcode for rank in ranks]) or None in codes:
            if any(codes) or time.monotonic() > until:  # the others would wait for the one that failed
                tails = [f"--- rank {i}, status {c}\n{logs[i].read_text()[-4000:]}" for i, c in enumerate(codes)]
                raise RuntimeError("\n".join([f"exit status {codes}; limit {timeout:.0f} s", *tails]))
            time.sleep(0.02)
    finally:
        kill(*ranks)
