"""The console line, metrics.jsonl, TensorBoard and progress without a terminal."""

import errno
import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from utils import metrics, run
from utils.metrics import MetricsLogger, ProgressLines, console_line, progress
from utils.run import UserError


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_console_line_reads_as_text():
    values = {"train/reward": 1.2345678, "train/kl": 0.04, "train/lr": 1e-6, "train/seconds_per_step": 2.1}
    line = console_line(20, values, total_steps=300)
    assert line == "step 20/300  reward 1.235  kl 0.04  lr 1.0e-06  2.10 s/step"


def test_console_line_of_an_evaluation_names_it_once():
    line = console_line(20, {"eval/loss": 2.0, "eval/grad_norm": math.nan}, epoch=0.5)
    assert line == "eval  step 20  epoch 0.50  loss 2  grad norm nan"


def test_console_line_keeps_the_parts_of_a_figure():
    values = {"reward": 1.5, "reward/rules": 2.0}
    assert console_line(3, {f"eval/{k}": v for k, v in values.items()}) == "eval  step 3  reward 1.5  reward/rules 2"
    assert console_line(3, {f"train/{k}": v for k, v in values.items()}, names=["reward"]) == "step 3  reward 1.5"


def test_console_line_shows_the_chosen_values_in_order_but_all_of_an_evaluation():
    values = {"train/a": 1.0, "train/b": 2.0, "train/c": 3.0}
    assert console_line(1, values, names=["c", "missing", "a"]) == "step 1  c 3  a 1"
    assert console_line(1, {"eval/b": 2.0}, names=["a"]) == "eval  step 1  b 2"
    assert console_line(1, {"eval/a": 1.0, "eval/b": 2.0}, quiet=["a"]) == "eval  step 1  b 2"


def test_console_line_keeps_the_groups_of_a_mixed_record():
    assert console_line(1, {"train/a": 1.0, "eval/a": 2.0}) == "step 1  a 1  eval/a 2"


def test_what_the_run_has_spent_goes_with_its_evaluation():
    values = {"eval/loss": 2.0, "run/seconds": 35.2, "run/peak_memory_gib": 1.234, "run/parameters": 8e9}
    assert console_line(20, values) == "eval  step 20  loss 2  after 35 s  peak memory 1.23 GiB"


def test_a_long_line_goes_on_below():
    values = {f"eval/figure_number_{i}": i / 7 for i in range(12)}
    first, *rest = console_line(24, values, epoch=1.5, total_steps=60).splitlines()
    assert first.startswith("eval  step 24/60  epoch 1.50  figure number 0 0") and len(rest) == 2
    assert all(line.startswith("     figure number") for line in rest)
    assert all(len(line) <= 120 for line in (first, *rest))
    assert sum(line.count("figure") for line in (first, *rest)) == 12


def test_each_call_is_a_record_and_not_a_number_is_null(tmp_path, capsys):
    logger = MetricsLogger(tmp_path)
    logger.log(1, {"train/loss": torch.tensor(2.5), "train/kl": math.nan, "train/grad": math.inf}, epoch=0.25)
    assert len(records(tmp_path)) == 1  # at once: a run that is killed closes nothing
    logger.log(2, {"train/loss": 2})
    logger.close()
    first, second = records(tmp_path)
    time = first.pop("time")
    assert first == {"step": 1, "epoch": 0.25, "train/loss": 2.5, "train/kl": None, "train/grad": None}
    assert second["time"] >= time
    assert "kl nan" in capsys.readouterr().out


def test_console_cadence_first_file_always(tmp_path, capsys):
    logger = MetricsLogger(tmp_path, console_every=5, total_steps=11)
    for step in range(1, 12):
        logger.log(step, {"train/loss": 1.0})
    logger.log(3, {"eval/loss": 1.0})
    logger.close()
    shown = [line.split("  ")[:2] for line in capsys.readouterr().out.splitlines()]
    # every fifth, the last one, and each evaluation
    assert shown == [["step 5/11", "loss 1"], ["step 10/11", "loss 1"], ["step 11/11", "loss 1"], ["eval", "step 3/11"]]
    assert len(records(tmp_path)) == 12


def test_an_existing_file_is_continued_or_cut_back(tmp_path):
    for drop_after, expected in [(None, [1, 2, 3]), (None, [1, 2, 3, 1, 2, 3]), (2, [1, 2, 1, 2, 1, 2, 3])]:
        logger = MetricsLogger(tmp_path, drop_after=drop_after)
        for step in (1, 2, 3):
            logger.log(step, {"a": 0.0})
        logger.close()
        assert [record["step"] for record in records(tmp_path)] == expected
    # a record torn by a kill goes too; -1 leaves nothing
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    MetricsLogger(tmp_path, drop_after=5).close()
    assert records(tmp_path) == [{"step": 1}]
    MetricsLogger(tmp_path, drop_after=-1).close()
    assert records(tmp_path) == []


