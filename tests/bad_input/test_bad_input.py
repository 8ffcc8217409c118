"""Bad input of every kind: each ends in one line that names it, and leaves everything as it was.

BAD_INPUT=all tries every case of the tables; by default half of those about data and models.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path
from string import Template

import pytest

from tests import zygote
from tests.bad_input import data, environment, flags, models, texts
from tests.bad_input.kit import PROGRAMS, SOUND, Case, lay_out, pairs

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 20.0  # after which a program hangs
CASES = [case for table in (flags, environment, texts, data, models) for case in table.CASES]
COSTLY = [*data.CASES, *models.CASES]
TRIED = CASES if os.environ.get("BAD_INPUT") == "all" else [case for case in CASES if case not in COSTLY[1::2]]


@pytest.fixture(scope="module")
def sound(tiny_model, tiny_reward_model) -> dict[str, str]:
    """Files that nothing is wrong with."""
    folders = {"POLICY": tiny_model("llama"), "SCORER": tiny_reward_model("llama"), "DATA": ROOT / "tests/data"}
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture
def run_case(sound, tmp_path):
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
        # Python's cache beside a user's file is no trace of ours.
        environment = {"PYTHONDONTWRITEBYTECODE": 1, **case.environment}
        files = {"out": console / "out", "err": console / "err"}
        words = shlex.split(Template(line).safe_substitute(sound))
        program = zygote.start(ROOT / PROGRAMS[case.program], words, folder=folder, environment=environment, **files)
        status = zygote.wait(program, SECONDS)
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
