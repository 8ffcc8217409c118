"""What a run comes to, by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from remax.report.runs import read_run
from remax.report.verdict import calibration_error, clock, facts, judge, number, time_split


@pytest.fixture
def run(make_run, tmp_path):
    return read_run(make_run(tmp_path / "remax"))


def test_a_gain_is_counted_in_standard_errors(run):
    # (2.5 - 1) / sqrt(0.3^2 + 0.4^2) = 3.0; length 10 -> 16, perplexity 2 -> 2.3
    verdict = judge(run)
    assert verdict.level == "good" and verdict.sentences == [
        "Reward on held-out rows: 1 → 2.5, 3.0 standard errors of the difference.",
        "Answers are 60% longer at the end (10 → 16 tokens).",
        "KL to the reference at the end: 3 nats per answer.",
        "Perplexity of the data's own answers: 2 → 2.3.",
    ]


def test_what_is_not_clear_is_said(run):
    records = [row for row in run.records if row["step"] <= 20]  # (2 - 1) / 0.5 = 2
    verdict = judge(replace(run, records=records))
    assert verdict.level == "unclear" and "2.0 standard errors" in verdict.sentences[0]
    assert judge(replace(run, records=[row for row in run.records if row["step"] < 10])).level != "good"
    remarked = replace(
        run, remarks=[{"step": 7, "kind": "KL", "text": "far"}, {"step": 9, "kind": "KL", "text": "far"}]
    )
    assert judge(remarked).level == "unclear"
    assert judge(remarked).sentences[-1] == "The sentinel remarked on: KL (first at step 7)."
    unfinished = judge(replace(run, results={}))
    assert unfinished.level == "unclear" and unfinished.sentences[0] == "Not at its end: the last record is of step 30."
    stopped = judge(replace(run, results={}, remarks=[{"step": 30, "kind": "stopped", "text": "KL 9."}]))
    assert stopped.level == "bad" and stopped.sentences[0] == "Stopped at step 30. KL 9."
    assert judge(replace(run, records=[])).sentences == ["There are not two evaluations to compare."]


def test_a_run_that_only_lost_did_not_go_well(run):
    records = [row | ({"eval/reward": 1 - row["step"]} if "eval/reward" in row else {}) for row in run.records]
    verdict = judge(replace(run, records=records))
    assert verdict.level == "bad" and "No evaluation was better than the start." in verdict.sentences


def test_a_lower_perplexity_is_better(run):
    rows = [{"step": step, "time": 0.0, "eval/perplexity": value} for step, value in [(0, 9.0), (5, 2.0), (9, 2.5)]]
    verdict = judge(replace(run, records=rows, description=run.description | {"stage": "step1"}))
    assert verdict.level == "good"
    assert verdict.sentences == ["Perplexity on held-out rows: 9 → 2 at its best, step 5 of 9."]


def test_a_reward_model(make_run, tmp_path):
    run = read_run(make_run(tmp_path / "reward", "step2"))
    # (10 * |0.6 - 0.7| + 30 * |0.9 - 0.8|) / 40
    assert calibration_error(run.calibration) == pytest.approx(0.1)
    assert judge(run).sentences == [
        "Accuracy on held-out rows: 0.5 → 0.8.",
        "Choosing the longer answer would rank 60.0% of the pairs right.",
        "Calibration error: 10.0% of certainty.",
    ]


def test_time_is_split(run):
    # 30 steps of 0.5 + 0.25 + 0.25 s; 61 s in all
    rest = "evaluation and start"
    assert time_split(run) == {"generation": 15.0, "scoring": 7.5, "update": 7.5, rest: 31.0}
    more = {"train/seconds_checkpoint": 2.0, "train/seconds_data": 0.1}
    slow = [row | (more if row["step"] == 5 and "train/kl" in row else {}) for row in run.records]
    of_slow = {"waiting for data": 0.1, "checkpoints": 2.0, rest: 28.9}
    assert time_split(replace(run, records=slow)) == time_split(run) | of_slow
    told = facts(run)
    assert (told["time"], told["device"], told["parameters"]) == ("1 min 01 s", "cpu × 2", "1,000")


def test_numbers_for_people():
    assert [number(x) for x in (0.01234, 12.345, 12345.6)] == ["0.0123", "12.3", "1.235e+04"]
    assert [clock(x) for x in (9.4, 61, 3720)] == ["9 s", "1 min 01 s", "1 h 02 min"]


def test_json_of_other_numbers_is_no_obstacle(make_run, tmp_path):
    folder = make_run(tmp_path / "remax")
    with (folder / "metrics.jsonl").open("a") as file:  # a figure that was not finite is null
        file.write(json.dumps({"step": 31, "time": 1772359241.0, "eval/reward": None, "train/kl": None}) + "\n")
    assert judge(read_run(folder)).level in ("good", "unclear")
