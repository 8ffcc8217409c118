"""The demo's report: its figures, its verdict, and what it writes."""

import json
import shutil
import sys

import pytest
import torch

from remax.checkpoint.export import export
from remax.demo import report as program
from remax.demo.corpus import best_answer, make_rows, true_reward
from remax.demo.report import (
    plot,
    read_stage,
    readable,
    samples,
    table,
    true_rewards_over_steps,
    verdict,
)
from remax.models.hydra import load_hydra
from utils.run import UserError
from utils.tokenizer import load_tokenizer

ROWS = make_rows(seed=0, train_rows=1, test_rows=4)[1]


def summary(errors=5.0, gap=0.6):
    value = {"mean": 1.25, "standard_error": 0.5, "count": 4}
    policy = {
        "true_reward": value,
        "true_reward_greedy": value | {"mean": 1.5},
        "learned_reward": value | {"mean": -2.0},
    }
    policy |= {"perplexity": 3.14159, "length": 12.34, "ended": 0.95, "kl": 1.26, "entropy": 0.567}
    ranking = {
        "accuracy": 0.75,
        "accuracy_standard_error": 0.02,
        "accuracy_ceiling": 0.8,
        "longer_wins": 0.6,
        "pairs": 4,
    }
    result = {
        "answers": 5,
        "prompts": 4,
        "policies": {name: policy for name in program.POLICIES},
        "best_reachable": 3.0,
        "standard_errors_above_sft": errors,
        "gap_closed": gap,
        "reward_model": ranking,
        "seconds": {"sft": 12.3, "report": 4.0},
        "paths": {"ReMax": "some/where"},
    }
    return result | {"verdict": dict(zip(("passed", "text"), verdict(result), strict=True))}


@pytest.mark.parametrize(
    ("errors", "gap", "passed"), [(3.0, 0.5, True), (2.99, 0.9, False), (50.0, 0.49, False), (-4.0, -0.2, False)]
)
def test_verdict_needs_both_goals(errors, gap, passed):
    found, text = verdict(summary(errors, gap))
    assert found is passed
    assert text.startswith("GOALS REACHED: " if passed else "GOALS NOT REACHED: ")
    assert f"{errors:.1f} standard errors above SFT's (wanted: 3)" in text and f"{gap:.0%} of the way" in text


def test_table_is_aligned_and_says_everything():
    measured = summary()
    measured["policies"]["SFT"] = measured["policies"]["SFT"] | {"kl": -1e-7}  # what rounding leaves of 0
    text = table(measured)
    assert "-0.0" not in text
    lines = text.splitlines()
    (first, last) = (i for i, line in enumerate(lines) if line.startswith("-----"))
    assert len({len(line) for line in lines[first : last + 1]}) == 1  # every row is as wide as the rules
    for part in (
        "1.25 ± 0.50",
        "1.50 ± 0.50",
        "-2.00 ± 0.50",
        "3.14",
        "12.3",
        "95%",
        "0.57",
        "1.3",
        "75.0% ± 2.0%",
        "3.00",
    ):
        assert part in text
    assert "5 answers to 4 held-out prompts" in text and "over prompts" in text
    assert "sft 12, report 4" in text and "some/where" in text and max(map(len, lines)) <= 110


def test_readable_text_stays_in_one_cell():
    assert readable("\n\nHuman: Name two birds.\n\nAssistant:") == "Name two birds."
    assert readable(" a|b\n`c`\x00*") == "a\\|b\N{REPLACEMENT CHARACTER}\\`c\\`\N{REPLACEMENT CHARACTER}\\*"
    assert readable("  ") == "(empty)"


def answers(text_of):
    rows = [{"prompt": row["prompt"], "answer": text_of(row), "reward": 0.5, "length": 3} for row in ROWS]
    return [row | {"true_reward": true_reward(row["prompt"], row["answer"])} for row in rows]


