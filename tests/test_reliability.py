"""Trainings that are killed with SIGKILL at random moments go on, and end as if nothing had been, bit for bit."""

import os
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).resolve().parent / "references" / "kills.py"


def table(run_command, report: Path, *flags: str) -> list[list[str]]:
    """The cells of the lines of the report, one for each kill."""
    done = run_command([sys.executable, KILLS, "--report", report, *flags], timeout=3000)
    assert done.returncode == 0, done.stdout
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in report.read_text().splitlines()[2:]]


@pytest.mark.ranks
def test_four_kills_change_nothing(run_command, tmp_path):
    # Step 3 on one rank with all that moves; step 1 at ZeRO-3 with adapters and a stream on two.
    rows = table(run_command, tmp_path / "kills.md", "--kills", "4", "--courses", "0", "9", "--seed", "2")
    assert len(rows) == 4 and len({training for training, *_ in rows}) == 2
    assert [end for *_, end in rows] == ["bitwise equal"] * 4
    assert any(found.startswith("step ") for _, _, found, _ in rows)  # not all of them had to begin anew


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.compiled
def test_forty_kills_change_nothing(run_command, tmp_path):
    # A report stays where KILL_REPORT says; other moments with another KILL_SEED.
    report = Path(os.environ.get("KILL_REPORT", tmp_path / "kills.md"))
    rows = table(run_command, report, "--kills", "40", "--seed", os.environ.get("KILL_SEED", "0"))
    assert [end for *_, end in rows] == ["bitwise equal"] * 40
    assert len({training for training, *_ in rows}) == 12
    assert sum(found.startswith("step ") for _, _, found, _ in rows) >= 10
