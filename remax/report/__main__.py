"""A page about a run, or about several side by side.

    python -m remax.report RUN... [--output report.html]

reads what the runs have left in their folders, also where they were killed or go on still, and writes one HTML file
that needs no network, and a Markdown file of the same name beside it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from remax.cli.entry import run_main
from utils.run import UserError


def main() -> None:
    """Writes both files and names them."""
    args = parse()
    from remax.report.runs import read_runs
    from remax.report.writing import NAME, write_report

    runs = read_runs(args.runs)
    folders = [str(run.folder) for run in runs]
    path = Path(args.output) if args.output else Path(os.path.commonpath(folders), NAME)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        print("\n".join(map(str, write_report(runs, path))))
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error})") from error


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m remax.report", description="A page about one or several runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the --output_dir of a run")
    parser.add_argument(
        "--output",
        help="the HTML file to write; a Markdown file goes beside it (default: report.html in the run's folder, or of "
        "several runs in the folder that holds them all)",
    )
    args = parser.parse_args(argv)
    if args.output and not args.output.endswith((".html", ".htm")):
        raise UserError(f"--output {args.output}: expected the name of an HTML file, such as report.html")
    return args


if __name__ == "__main__":
    run_main(main)
