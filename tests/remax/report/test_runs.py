"""A run is read as it lies there: finished, killed in a line, stopped; and what is no run is named."""

from __future__ import annotations

import json

import pytest

from remax.report.runs import moving_average, read_run, read_runs
from utils.run import UserError


def test_a_finished_run(make_run, tmp_path):
    run = read_run(make_run(tmp_path / "remax"))
    assert (run.name, run.stage, run.state, run.last_step, run.seconds) == ("remax", "step3", "finished", 30, 40.0)
    assert run.series("train/baseline")[1] == [1.0] * 30
    assert list(run.evaluations) == [0, 10, 20, 30] and run.evaluations[10]["reward"] == 1.5
    assert run.headline == ("reward", 1) and run.best_step == 30
    assert list(run.answered("close_ups")) == [0, 10, 20, 30] and run.answered("answers") == {}
    assert len(run.answers("close_ups", 10)) == 3 and len(run.answers("close_ups", 10, most=2)) == 2
    assert run.answers("answers", 10) == []


def test_a_lower_perplexity_is_better_and_of_equals_the_first_is_the_best(make_run, tmp_path):
    folder = make_run(tmp_path / "sft")
    rows = [{"step": step, "time": 0.0, "eval/perplexity": value} for step, value in [(0, 9.0), (5, 2.0), (9, 2.0)]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps(json.loads((folder / "run.json").read_text()) | {"stage": "step1"}))
    assert read_run(folder).headline == ("perplexity", -1) and read_run(folder).best_step == 5


def test_a_run_that_was_killed(make_run, tmp_path):
    folder = make_run(tmp_path / "remax")
    (folder / "results.json").unlink()
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: text.index('"step": 15') + 30])  # within a line
    torn = folder / "close_ups" / "step_000010.jsonl"
    torn.write_text(torn.read_text()[:-20])
    run = read_run(folder)
    assert (run.state, run.last_step, run.stopped) == ("unfinished", 14, None)
    assert len(run.answers("close_ups", 10)) == 2
    (folder / "remarks.jsonl").write_text('{"step": 14, "kind": "stopped", "text": "lost"}\n{"step"')
    assert read_run(folder).state == "stopped" and read_run(folder).stopped == "lost"
    (folder / "metrics.jsonl").write_text("")
    assert read_run(folder).last_step == 0 and read_run(folder).best_step == 0 and read_run(folder).seconds == 0


def test_runs_are_named_by_what_tells_them_apart(make_run, tmp_path):
    folders = [make_run(tmp_path / place) for place in ("a/remax", "b/remax", "b/rloo")]
    assert [run.name for run in read_runs(folders[1:])] == ["remax", "rloo"]
    assert [run.name for run in read_runs([*folders, folders[0] / ".." / "remax"])] == ["a/remax", "b/remax", "b/rloo"]


def test_what_is_no_run_is_named(make_run, tmp_path):
    folder = make_run(tmp_path / "demo" / "remax")
    bad = {
        tmp_path / "none": "none: no such folder; expected the --output_dir of a run",
        tmp_path / "demo": rf"demo: has no run.json; .*; there are runs in {folder}",
    }
    for path, message in bad.items():
        with pytest.raises(UserError, match=message):
            read_run(path)
    for file, text, message in [
        ("run.json", "[1]", "run.json: is a list; expected a json object"),
        ("run.json", "{", "run.json: cannot be read"),
        ("run.json", '{"stage": "step3"}', "run.json: names no start and arguments"),
        ("metrics.jsonl", None, "has no metrics.jsonl"),
    ]:
        other = make_run(tmp_path / message[:14].replace(" ", "_").replace(":", str(len(text or ""))))
        (other / file).unlink()
        if text:
            (other / file).write_text(text)
        with pytest.raises(UserError, match=message):
            read_run(other)


def test_moving_average_is_over_the_last_values():
    assert moving_average([1.0, 2.0, 6.0, 4.0], 3) == [1.0, 1.5, 3.0, 4.0]
    assert moving_average([1.0, 2.0], 1) == [1.0, 2.0]