def test_remarks_have_a_file_of_their_own_and_go_with_the_steps(tmp_path, monkeypatch):
    def remarks():
        return [json.loads(line) for line in (tmp_path / "remarks.jsonl").read_text(encoding="utf-8").splitlines()]

    logger = MetricsLogger(tmp_path, drop_after=-1)
    assert not (tmp_path / "remarks.jsonl").exists()
    logger.log(1, {"a": 0.0})
    logger.remark("entropy collapse", "step 2: é", step=2)
    logger.log(2, {"a": 0.0})
    logger.remark("stopped", "lost")
    logger.flush()
    expected = [
        {"step": 2, "kind": "entropy collapse", "text": "step 2: é"},
        {"step": 2, "kind": "stopped", "text": "lost"},
    ]
    assert remarks() == expected and [record["step"] for record in records(tmp_path)] == [1, 2]
    logger.remark("KL", "far", step=9)
    logger.go_back(2)
    logger.close()
    assert remarks() == expected
    logger = MetricsLogger(tmp_path, drop_after=2)  # goes on
    logger.remark("KL", "far", step=3)
    logger.close()
    assert [row["step"] for row in remarks()] == [2, 2, 3]
    MetricsLogger(tmp_path, drop_after=1).close()
    assert remarks() == []
    monkeypatch.setenv("RANK", "1")
    MetricsLogger(tmp_path).remark("KL", "of another rank", step=1)
    assert remarks() == []


