"""A process that has imported everything once and forks a child for each program that it is asked to run.

    python tests/bad_input/zygote.py

Reads a job a line from stdin, as JSON, and answers each with a line of JSON on stdout. A job is {"program": file,
"argv": its flags, "folder": where it runs, "environment": {name: value}, "seconds": its time limit, "stdout" and
"stderr": files for what it prints}. The answer is {"status": exit status, negative for a signal, null where the time
ran out; "cpu_seconds": what it took}.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from typing import Any, NoReturn

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def import_everything() -> None:
    """What the programs import, and what the libraries import when they load a tiny model."""
    import deepspeed  # noqa: F401
    import pandas  # noqa: F401
    import torch
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401
    import yaml  # noqa: F401

    import remax.stages.doctor
    import remax.stages.finetune
    import remax.stages.prompt_eval
    import remax.stages.reward_eval
    import remax.stages.rlhf  # noqa: F401

    torch.set_num_threads(1)


def run_program(job: dict[str, Any]) -> NoReturn:
    """In the child: the program as the command line would start it."""
    status = 70  # of the harness itself
    try:
        os.setsid()
        for descriptor, file in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
            opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, descriptor)
            os.close(opened)
        os.chdir(job["folder"])
        for name in LAUNCHER:
            os.environ.pop(name, None)
        os.environ.update(job["environment"])
        sys.argv = [job["program"], *job["argv"]]
        try:
            runpy.run_path(job["program"], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def wait(child: int, seconds: float) -> tuple[int | None, float]:
    """The child's exit status and CPU time; no status after it was killed, as its time had run out."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    _, _, used = os.wait4(child, 0)
    return None, used.ru_utime + used.ru_stime


def main() -> None:
    import_everything()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            run_program(job)
        status, used = wait(child, job["seconds"])
        print(json.dumps({"status": status, "cpu_seconds": used}), flush=True)
    os._exit(0)  # without the seconds in which the libraries clear up


if __name__ == "__main__":
    main()
