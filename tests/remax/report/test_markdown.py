"""The twin in Markdown: short, whole, and broken by no text."""

from __future__ import annotations

import re

from remax.report.markdown import LONGEST, markdown, plain, table
from remax.report.runs import read_runs
from tests.remax.report.conftest import EVIL


def test_a_run(make_run, tmp_path):
    text = markdown(read_runs([make_run(tmp_path / "remax")]))
    assert text.startswith("# Report: remax\n\n**Went well.** Reward on held-out rows: 1 → 2.5, 3.0 standard errors")
    assert "| reward | 1 | 2.5 | 2.5 |" in text and "| held-out figure | start | best (step 30) | end |" in text
    (reward,) = (line for line in text.splitlines() if line.startswith("reward  "))
    assert reward.endswith("1.05 → 1.5") and "█" in reward and reward.count("▁") >= 1
    answers = [line for line in text.splitlines() if "question" in line]
    assert len(answers) == 3 and "step0 says figs" in answers[0] and "step30 says figs" in answers[0]
    assert not re.search(r"(?<!\\)<", text) and "time: generation 15 s" in text


def test_several_runs_tell_what_differs(make_run, tmp_path):
    text = markdown(read_runs([make_run(tmp_path / "remax"), make_run(tmp_path / "rloo", algo="rloo")]))
    assert "## remax" in text and "## rloo" in text and "| algo | null | rloo |" in text


def test_a_text_stays_in_its_cell():
    assert plain(EVIL).count("|") == plain(EVIL).count("\\|") == 1
    assert "\\<" in plain(EVIL) and "\u2028" not in plain(EVIL) and plain(" \n") == "–"
    assert table([["a"]]) == "" and table([["a|b", "c"], ["d\ne", ""]]) == "| a\\|b | c |\n|---|---|\n| d e | – |"


def test_long_answers_are_cut(make_run, tmp_path):
    folder = make_run(tmp_path / "remax")
    for file in (folder / "close_ups").iterdir():
        file.write_text(file.read_text().replace(" figs", "x" * 1000))
    longest = max(map(len, markdown(read_runs([folder])).splitlines()))
    assert longest < 3 * LONGEST
