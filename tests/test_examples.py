"""The programs of examples/ do what they say they do."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from remax.rewards.process import load_function

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_says_what_it_shows_and_how_to_run_it(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring.splitlines()[0].endswith(".")
    assert f"    python examples/{path.name}" in docstring
    assert re.search(r"\d+ seconds on one CPU core", docstring)


@pytest.mark.ranks
def test_remax_in_40_lines_is_no_longer_and_learns(run_command):
    path = ROOT / "examples" / "remax_in_40_lines.py"
    source = path.read_text()
    after_docstring = source.split('"""', 2)[2]
    code = [line for line in after_docstring.splitlines() if line.strip()]
    assert len(code) <= 45  # imports and the call of main included
    (main,) = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert main.end_lineno - main.lineno < 40

    done = run_command([sys.executable, path])
    assert done.returncode == 0, done.stdout
    rewards = [float(found) for found in re.findall(r"reward (\d\.\d\d)", done.stdout)]
    assert len(rewards) == 8
    assert rewards[0] < 0.5 and min(rewards[-2:]) > 0.85


@pytest.mark.ranks
def test_a_verifiable_reward_knows_its_references_and_is_learned(run_command):
    path = ROOT / "examples" / "verifiable_reward.py"
    function = load_function(f"{path}:correct")  # as --reward_fn finds it
    references = {"answer": ["3 + 4 = 7\n#### 7", "0 + 2 = 2\n#### 2", "4 + 4 = 8\n#### 8"]}
    assert function(["?"] * 3, [" 7", " 3", "8 "], references) == [1.0, 0.0, 1.0]

    done = run_command([sys.executable, path])
    assert done.returncode == 0, done.stdout
    rewards = [float(found) for found in re.findall(r"^eval .*? reward ([\d.]+)", done.stdout, flags=re.MULTILINE)]
    assert len(rewards) == 5
    assert 0.3 < rewards[0] < 0.7 and rewards[-1] > rewards[0] + 0.2  # of 25 sums: five more are right


def test_the_rows_like_gsm8ks_have_a_reward():
    rows = [json.loads(line) for line in (ROOT / "examples/gsm8k.jsonl").read_text().splitlines()]
    function = load_function(f"{ROOT}/step3_rlhf_finetuning/example_rewards.py:gsm8k")
    references = [row["answer"] for row in rows]
    for reference in references:  # the result behind ####, as the last step has it
        steps, _, result = reference.rpartition("\n#### ")
        assert re.findall(r"=(-?\d+)>>", steps)[-1] == result.replace(",", "")
    right = [f" So it is {reference.rpartition(' ')[2]}." for reference in references]
    assert function(["?"] * len(rows), right, {"answer": references}) == [1.0] * len(rows)
    wrong = [" It is 43.", " I do not know.", "", " 1,250 or 1,251?"]
    assert function(["?"] * 4, wrong, {"answer": references[:3] + ["#### 1,250"]}) == [0.0] * 4


def test_score_file_writes_the_scores_of_plain_transformers(tmp_path, capsys, monkeypatch):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    example = load("score_file")
    folder = example.make_reward_model(tmp_path / "reward")
    rows, scores = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    answers = [" Ice is light.", "", " Because it is. " * 9]
    texts = [{"prompt": example.ROWS[0]["prompt"], "answer": answer, "id": i} for i, answer in enumerate(answers)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    monkeypatch.setattr(example, "BATCH", 2)
    monkeypatch.setattr(sys, "argv", ["score_file.py", str(folder), str(rows), str(scores)])
    example.main()

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    written = [json.loads(line) for line in scores.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "score"} for row in written] == texts
    for row in written:
        ids = tokenizer(row["prompt"] + row["answer"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert row["score"] == pytest.approx(float(model(ids).logits[0, 0]), abs=1e-5)


def test_score_file_works_without_arguments(capsys, monkeypatch):
    example = load("score_file")
    monkeypatch.setattr(sys, "argv", ["score_file.py"])
    example.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["answer"] for row in rows] == [row["answer"] for row in example.ROWS]
    assert all(isinstance(row["score"], float) for row in rows)
