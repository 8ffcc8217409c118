"""A Slurm job that is queued again where its training has saved its state; scontrol and the training are stand-ins."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAVED = "stopped by {} after step 7: its state is in out/checkpoints/step_000007, and --resume auto goes on from there"
# It says what it was given and what it is told, and ends as it is told to.
TRAINING = """
trap 'echo "$SAYS"; exit 138' USR1
trap 'echo "$SAYS"; exit 143' TERM
echo "flags: $*"
if [[ $1 == --wait ]]; then while sleep 0.05; do :; done; fi
echo "$SAYS"
exit "$1"
"""


@pytest.fixture
def submit(tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """submit(first flag, what the training says when it ends): the job, as sbatch would start it."""
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n')
    scontrol.chmod(0o755)
    (tmp_path / "training.sh").write_text(TRAINING)

    def submit(flag: object, says: str) -> subprocess.Popen[str]:
        environment = os.environ | {"SLURM_JOB_ID": "17", "SAYS": says}
        environment["PATH"] = os.pathsep.join([str(scontrol.parent), os.environ["PATH"]])
        command = [str(ROOT / "utils/slurm.sh"), "bash", str(tmp_path / "training.sh"), str(flag)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes)

    return submit


# What ends it, the training's last words, the job's exit status, and whether it is queued again.
CASES = [
    ("SIGUSR1", SAVED.format("SIGUSR1"), 138, True),  # the time limit is near
    ("SIGUSR1", "error: stopped by SIGUSR1, which was sent to this script", 138, False),  # while models were loaded
    ("SIGTERM", SAVED.format("SIGTERM"), 143, False),  # cancelled
    (75, SAVED.format("--max_hours"), 75, True),
    (75, "stopped by --max_hours after step 7: no state could be saved", 75, False),
    (0, "model written to out", 0, False),
    (2, "error: --data_path: no such file", 2, False),
    (137, "error: rank 1 was killed by signal 9", 137, False),
]


@pytest.mark.parametrize(("end", "says", "status", "again"), CASES)
def test_a_job_is_queued_again_where_its_state_is_saved(submit, tmp_path, end, says, status, again):
    flag = "--wait" if isinstance(end, str) else end
    job = submit(flag, says)
    assert job.stdout.readline() == f"flags: {flag} --resume auto\n"
    if isinstance(end, str):
        job.send_signal(signal.Signals[end])
    output = job.stdout.read()
    assert job.wait(30) == status
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 17\n" if again else "")
    words = {True: "job 17 is queued again\n", False: "" if status not in (75, 138) else "error: job 17 is not queued"}
    assert output.startswith(says + "\n" + words[again]) and output.count("queued") == bool(words[again])


def test_the_words_it_goes_by_are_those_of_the_loop():
    words = "--resume auto goes on from there"
    assert words in (ROOT / "utils/slurm.sh").read_text() and words in (ROOT / "remax/training/loop.py").read_text()
