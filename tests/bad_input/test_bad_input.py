"""Bad input of every kind: each ends in one line that names it, and leaves everything as it was.

BAD_INPUT=all tries every case of the tables; by default half of those about data and models.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Template
from typing import Any

import pytest

from tests.bad_input import data, environment, flags, models, texts
from tests.bad_input.kit import PROGRAMS, SOUND, Case, lay_out, pairs

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 20.0  # after which a program hangs
CASES = [case for table in (flags, environment, texts, data, models) for case in table.CASES]
COSTLY = [*data.CASES, *models.CASES]
TRIED = CASES if os.environ.get("BAD_INPUT") == "all" else [case for case in CASES if case not in COSTLY[1::2]]


@pytest.fixture(scope="module")
def run_job(tmp_path_factory) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """run_job(job) -> the zygote's answer."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path_factory.mktemp("hub"))}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # Python's cache beside a user's file is no trace of ours
    command = [sys.executable, str(ROOT / "tests/bad_input/zygote.py")]
    zygote = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert zygote.stdin is not None and zygote.stdout is not None
    assert json.loads(zygote.stdout.readline()) == "ready"

    def run(job: dict[str, Any]) -> dict[str, Any]:
        zygote.stdin.write(json.dumps(job) + "\n")
        zygote.stdin.flush()
        return json.loads(zygote.stdout.readline())

    yield run
    zygote.stdin.close()
    zygote.wait(timeout=60)


@pytest.fixture(scope="module")
def sound(tiny_model, tiny_reward_model) -> dict[str, str]:
    """Files that nothing is wrong with."""
    folders = {"POLICY": tiny_model("llama"), "SCORER": tiny_reward_model("llama"), "DATA": ROOT / "tests/data"}
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture
def run_case(run_job, sound, tmp_path):
    """run_case(case) -> (status, stdout, stderr), what the folder held before and holds now."""

    def run(case: Case) -> tuple[int | None, str, str, dict, dict]:
        folder, console = tmp_path / "here", tmp_path / "console"
        folder.mkdir()
        console.mkdir()
        lay_out({"pairs.jsonl": pairs(40), **case.files}, folder, sound)
        line = (
            case.flags if case.alone else f"{SOUND[case.program]} --data_output_path {tmp_path / 'cache'} {case.flags}"
        )
        before = contents(folder)
        job = {
            "program": str(ROOT / PROGRAMS[case.program]),
            "argv": shlex.split(Template(line).safe_substitute(sound)),
            "folder": str(folder),
            "environment": dict(case.environment),
            "seconds": SECONDS,
            "stdout": str(console / "out"),
            "stderr": str(console / "err"),
        }
        status = run_job(job)["status"]
        printed = [(console / name).read_text(errors="replace") for name in ("out", "err")]
        after = contents(folder)
        shutil.rmtree(tmp_path, ignore_errors=True)
        return status, *printed, before, after

    return run


def contents(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder below, with what tells that it was touched."""
    paths = [Path(top) / name for top, folders, files in os.walk(folder) for name in folders + files]
    states = {path.relative_to(folder).as_posix(): path.lstat() for path in paths}
    return {name: (state.st_mode, state.st_size, state.st_mtime_ns) for name, state in states.items()}


def matches(expected: str, err: str) -> bool:
    """Whether stderr is one line of error with the expected parts."""
    pattern = ".*".join(re.escape(part) for part in expected.split(" ... "))
    return re.fullmatch(rf"error: .*{pattern}.*\n", err) is not None


@pytest.mark.parametrize("case", TRIED, ids=lambda case: case.name)
def test_bad_input_ends_in_one_line(run_case, case):
    status, out, err, before, after = run_case(case)
    shown = f"status {status}\n{out}\n{err}"
    assert status == case.status, shown
    assert "Traceback" not in out + err, shown
    assert matches(case.line, err), shown
    assert after == before, shown


@pytest.mark.parametrize("program", PROGRAMS)
def test_sound_input_is_taken(run_case, program):
    status, out, err, _, _ = run_case(Case(program, program, "", ""))
    assert status == 0, f"{out}\n{err}"


def test_names_of_cases_are_distinct():
    assert len({case.name for case in CASES}) == len(CASES) > 400