def test_samples_show_each_policy_with_both_rewards():
    text = samples(
        {
            "base": answers(lambda row: " zzz"),
            "SFT": answers(lambda row: row["rejected"]),
            "ReMax": answers(lambda row: best_answer(row["prompt"])),
        }
    )
    for row in ROWS:
        assert f"**{readable(row['prompt'])}**" in text
        assert f"| ReMax | {readable(best_answer(row['prompt']))} | 3.00 | 0.50 |" in text
        assert (
            f"| SFT | {readable(row['rejected'])} | {true_reward(row['prompt'], row['rejected']):.2f} | 0.50 |" in text
        )
    assert text.count("| base | zzz | ") == len(ROWS)


def write_stage(folder, arguments, metrics):
    folder.mkdir(parents=True, exist_ok=True)
    run = {"stage": folder.name, "arguments": {"seed": 2023, **arguments}, "started": "2026-01-01T00:00:00+00:00"}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    (folder / "results.json").write_text("{}")
    return folder


STARTED = 1767225600.0  # 2026-01-01T00:00:00 UTC
RECORDS = [
    {
        "step": 0,
        "time": STARTED + 10,
        "eval/reward": 0.1,
        "eval/reward_standard_error": 0.1,
        "eval/kl": 0.0,
        "eval/length": 9,
    },
    {"step": 1, "time": STARTED + 20, "train/reward": 0.2, "train/baseline": None, "train/kl": 0.5, "train/length": 8},
    {"step": 2, "time": STARTED + 25, "train/reward": 0.4, "train/baseline": 1.0, "train/kl": 0.6, "train/length": 7},
    {
        "step": 2,
        "time": STARTED + 30.5,
        "eval/reward": 0.3,
        "eval/reward_standard_error": 0.1,
        "eval/kl": 1,
        "eval/length": 9,
    },
]


def test_stage_is_read_with_its_series_and_duration(tmp_path):
    stage = read_stage(write_stage(tmp_path / "remax", {"max_seq_len": 7}, RECORDS))
    assert stage.seconds == 30.5 and stage.arguments["max_seq_len"] == 7
    assert stage.series("train/reward") == ([1, 2], [0.2, 0.4])
    assert stage.series("train/baseline") == ([2], [1.0])  # not a number: null, and left out
    assert stage.series("eval/reward") == ([0, 2], [0.1, 0.3])


@pytest.mark.parametrize("missing", ["run.json", "metrics.jsonl", "results.json"])
def test_a_stage_that_did_not_finish_is_named(tmp_path, missing):
    folder = write_stage(tmp_path / "reward", {}, RECORDS)
    (folder / missing).unlink()
    with pytest.raises(UserError, match=f"reward has no {missing}.*make demo"):
        read_stage(folder)


def test_true_rewards_over_steps_come_from_the_kept_answers(tmp_path):
    stage = read_stage(write_stage(tmp_path / "remax", {}, RECORDS))
    assert true_rewards_over_steps(stage) == ([], [])
    (tmp_path / "remax" / "answers").mkdir()
    for step, found in ((9, answers(lambda row: " zzz")), (10, answers(lambda row: best_answer(row["prompt"])))):
        text = "".join(json.dumps(row) + "\n" for row in found)
        (tmp_path / "remax" / "answers" / f"step_{step}.jsonl").write_text(text)
    steps, rewards = true_rewards_over_steps(stage)
    assert steps == [9, 10]  # as numbers, not as text
    assert rewards[0].mean == -1.0 and rewards[1].mean == 3.0 and rewards[1].standard_error == 0.0  # 2 faults; perfect


