"""The page's data without a browser: complete, cut to size, and harmless whatever a model wrote."""

from __future__ import annotations

import json
import re

import pytest

from remax.report import page as module
from remax.report.page import chosen, data_of, embedded, page
from remax.report.runs import read_runs
from tests.remax.report.conftest import EVIL, close_up


@pytest.fixture
def runs(make_run, tmp_path):
    folder = make_run(tmp_path / "remax")
    (folder / "remarks.jsonl").write_text(json.dumps({"step": 7, "kind": "KL", "text": EVIL}) + "\n")
    return read_runs([folder, make_run(tmp_path / "rloo", algo="rloo", kl_ctl=0.3)])


def test_nothing_in_a_text_ends_the_data(runs):
    text = page(runs, f"# {EVIL}")
    assert text.count("</script") == 2 and text.count("<script") == 2 and "<b>" not in text and "<!--" not in text
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    data = json.loads(block)
    assert data == json.loads(embedded(data_of(runs)))
    assert data["runs"][0]["remarks"] == [{"step": 7, "kind": "KL", "text": EVIL}]
    assert any(EVIL in row["answer"] for row in data["rows"])
    assert "{{" not in text.replace(block, "") and "http://www.w3.org" in text
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)  # nothing that a network would be asked for
    assert embedded({"a": "\ud800"}) == '{"a":"?"}'


def test_what_a_template_calls_a_place_is_text_in_an_answer(runs):
    assert page(runs, "{{data}} {{style}}").count("{{data}} {{style}}") == 1


def test_answers_go_with_their_numbers(runs):
    data = data_of(runs)
    assert len(data["rows"]) == 2 * 4 * 3 and data["prompts"] == [close_up(0, i)["prompt"] for i in range(3)]
    (row,) = (row for row in data["rows"] if (row["run"], row["step"], row["prompt"]) == (1, 10, 2))
    wanted = close_up(10, 2)
    assert row["answer"] == wanted["answer"] and row["greedy"] == "The greedy one." and row["greedy_reward"] == 0.5
    assert (row["reward"], row["length"], row["reward/rules"]) == (3.0, 6, -1.0)
    assert row["kl"] == pytest.approx(sum(wanted["kl"])) == 5.0
    assert row["tokens"] == wanted["tokens"] and row["token_advantage"] == wanted["advantage"]


def test_answers_to_one_prompt_keep_their_places_and_close_ups_come_once(make_run, tmp_path):
    folder = make_run(tmp_path / "remax")
    (folder / "answers").mkdir()
    rows = [{key: close_up(30, i)[key] for key in ("prompt", "answer", "length", "reward")} for i in (0, 1, 2)]
    rows += [rows[0] | {"answer": "another", "reward": float("nan")}]
    (folder / "answers" / "step_000030.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [row for row in data_of(read_runs([folder]))["rows"] if row["step"] == 30]
    assert [(row["prompt"], row["place"]) for row in found] == [(0, 0), (1, 0), (2, 0), (0, 1)]
    assert "reward" not in found[3] and "tokens" not in found[3]


def test_the_size_is_bounded(runs, monkeypatch):
    monkeypatch.setattr(module, "BUDGET", 2_000)
    rows = data_of(runs)["rows"]
    for i in (0, 1):
        mine = [row for row in rows if row["run"] == i]
        assert sum(len(row["answer"]) + len(row["greedy"]) for row in mine) < 1_000
        assert sum(len(json.dumps(row["tokens"])) for row in mine if "tokens" in row) < 1_000
        assert 30 in {row["step"] for row in mine}  # the last evaluation's first of all
        assert {"tokens" in row for row in mine if row["step"] == 30} >= {True}
    monkeypatch.setattr(module, "POINTS", 8)
    curve = data_of(runs)["runs"][0]["train"]
    # 30 steps in buckets of 4: the last one holds two; reward step / 20 + (1 at odd steps)
    assert curve["steps"] == [4, 8, 12, 16, 20, 24, 28, 30] and curve["averaged"] == 4
    assert curve["series"]["reward"][0] == pytest.approx((1 + 2 + 3 + 4) / 20 / 4 + 0.5)
    assert curve["minutes"][-1] == pytest.approx(30 / 60)


def test_the_evaluations_that_are_shown():
    assert chosen([], 0) == [] and chosen([5], 0) == [5]
    assert set(chosen(list(range(0, 100, 10)), 40)) == set(range(0, 100, 10))
    many = chosen(list(range(1000)), 333)
    assert many[:3] == [999, 0, 333] and len(many) == module.EVALUATIONS
    assert chosen([0, 10], 7)[:2] == [10, 0]


def test_differences_and_starts(make_run, tmp_path):
    folders = [make_run(tmp_path / "remax"), make_run(tmp_path / "rloo", algo="rloo")]
    run = json.loads((folders[1] / "run.json").read_text())
    run |= {"git_commit": "def", "versions": {"torch": "2.10"}, "resumed_after": 20}
    run["starts"] = [{"command": "c", "started": run["started"], "resumed_after": 10}]
    (folders[1] / "run.json").write_text(json.dumps(run))
    data = data_of(read_runs(folders))
    assert data["differences"] == [
        ["output_dir", *map(str, folders)],
        ["commit", "abc", "def"],
        ["version of torch", "2.9", "2.10"],
        ["algo", "null", "rloo"],
    ]
    assert [found["resumed"] for found in data["runs"]] == [[], [10, 20]]


def test_the_calibration_of_step_3_is_its_reward_models(make_run, tmp_path):
    reward = make_run(tmp_path / "reward", "step2")
    names = [str(tmp_path / "elsewhere"), f"{reward}:0.5"]
    run = make_run(tmp_path / "remax", reward_model_name_or_path=names)
    found = [run["calibration"] for run in data_of(read_runs([run, reward]))["runs"]]
    assert found[0] == found[1] and [row["pairs"] for row in found[0]] == [10, 30]


def test_a_run_without_a_step_has_a_page(make_run, tmp_path):
    folder = make_run(tmp_path / "remax")
    (folder / "metrics.jsonl").write_text("")
    (folder / "results.json").unlink()
    assert "Report: remax" in page(read_runs([folder]), "")
