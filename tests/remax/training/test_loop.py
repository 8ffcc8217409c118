"""A batch that spoils the weights, with `--on_nan rollback`: as if it had never been there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from remax.checkpoint.checkpoints import Checkpoints, Saving, newest
from remax.training import loop
from remax.training.loop import Cadence, _Run
from utils.data.ahead import Ahead
from utils.data.loaders import EpochSampler

ROOT = Path(__file__).resolve().parents[3]
# Runs one after the other in a process: one leaves some batches out that it draws; in the next one, the loss of these
# very batches is no number; in the last, no loss is one.
PROGRAM = """
import json, math
from mains import run_program
from remax.algorithms.remax import ReMax
from remax.core.sums import Figure
from remax.training import loop, tasks

stage, program, flags = {stage}, {root!r} + "/" + {program!r}, {flags!r}.split()
batches_of_steps, of_task, of_answers = loop.batches_of_steps, tasks.Supervised.loss, ReMax.loss
met, bad = [], []

def without(loader, cadence, state):
    for drawn, batches in enumerate(batches_of_steps(loader, cadence, state), 1):
        if drawn in {out!r}:
            bad.append(batches[0].input_ids)
        else:
            yield batches

def noted(loader, cadence, state):
    for batches in batches_of_steps(loader, cadence, state):
        met.append(batches[0].input_ids)
        yield batches

def spoilt():
    return not bad or any(met[-1].tolist() == ids.tolist() for ids in bad)

def loss_of_task(self, batch, totals):
    loss, figures = of_task(self, batch, totals)
    return loss * (math.nan if spoilt() else 1.0), figures

def loss_of_answers(self, rollout, output, denominator):
    loss, figures = of_answers(self, rollout, output, denominator)
    factor = math.nan if spoilt() else 1.0
    return loss * factor, {{**figures, "loss": Figure(figures["loss"].total * factor)}}

def run(name, *more):
    return run_program(program, [*flags, "--output_dir", name, "--save_steps", "3", *more], ".", name + ".log")

