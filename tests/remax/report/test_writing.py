"""The report in the run's folder, and by the command line; it never costs a run."""

from __future__ import annotations

import sys

import pytest

from remax.report import __main__ as program
from remax.report import writing
from remax.report.stage import report_stage
from utils.run import UserError


def test_a_stage_leaves_both_files(make_run, tmp_path, capsys, monkeypatch):
    folder = make_run(tmp_path / "remax")
    monkeypatch.setenv("RANK", "1")
    report_stage(folder)
    assert not (folder / "report.html").exists()
    monkeypatch.setenv("RANK", "0")
    report_stage(folder)
    assert capsys.readouterr().out == f"report: {folder}/report.html\n"
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert (folder / "report.md").read_text().startswith("# Report: remax")


def test_a_report_that_fails_is_one_warning(make_run, tmp_path, capsys, monkeypatch):
    folder = make_run(tmp_path / "remax")

    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(writing, "write_whole", full)
    report_stage(folder)
    said = capsys.readouterr().out
    assert (
        said.count("\n") == 1 and said.startswith(f"warning: no report of {folder} (OSError: ") and "No space" in said
    )
    (folder / "run.json").write_text("{}")
    report_stage(folder)
    assert "names no start and arguments" in capsys.readouterr().out


def main(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    program.main()


def test_from_the_command_line(make_run, tmp_path, capsys, monkeypatch):
    folders = [make_run(tmp_path / "runs" / name) for name in ("remax", "rloo")]
    main(monkeypatch, folders[0])
    assert capsys.readouterr().out.split() == [f"{folders[0]}/report.html", f"{folders[0]}/report.md"]
    main(monkeypatch, *folders)
    assert capsys.readouterr().out.split() == [f"{tmp_path}/runs/report.{kind}" for kind in ("html", "md")]
    main(monkeypatch, *folders, "--output", tmp_path / "new" / "both.html")
    assert (tmp_path / "new" / "both.md").is_file()


def test_bad_input_is_one_line(make_run, tmp_path, monkeypatch, run_command):
    folder = make_run(tmp_path / "remax")
    with pytest.raises(UserError, match="--output out.txt: expected the name of an HTML file"):
        main(monkeypatch, folder, "--output", "out.txt")
    with pytest.raises(UserError, match="--output .*run.json/x.html: cannot be written"):
        main(monkeypatch, folder, "--output", folder / "run.json" / "x.html")
    code = "import sys; sys.modules['torch'] = None; from remax.report.__main__ import main, run_main; run_main(main)"
    ended = run_command([sys.executable, "-c", code, tmp_path])  # without torch, which would take a second
    assert ended.returncode == 2 and ended.stdout.startswith(f"error: {tmp_path}: has no run.json; expected the")
    assert ended.stdout.count("\n") == 1
    assert run_command([sys.executable, "-c", code, folder]).stdout.endswith("report.md\n")