def test_what_a_full_disk_does_not_take_is_written_when_there_is_room(tmp_path, monkeypatch, capsys):
    room, write = [30], os.write

    def full(descriptor, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(room[0], len(data))
        room[0] -= taken
        return write(descriptor, data[:taken])

    monkeypatch.setattr(metrics.os, "write", full)
    logger = MetricsLogger(tmp_path)
    for step in (1, 2):
        logger.log(step, {"a": 0.5})
    assert (tmp_path / "metrics.jsonl").stat().st_size == 30
    room[0] = 10**6
    logger.log(3, {"a": 0.5})
    assert [(record["step"], record["a"]) for record in records(tmp_path)] == [(1, 0.5), (2, 0.5), (3, 0.5)]
    room[0] = 0
    logger.log(4, {"a": 0.5})
    logger.close()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    space = f"warning: no space left for {tmp_path}/metrics.jsonl; make room: until then its records are kept in memory"
    lost = f"warning: {tmp_path}/metrics.jsonl lacks its last 1 records, as there is no space left"
    assert said == [space, space, lost]


def test_steps_that_are_made_again_are_forgotten(tmp_path):
    logger = MetricsLogger(tmp_path, tensorboard_dir=tmp_path / "tb")
    for step in (1, 2, 3):
        logger.log(step, {"a": 0.5})
    logger.go_back(1)
    for step in (2, 3):
        logger.log(step, {"a": 2.5})
    logger.close()
    assert [(record["step"], record["a"]) for record in records(tmp_path)] == [(1, 0.5), (2, 2.5), (3, 2.5)]


def test_a_folder_that_is_removed_in_the_middle_is_made_again(tmp_path, capsys):
    folder = run.open_folder(tmp_path / "run")
    run.start_run(folder, {"seed": 1}, "step1")
    logger = MetricsLogger(folder, tensorboard_dir=folder / "tb")
    logger.log(1, {"a": 0.5})
    logger.tensorboard.flush()
    shutil.rmtree(folder)
    logger.log(2, {"a": 0.5})
    logger.log(3, {"a": 0.5})
    logger.close()
    assert [record["step"] for record in records(folder)] == [1, 2, 3]
    assert json.loads((folder / "run.json").read_text())["seed"] == 1
    assert any((folder / "tb").iterdir())
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert said == [
        f"warning: files of this run were removed from {folder}; metrics.jsonl and run.json are written again, "
        "but nothing else"
    ]


def test_a_disk_that_is_full_for_tensorboard_does_not_end_the_run(tmp_path, capsys):
    logger = MetricsLogger(tmp_path)

    class Full:
        def add_scalar(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

    logger.tensorboard = Full()
    for step in (1, 2):
        logger.log(step, {"a": 0.5})
    logger.close()
    assert len(records(tmp_path)) == 2
    assert capsys.readouterr().out.count("TensorBoard gets no more figures (No space left on device)") == 1


def test_off_rank_0_nothing_happens(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    logger = MetricsLogger(tmp_path / "run", tensorboard_dir=tmp_path / "tb")
    logger.log(1, {"eval/loss": 1.0})
    logger.close()
    with progress(2, "SFT", "steps") as bar:
        bar.update(2)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_tensorboard_gets_the_same_scalars(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = MetricsLogger(tmp_path, tensorboard_dir=tmp_path / "tb")
    logger.log(3, {"train/loss": 0.5})
    logger.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 0.5)]


def test_tensorboard_has_each_step_of_a_resumed_run_once(tmp_path):
    # As TensorBoard itself reads them: killed after step 3, gone on with after steps 1 and 2, and once from the start.
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")
    for start, (drop_after, steps) in enumerate([(-1, [0, 1]), (-1, [0, 1, 2, 3]), (1, [2, 3]), (2, [3, 4])]):
        logger = MetricsLogger(tmp_path, tensorboard_dir=tmp_path / "tb", drop_after=drop_after)
        for step in steps:
            logger.log(step, {"train/loss": 10 * start + step})
        logger.close()
        (file,) = (tmp_path / "tb").glob("events*")
        file.rename(tmp_path / "tb" / f"{start}.tfevents")  # in order, though the second may be the same
    events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
    losses = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("train/loss")]
    assert losses == [(0, 10), (1, 11), (2, 22), (3, 33), (4, 34)]


ROWS = [
    {"prompt": "\n\nHuman: a|b <i>\n", "answer": "x\ny", "reward": 0.123456},
    {"prompt": "p", "answer": "", "reward": 2.0},
]


def test_tensorboard_gets_samples(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = MetricsLogger(tmp_path, tensorboard_dir=tmp_path / "tb")
    MetricsLogger(tmp_path / "without").samples(3, ROWS)
    logger.samples(3, ROWS)
    logger.samples(4, [])
    logger.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert event.step == 3 and event.tensor_proto.string_val[0].decode().splitlines() == [
        "| prompt | answer | reward |",
        "| --- | --- | --- |",
        "| Human: a&#124;b &lt;i&gt; | x<br>y | 0.1235 |",
        "| p |  | 2 |",
    ]


def test_wandb_is_told_figures_and_samples(tmp_path, monkeypatch):
    told = []

    class Run:
        id = "abc"

        def log(self, values, step):
            told.append((step, values))

        def finish(self):
            told.append("finish")

    def init(**options):
        told.append(options)
        return Run()

    wandb = SimpleNamespace(init=init, Table=lambda columns, data: (columns, data), Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    logger = MetricsLogger(tmp_path / "run", wandb={"seed": 7})
    logger.log(3, {"train/loss": torch.tensor(0.5)})
    logger.samples(3, ROWS)
    logger.close()
    assert told == [
        {"project": "mine", "name": "run", "dir": str(tmp_path / "run"), "config": {"seed": 7}},
        (3, {"train/loss": 0.5}),
        (3, {"samples": (["prompt", "answer", "reward"], [list(row.values()) for row in ROWS])}),
        "finish",
    ]
    MetricsLogger(tmp_path / "run", wandb={}, drop_after=3).close()  # a run that goes on, there as well
    assert {name: told[4].get(name) for name in ("id", "resume")} == {"id": "abc", "resume": "allow"}

    def no_account(**options):
        raise RuntimeError("api_key not configured\nmore")

    wandb.init = no_account
    with pytest.raises(UserError, match="--report_to wandb: api_key not configured; .*WANDB_MODE=offline"):
        MetricsLogger(tmp_path, wandb={})
    monkeypatch.setenv("RANK", "1")
    MetricsLogger(tmp_path, wandb={}).close()


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = MetricsLogger(tmp_path, wandb={"seed": 7, "data_path": ["a"]})
    for step in (0, 1):
        logger.log(step, {"train/loss": 0.5, "run/peak": math.nan})
        logger.samples(step, ROWS)
    logger.close()
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")  # packed: its figures cannot be read here
    assert written.stat().st_size > 1000
    (table, _) = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/samples*.json"))
    assert json.loads(table.read_text())["columns"] == ["prompt", "answer", "reward"]


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    bar = ProgressLines(100, "SFT", "steps", every=30)
    for _ in range(4):
        now[0] += 20
        bar.update(10)
    bar.set_postfix(loss=2)
    now[0] += 20
    bar.update(60)
    bar.close()
    bar.close()
    assert capsys.readouterr().err.splitlines() == [
        # 20 units in 40 s: 0.5/s, so 80 more take 160 s
        "SFT: 20/100 steps, 00:40 so far, 02:40 to go, 0.5 steps/s",
        "SFT: 40/100 steps, 01:20 so far, 02:00 to go, 0.5 steps/s",
        "SFT: 100/100 steps, 01:40 so far, 1 steps/s, loss 2",
    ]


def test_a_high_rate_is_written_out(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with ProgressLines(4000, "answering", "prompts", every=30) as bar:
        now[0] += 2
        bar.update(4000)
    assert capsys.readouterr().err == "answering: 4000/4000 prompts, 00:02 so far, 2000 prompts/s\n"


def test_progress_of_nothing_is_quiet_about_the_rest(capsys):
    with progress(0, "SFT", "steps"):
        pass
    assert "SFT: 0/0 steps" in capsys.readouterr().err
