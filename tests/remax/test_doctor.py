"""The doctor's command line."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from remax import doctor
from remax.checks import examination, findings, generation, models, rewards
from remax.checks.findings import FAILURE
from remax.cli.evaluation import DoctorArguments
from remax.cli.flags import Step3Arguments
from remax.rewards import process
from remax.stages import doctor as program
from utils.run import UserError


def run_doctor(monkeypatch, *flags) -> int:
    monkeypatch.setattr("sys.argv", ["doctor", *map(str, flags)])
    try:
        doctor.main()
    except SystemExit as end:
        return end.code
    return 0


def test_what_functions_print_is_no_json(monkeypatch, capfd, make_policy, tmp_path):
    process._worker.stop()  # one that prints where this test looks
    rules = tmp_path / "rules.py"
    rules.write_text("print('imported')\ndef f(prompt, answer):\n    print('asked')\n    return len(answer)\n")
    models = ["--actor_model_name_or_path", make_policy("llama"), "--reward_fn", f"{rules}:f", "--dtype", "fp32"]
    sizes = ["--max_prompt_seq_len", 64, "--max_answer_seq_len", 8, "--skip_reload", "--json"]
    run_doctor(monkeypatch, *models, *sizes)
    printed = capfd.readouterr()
    process._worker.stop()
    assert json.loads(printed.out)["findings"] and "imported" in printed.err and "asked" in printed.err


def test_a_function_that_needs_a_column_is_refused(monkeypatch, make_policy, tmp_path):
    (tmp_path / "rules.py").write_text("def f(prompt, answer, solution): return 1.0")
    with pytest.raises(
        UserError, match=r"rules.py:f: takes solution, but the doctor's own prompts have no columns; step"
    ):
        run_doctor(
            monkeypatch, "--actor_model_name_or_path", make_policy("llama"), "--reward_fn", f"{tmp_path}/rules.py:f"
        )


def test_command_line(monkeypatch, capsys, make_policy, make_scorer, corpus):
    sizes = ["--max_prompt_seq_len", 64, "--max_answer_seq_len", 32, "--dtype", "fp32", "--data_path", corpus]
    models = ["--actor_model_name_or_path", make_policy("llama"), "--reward_model_name_or_path", make_scorer("llama")]
    assert run_doctor(monkeypatch, *models, *sizes) == 0  # 24 held-out pairs: a random reward model only warns
    out = capsys.readouterr().out
    assert "reward model ranks pairs" in out and "generation agrees with the forward" in out

    assert run_doctor(monkeypatch, *models, *sizes, "--max_prompt_seq_len", 120, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is False
    (failure,) = [found for found in report["findings"] if found["result"] == FAILURE]
    assert failure["check"] == "prompts fit" and failure["remedy"]


def test_several_rewards(monkeypatch, capsys, make_policy, make_scorer, tmp_path):
    (tmp_path / "rules.py").write_text("def length(prompts, answers):\n    return [len(a) for a in answers]\n")
    (tmp_path / "bad.py").write_text("def last(prompt, answer):\n    return ord(answer[-1])\n")
    models = ["--actor_model_name_or_path", make_policy("llama"), "--skip_reload"]
    models += ["--max_prompt_seq_len", 64, "--max_answer_seq_len", 32, "--dtype", "fp32"]
    judges = ["--reward_model_name_or_path", make_scorer("llama"), f"{make_scorer('llama', seed=6)}:0.5"]
    assert run_doctor(monkeypatch, *models, *judges, "--reward_fn", f"{tmp_path}/rules.py:length:-0.1") == 0
    out = capsys.readouterr().out
    assert "scores of llama-own-5 differ" in out and "scores of length differ" in out
    with pytest.raises(UserError, match=r"bad.py:last: IndexError: .* answer '' \(tried before training"):
        run_doctor(monkeypatch, *models, "--reward_fn", f"{tmp_path}/bad.py:last")
    with pytest.raises(UserError, match="--normalize_reward: .* has score_mean None"):
        run_doctor(monkeypatch, *models, *judges, "--normalize_reward")


def test_a_wrong_flag_is_refused(monkeypatch, make_policy, make_scorer):
    with pytest.raises(UserError, match="--actor_model_name_or_path"):
        run_doctor(monkeypatch, "--actor_model_name_or_path", "./none", "--reward_model_name_or_path", "./none")
    with pytest.raises(UserError, match="--batches"):
        run_doctor(monkeypatch, "--actor_model_name_or_path", ".", "--reward_model_name_or_path", ".", "--batches", "3")


def test_remedies_name_flags_that_exist():
    known = set(Step3Arguments.__dataclass_fields__) | set(DoctorArguments.__dataclass_fields__)
    rooms = (doctor, program, examination, findings, generation, models, rewards)
    assert set(re.findall(r"--(\w+)", "".join(map(inspect.getsource, rooms)))) <= known


@pytest.mark.parametrize("name", ["doctor", "report"])
def test_a_utils_of_the_users_own_is_named(name, tmp_path):
    (tmp_path / "utils.py").write_text("")
    command = [sys.executable, "-m", f"remax.{name}", "--help"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path / 'utils.py'} hides the package `utils` of remax; start from another folder, or rename it\n"
    )