@pytest.mark.parametrize("kept", [True, False])
def test_plot_is_a_picture(tmp_path, kept):
    stage = read_stage(write_stage(tmp_path / "remax", {}, RECORDS))
    if kept:
        (tmp_path / "remax" / "answers").mkdir()
        text = "".join(json.dumps(row) + "\n" for row in answers(lambda row: row["chosen"]))
        (tmp_path / "remax" / "answers" / "step_000000.jsonl").write_text(text)
    plot(tmp_path / "plot.png", stage, summary())
    content = (tmp_path / "plot.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000


@pytest.fixture
def finished(tmp_path, corpus, tiny_model, tiny_reward_model):
    """A demo folder whose "ReMax" model is the SFT model: nothing has been learnt."""
    shutil.copytree(corpus, tmp_path / "data")
    shutil.copytree(tiny_model("llama"), tmp_path / "models" / "actor")
    for name, folder in (("sft", tiny_model("gpt2")), ("remax/actor", tiny_model("gpt2"))):
        shutil.copytree(folder, tmp_path / name)
    shutil.copytree(tiny_reward_model("llama"), tmp_path / "reward")
    for name in ("sft", "reward"):
        write_stage(tmp_path / name, {"max_seq_len": 96}, RECORDS)
    write_stage(tmp_path / "remax", {"max_prompt_seq_len": 64, "max_answer_seq_len": 12}, RECORDS)
    return tmp_path


def made(folder):
    return [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]


def report(folder, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["demo", "--output_dir", str(folder), *flags])
    program.main()


def test_report_of_a_demo_that_learnt_nothing(finished, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_status:
        report(finished, monkeypatch, "--check")
    assert exit_status.value.code == 1
    found = json.loads((finished / "summary.json").read_text())
    assert table(found) in capsys.readouterr().out
    policies = found["policies"]
    assert policies["ReMax"] == policies["SFT"] != policies["base"]  # same weights, same seed
    assert found["standard_errors_above_sft"] == 0 and found["gap_closed"] == 0
    assert not found["verdict"]["passed"]
    assert policies["SFT"]["kl"] == pytest.approx(0, abs=1e-4) and policies["base"]["kl"] > 0
    assert 100 < policies["base"]["perplexity"] < 2000  # random weights: about the number of words, 400
    assert (
        policies["base"]["true_reward"]["mean"] < -1
        and policies["base"]["true_reward"]["count"] == found["answers"] == 24
    )
    assert found["prompts"] == len({row["prompt"] for row in made(finished / "data")})
    assert found["seconds"]["sft"] == 30.5 and found["seeds"] == {
        "report": 0,
        "sft": 2023,
        "reward": 2023,
        "remax": 2023,
    }
    assert "torch" in found["run"]["versions"]
    assert all((finished / name).is_file() for name in ("training.png", "samples.md", "summary.json"))
    assert table(found).strip() in (finished / "report.md").read_text()


def test_one_model_may_be_policy_and_reward_model(finished, monkeypatch, tiny_model):
    for name in ("sft", "reward"):
        shutil.rmtree(finished / name)
    tokenizer = load_tokenizer(str(tiny_model("llama")))
    model = load_hydra(str(tiny_model("llama")), "--model", dtype=torch.float32, tokenizer=tokenizer, new_head=True)
    export(model, tokenizer, finished / "hydra_sft", zero3=False)
    write_stage(finished / "hydra_sft", {"max_seq_len": 96}, RECORDS)
    report(finished, monkeypatch)
    found = json.loads((finished / "summary.json").read_text())
    assert found["policies"]["base"] == found["policies"]["SFT"]  # the same weights under both names
    assert found["seconds"].keys() == {"hydra_sft", "remax", "report"} and found["reward_model"]["pairs"] == 24
    assert found["paths"]["SFT"] == found["paths"]["reward"] == str(finished / "hydra_sft")


def test_report_is_the_same_again_and_check_is_asked_for(finished, monkeypatch):
    report(finished, monkeypatch)  # without --check a missed goal is no error
    first = json.loads((finished / "summary.json").read_text())["policies"]
    report(finished, monkeypatch)
    assert json.loads((finished / "summary.json").read_text())["policies"] == first
    report(finished, monkeypatch, "--seed", "1")
    assert json.loads((finished / "summary.json").read_text())["policies"] != first


def test_a_missing_model_is_named(finished, monkeypatch):
    shutil.rmtree(finished / "remax" / "actor")
    with pytest.raises(UserError, match=r"remax/actor holds no model; run the stages again \(make demo\)"):
        report(finished, monkeypatch)
