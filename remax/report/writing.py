"""Writes the report: a page, and its Markdown twin beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from remax.report.markdown import markdown
from remax.report.page import page
from remax.report.runs import Run
from utils.files import write_whole

NAME = "report.html"


def write_report(runs: Sequence[Run], path: Path) -> tuple[Path, Path]:
    """Both files, of which the second has the name of the first, `path`, but for its end."""
    text, twin = markdown(runs), path.with_suffix(".md")
    for file, content in ((path, page(runs, text)), (twin, text)):
        write_whole(file, content)
    return path, twin
