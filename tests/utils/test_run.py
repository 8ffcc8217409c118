"""Exit statuses, the one line for bad input, and run.json."""

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from utils import run
from utils.distributed import free_port

ROOT = Path(__file__).parents[2]
BAD_INPUT = """
import os
from utils.run import UserError, run_main
def main():
    raise UserError(f"--data_path: no such file; GPUs: {os.environ.get('CUDA_VISIBLE_DEVICES')!r}")
"""


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
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    # once, and by a rank that sees no GPU, though the launcher gives each one
    assert done.stderr.count("--data_path: no such file; GPUs: ''\n") == 1
    assert "Traceback" not in done.stderr


def test_run_json_says_how_the_run_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--seed", "7", "--data_path", "my data"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    folder = run.open_folder(tmp_path / "a" / "b")
    run.start_run(folder, Namespace(seed=7, data_path=["my data"], where=Path("x")), "step1")
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
    folder = run.open_folder(tmp_path / "run")
    run.start_run(folder, {"seed": 1}, "step1")
    assert list(folder.iterdir()) == []


def test_an_output_dir_that_is_a_file_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(run.UserError, match=r"--output_dir: cannot write to .*file"):
        run.open_folder(tmp_path / "file")


HOLDER = """
import sys, time
from utils.run import open_folder, run_main
def main():
    open_folder(sys.argv[1])
    print("open", flush=True)
    time.sleep(60)
run_main(main)
"""


def test_a_second_run_into_the_same_folder_is_refused_until_the_first_one_dies(tmp_path):
    def start(**environment: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(tmp_path)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"RANK": "0"} | environment, **pipes)

    first = start()
    assert first.stdout.readline() == "open\n"
    second = start()
    _, error = second.communicate(timeout=60)
    holder = f"process {first.pid} on {platform.node()}"
    assert second.returncode == 2 and error.count("\n") == 1
    assert f"--output_dir {tmp_path}: a run is writing to it ({holder}); wait for its end" in error
    other_rank = start(RANK="1", WORLD_SIZE="2")  # of the first run: rank 0 holds the folder for all
    assert other_rank.stdout.readline() == "open\n"
    other_rank.kill()
    first.kill()  # nothing is tidied up, and the folder is free again
    first.communicate()
    third = start()
    assert third.stdout.readline() == "open\n"
    third.kill()
    for process in (other_rank, third):
        process.communicate()


def test_a_folder_without_locks_goes_without(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert run.open_folder(tmp_path) == tmp_path


def test_what_a_folder_holds_is_not_overwritten(tmp_path):
    run.refuse_to_overwrite(tmp_path, ["", "last"])
    (tmp_path / "training.log").write_text("of this run, which has just begun")
    (tmp_path / "actor").mkdir()
    (tmp_path / "actor" / "config.json").write_text("{}")
    run.refuse_to_overwrite(tmp_path, ["", "last"])  # a folder that this stage does not write
    with pytest.raises(run.UserError, match=r"holds a model already \(actor/config.json\).* --overwrite_output_dir"):
        run.refuse_to_overwrite(tmp_path, ["actor"])
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(run.UserError, match=r"--output_dir .*: holds another run already \(run.json\)"):
        run.refuse_to_overwrite(tmp_path, [""])


@pytest.mark.parametrize("name", ["answers", "tensorboard", "results.json", "metrics.jsonl", "actor/adapter"])
def test_no_folder_or_file_of_the_users_is_taken_for_that_of_a_run(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(run.UserError, match=rf"holds .* already \({name}\).* --overwrite_output_dir"):
        run.refuse_to_overwrite(tmp_path, ["actor"])


def test_a_message_of_several_lines_becomes_one():
    assert run.one_line(ValueError("bad yaml:\n  line 1\n\n\tline 2\u2028end\n")) == "bad yaml: line 1 line 2 end"
    assert run.one_line(ValueError("a" * 5 + "b" * 5), longest=4) == "aa ... bb"


def test_what_would_mix_with_a_new_run_goes_when_that_begins(tmp_path):
    of_a_run = ("answers/step_000060.jsonl", "close_ups/step_000060.jsonl", "tensorboard/events", "results.json")
    for name in (*of_a_run, "calibration.json", "report.html", "report.md", "actor/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    run.open_folder(tmp_path)
    assert (tmp_path / "answers/step_000060.jsonl").is_file()
    run.start_run(tmp_path, {}, "step3")
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "actor", "run.json"}


@pytest.mark.parametrize("earlier", [None, "of an earlier run"])
def test_a_refused_run_leaves_the_folder_as_it_was(tmp_path, earlier):
    folder = tmp_path / "a" / "b"
    if earlier:
        folder.mkdir(parents=True)
        (folder / "data.json").write_text(earlier)

    def main():
        assert run.open_folder(folder) == folder and (folder / ".lock").is_file()
        (folder / "data.json").write_text("of the refused run")
        raise run.UserError("row 7 is empty")

    with pytest.raises(SystemExit):
        run.run_main(main)
    left = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == ({"data.json": earlier} if earlier else {})
    assert folder.exists() == (earlier is not None)


def test_a_full_disk_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        run.run_main(raises(OSError(errno.ENOSPC, "No space left on device", "output/metrics.jsonl")))
    assert stop.value.code == 3
    error = capsys.readouterr().err
    assert error == "error: No space left on device: output/metrics.jsonl; make room, and start again\n"
    with pytest.raises(PermissionError):
        run.run_main(raises(PermissionError(errno.EACCES, "no")))


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