loop.batches_of_steps = without
ends = [run("without")]
loop.batches_of_steps, tasks.Supervised.loss, ReMax.loss = noted, loss_of_task, loss_of_answers
ends.append(run("rolled_back", "--on_nan", "rollback"))
bad.clear()
ends.append(run("hopeless", "--on_nan", "rollback"))
json.dump(ends, open("ends.json", "w"))
"""
COMMON = "--data_path pairs.jsonl --max_steps 8 --eval_steps 4 --seed 3 --num_train_epochs 1 --max_eval_batches 1"
FINETUNING = "--model_name_or_path {model} --per_device_train_batch_size 2 --max_seq_len 64 --data_split 1,0,0"
RLHF = (
    "--actor_model_name_or_path {model} --reward_model_name_or_path {reward} --per_device_generation_batch_size 2"
    " --per_device_training_batch_size 2"
    " --max_prompt_seq_len 48 --max_answer_seq_len 6 --skip_doctor --enable_ema --save_at_final --target_kl 0"
    " --adaptive_kl --data_split 0,0,1"
)


def records(folder: Path) -> list[dict]:
    """What metrics.jsonl says but for time and memory."""
    spent = ("time", "run/", "train/seconds", "train/tokens_per_second")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(spent)} for line in lines]


@pytest.mark.ranks  # a process of its own
# Steps 1 and 2 stop at once; step 3 bears two steps that the engine has skipped.
@pytest.mark.parametrize(
    ("stage", "out", "words"), [(1, [5], "the batch of step 5"), (3, [5, 6, 7], "the batches of steps 5 to 7")]
)
def test_a_run_that_went_back_is_one_that_never_met_the_batch(
    stage, out, words, tmp_path, tiny_model, tiny_reward_model
):
    program = f"{('step1_supervised_finetuning', '', 'step3_rlhf_finetuning')[stage - 1]}/main.py"
    flags = f"{COMMON} {RLHF if stage == 3 else FINETUNING}"
    flags = flags.format(model=tiny_model("llama"), reward=tiny_reward_model("llama"))
    rows = [
        {"prompt": f"Human: {i} and {i}? Assistant:", "chosen": f" {2 * i}.", "rejected": " No."} for i in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = PROGRAM.format(root=str(ROOT), stage=stage, program=program, flags=flags, out=out)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    modules = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment |= {"PYTHONPATH": modules, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    logs = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    assert done.returncode == 0, (done.stderr, logs)
    assert json.loads((tmp_path / "ends.json").read_text()) == [0, 0, 3], logs
    assert logs["rolled_back"].count(f"--on_nan rollback: back to step 3, and on without {words}") == 1
    assert records(tmp_path / "rolled_back") == records(tmp_path / "without")
    remarks = {run: (tmp_path / run / "remarks.jsonl").read_text() for run in ("rolled_back", "hopeless")}
    (back,) = [row for row in map(json.loads, remarks["rolled_back"].splitlines()) if row["kind"] == "rollback"]
    assert back["step"] == 3 and words in back["text"]
    assert json.loads(remarks["hopeless"].splitlines()[-1])["kind"] == "stopped"
    # Where there were checkpoints, the end is one, too: the model is still to be written.
    assert [path.name for path in tmp_path.glob("without/checkpoints/*")] == ["step_000008"]
    models = ["actor_final", "actor_ema", "actor"] if stage == 3 else [""]
    for model in models:
        one, other = (load_file(tmp_path / run / model / "model.safetensors") for run in ("rolled_back", "without"))
        assert all(torch.equal(one[name], other[name]) for name in other) and one.keys() == other.keys()
    assert "There is no checkpoint yet for --on_nan rollback to go back to" in logs["hopeless"]


class Idle:
    """Learns nothing."""

    engines, values, average = {}, {}, None  # noqa: RUF012


@pytest.mark.parametrize(
    ("batch", "max_steps", "words"),
    [
        (2, 0, None),
        (4, 0, "the rows that are left are enough for 2 steps, and 0 are to come; --max_steps 6 without"),
        (1, 0, "the rows that are left are enough for 8 steps, and 12 are to come; --max_steps 12 without"),
        (1, 6, None),  # the rows are not what it ends with
    ],
)
def test_rows_that_do_not_fit_the_steps_to_come_are_told_of(batch, max_steps, words, tmp_path, capsys):
    # 16 rows, of which 4 steps have taken 8.
    def start(batch: int) -> _Run:
        loader = DataLoader(range(16), batch_size=batch, sampler=EpochSampler(16, batch))
        checkpoints = Checkpoints(tmp_path, Saving(), {}, found=newest(tmp_path))
        run = _Run(Idle(), loader, Cadence(epochs=1, max_steps=max_steps), None, checkpoints)
        run.begin()
        return run

    first = start(2)
    first.state.step = len(list(zip(range(4), first.loader, strict=False)))
    first.checkpoints.save(4)
    first.checkpoints.finish()
    second = start(batch)
    said = capsys.readouterr().out
    assert f"goes on after step 4 of {second.total}" in said
    assert words in said if words else "rows that are left" not in said
    second.state.epoch = 1  # the data has ended
    assert ("--max_steps" in second.ended()) == (max_steps > 0)


def test_the_parts_of_a_step_add_up_to_its_wall_time(monkeypatch):
    # Drawing a batch takes 1 s, learning 5 s, of which 3 are the update's, a record 0.5 s; an evaluation is no step's.
    clock, records = SimpleNamespace(now=0.0), []

    def takes(seconds: float, result=None):
        clock.now += seconds
        return result

    def log(step: int, values: dict[str, float], epoch: float) -> None:
        takes(0.5)
        if "train/loss" in values:
            records.append({name.removeprefix("train/"): value for name, value in values.items()})

    class InTurn(Ahead):
        def __iter__(self):
            yield from self.loader

    monkeypatch.setattr(loop, "Ahead", InTurn)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    learner = Idle()
    learner.label, learner.headline, learner.sign = "idle", "loss", -1
    learner.learn = lambda step, batches: takes(5, {"loss": 1.0, "seconds_update": 3.0, "tokens": 13.0})
    learner.evaluate = lambda: takes(100, SimpleNamespace(figures={"loss": 1.0}))
    learner.check, learner.evaluated = lambda *_: None, lambda *_: takes(10)
    loader = DataLoader(range(3), 1, sampler=EpochSampler(3, 1), collate_fn=lambda rows: takes(1, rows))
    _Run(learner, loader, Cadence(evaluate_every=2), SimpleNamespace(log=log), None).all_steps()
    assert [record["seconds_per_step"] for record in records] == [6, 6.5, 6.5]
    for record in records:
        parts = [record[f"seconds_{part}"] for part in ("data", "update", "rest")]
        assert parts[:2] == [1, 3] and sum(parts) == record["seconds_per_step"]
        assert record["tokens_per_second"] == 13 / record["seconds_per_step"] and "tokens" not in record
