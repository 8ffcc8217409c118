"""Several programs of the stages, one after the other in the same ranks: starting them is what costs.

    deepspeed --num_gpus 2 tests/mains.py JOBS.json

A job is {"program": main.py, "flags": [...], "folder": where it runs, "log": file for what rank 0 prints}. Each job's
exit status goes into "status" beside it, in JOBS.json.done.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

from utils.environment import hide_gpus


def run_program(program: str | Path, flags: list[str], folder: str | Path, log: str | Path | None = None) -> int:
    """Runs a stage's `main` in this process, which stays in its process group; the exit status."""
    dist.destroy_process_group = lambda *args: None  # a stage leaves its group at its end; the next one needs it
    sys.argv = [str(program), *flags]
    here = os.getcwd()
    os.chdir(folder)
    with open(log or os.devnull, "w") as output, contextlib.redirect_stdout(output):
        try:
            runpy.run_path(str(program), run_name="stage")["main"]()
            return 0
        except SystemExit as end:
            return int(end.code or 0)
        except Exception:
            traceback.print_exc(file=output)
            raise
        finally:
            os.chdir(here)
            gc.collect()


def main() -> None:
    hide_gpus()  # as `run_main` does it
    # The launcher adds --local_rank, as it does for main.py itself.
    jobs_file, of_launcher = Path(sys.argv[-1]), sys.argv[1:-1]
    jobs = json.loads(jobs_file.read_text())
    for job in jobs:
        log = job["log"] if os.environ["RANK"] == "0" else None
        try:
            job["status"] = run_program(job["program"], [*of_launcher, *job["flags"]], job["folder"], log)
        except Exception:  # its traceback is in the log
            if os.environ["WORLD_SIZE"] != "1":
                raise  # the other ranks may be waiting in a collective
            job["status"] = 1
        if os.environ["RANK"] == "0":
            jobs_file.with_suffix(".done").write_text(json.dumps(jobs))


if __name__ == "__main__":
    main()
