"""The report at the end of a stage."""

from __future__ import annotations

from pathlib import Path

from remax.report.runs import read_runs
from remax.report.writing import NAME, write_report
from utils.distributed import is_main, print0
from utils.metrics import warn
from utils.run import one_line


def report_stage(folder: str | Path) -> None:
    """The report of the run that has just ended, on rank 0; whatever is wrong with it costs one warning and no run."""
    if not is_main():
        return
    try:
        path, _ = write_report(read_runs([folder]), Path(folder) / NAME)
        print0(f"report: {path}")
    except Exception as error:
        warn(f"warning: no report of {folder} ({type(error).__name__}: {one_line(error)}); the run itself is whole")
