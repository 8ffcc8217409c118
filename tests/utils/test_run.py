"""Exit statuses, the one line for bad input, and run.json."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from utils import run
from utils.distributed import free_port

ROOT = Path(__file__).parents[2]
BAD_INPUT = "from utils.run import UserError, run_main\ndef main(): raise UserError('--data_path: no such file')\n"


def raises(error):
    def main():
        raise error

    return main


def test_bad_input_is_one_line_on_stderr_and_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        run.run_main(raises(run.UserError("--data_path x.jsonl: no such file")))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --data_path x.jsonl: no such file\n"


def test_ctrl_c_is_status_130():
    with pytest.raises(SystemExit) as stop:
        run.run_main(raises(KeyboardInterrupt()))
    assert stop.value.code == 130


def test_other_errors_pass_through():
    with pytest.raises(ZeroDivisionError):
        run.run_main(raises(ZeroDivisionError()))


def test_other_ranks_let_rank_0_speak_first(capsys, monkeypatch):
    slept = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(run.time, "sleep", slept.append)
    with pytest.raises(SystemExit) as stop:
        run.run_main(raises(run.UserError("row 7 is empty")))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error on rank 1: row 7 is empty\n"
    assert slept == [3]


def test_importing_it_costs_no_torch():
    code = "import sys, utils.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.ranks
def test_the_deepspeed_launcher_hands_on_status_2_and_says_it_once(tmp_path):
    script = tmp_path / "bad.py"
    script.write_text(BAD_INPUT + "run_main(main)\n")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("--data_path: no such file") == 1
    assert "Traceback" not in done.stderr


def test_run_json_says_how_the_run_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--seed", "7", "--data_path", "my data"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    folder = run.start_run(tmp_path / "a" / "b", Namespace(seed=7, data_path=["my data"], where=Path("x")), "step1")
    record = json.loads((folder / "run.json").read_text())
    assert folder == tmp_path / "a" / "b"
    assert record["stage"] == "step1"
    assert record["command"].endswith("main.py --seed 7 --data_path 'my data'")
    assert record["arguments"] == {"seed": 7, "data_path": ["my data"], "where": "x"}
    assert record["seed"] == 7
    assert record["world_size"] == 4
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "deepspeed", "transformers"} <= set(record["versions"])
    assert set(record) >= {"git_commit", "device", "started"}


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert list(run.start_run(tmp_path / "run", {"seed": 1}, "step1").iterdir()) == []


def test_an_output_dir_that_is_a_file_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(run.UserError, match=r"--output_dir: cannot write to .*file"):
        run.start_run(tmp_path / "file", {}, "step1")


def repository(folder: Path) -> Path:
    """A git repository with this module in it."""
    (folder / "run.py").write_text((ROOT / "utils" / "run.py").read_text())
    for command in ("init -q", "add run.py", "-c user.name=a -c user.email=a@b commit -q -m first"):
        subprocess.run(["git", "-C", str(folder), *command.split()], check=True)
    return folder / "run.py"


def test_git_commit_is_that_of_the_source_and_marks_changes(tmp_path, monkeypatch):
    source = repository(tmp_path)
    monkeypatch.setattr(run, "__file__", str(source))
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert run.git_commit() == head.stdout.strip()
    source.write_text("changed")
    assert run.git_commit() == head.stdout.strip() + "-dirty"


def test_no_git_commit_outside_a_repository_or_untracked_in_somebody_elses(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    assert run.git_commit() is None
    repository(tmp_path)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "run.py").write_text("")
    monkeypatch.setattr(run, "__file__", str(tmp_path / "site-packages" / "run.py"))
    assert run.git_commit() is None
