"""The planner's command line."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from remax import plan
from remax.cli.planning import PlanArguments, parse_plan
from remax.cli.validate import check_batches
from remax.planning.advice import in_batches
from remax.planning.durations import DEVICES, Rates
from remax.planning.phases import Job
from remax.planning.shapes import config_of
from remax.planning.states import Machine
from remax.stages.plan import duration, gpu_memory, step3_flags
from remax.stages.planning import job_of
from utils.run import UserError

SMALL = "--model gpt2 --gpus 1 --prompt_len 64 --answer_len 48 --gradient_checkpointing false --frozen_zero 0 --zero 2"
SMALL += " --offload false"


def run(monkeypatch, capsys, line: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["plan", *line.split()])
    status = 0
    try:
        plan.main()
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out


@pytest.mark.parametrize("algo", get_args(get_type_hints(PlanArguments)["algo"].__args__[0]))
def test_step_3_takes_the_batches(algo, monkeypatch, capsys):
    for more in ("--batch 1", "--batch 3", "--batch 8 --micro_batch 3"):
        _, out = run(monkeypatch, capsys, f"{SMALL} --gpu_memory 40 --algo {algo} {more} --json")
        flags = dict(part.split() for part in json.loads(out)[algo]["flags"].split("--") if " " in part.strip())
        args = step3_flags(parse_plan(SMALL.split()), algo)
        for name in ("per_device_generation_batch_size", "per_device_training_batch_size"):
            setattr(args, name, int(flags[name]))
        check_batches(args)


def test_the_tables(monkeypatch, capsys, tmp_path):
    # A run of 2 ranks with 4 prompts each and two batches a step: 16 prompts in 8 seconds, the first step apart.
    flags = {"per_device_generation_batch_size": 4, "generation_batches": 2, "gradient_accumulation_steps": 1}
    (tmp_path / "run.json").write_text(json.dumps({"arguments": flags, "world_size": 2}))
    steps = [{"step": i, "train/seconds_per_step": s} for i, s in enumerate((90, 8, 8), start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    line = f"{SMALL} --gpu_memory 12 --algo remax --batch 16 --prompts 7200"
    status, out = run(monkeypatch, capsys, f"{line} --rates {tmp_path}")
    assert status == 0
    take = "take: --actor_zero_stage 2 --per_device_generation_batch_size 16 --per_device_training_batch_size 8"
    assert "remax: 0.124 billion parameters, bf16; 1 x 12 GiB" in out and take in out
    assert "a step of 16 prompts: 8.0 s (as given)" in out
    assert "an epoch over 7,200 prompts: 1.0 hours" in out  # 7200 * 8 / 16 seconds
    (head,) = [line for line in out.splitlines() if "GiB on each GPU" in line]
    assert head.split()[4:] == ["rollout", "scoring", "update", "step", "evaluation"]
    lines = out.splitlines()
    below = lines[lines.index(head) + 1 :]
    columns = [below[i].rsplit(maxsplit=5)[1:] for i in range(len(below)) if below[i].startswith("  sum")]
    assert len(columns) == 1 and all(float(cell) > 1 for cell in columns[0])
    weights = next(line for line in below if line.startswith("  actor: weights"))
    assert weights.split()[2:] == ["0.23"] * 5  # 2 bytes of 124 M


def test_as_json(monkeypatch, capsys):
    line = f"{SMALL} --gpu rtx4090 --gpu_memory 12 --algo remax --prompts 64 --batch 16 --json"
    status, out = run(monkeypatch, capsys, line)
    found = json.loads(out)["remax"]
    assert status == 0 and found["fits"] and found["seconds"].keys() == {"generate", "score", "update"}
    assert found["seconds_per_step"] == pytest.approx(sum(found["seconds"].values()))
    assert found["hours"] == pytest.approx(4 * found["seconds_per_step"] / 3600)
    # 48 tokens, for each of which CUDA graphs run 12 layers and the weights are read; the rest takes no tenth of that
    reads = 2 * 124e6 / (Rates().decode * DEVICES["rtx4090"].bandwidth)
    assert found["seconds"]["generate"] == pytest.approx(48 * (12 * Rates().recorded + reads), rel=0.1)
    for phase, size in found["phases"].items():
        assert size == pytest.approx(sum(term["bytes"].get(phase, 0) for term in found["terms"]))


def test_nothing_fits(monkeypatch, capsys):
    status, out = run(monkeypatch, capsys, f"{SMALL} --gpu_memory 2 --algo ppo --batch 1")
    assert status == 1
    assert "1 prompt per GPU: fits in no way; takes " in out and "Try more GPUs, --lora" in out


def test_times_that_are_given_go_before_the_model():
    line = "--model gpt2 --gpus 2 --prompts 7200"
    small = in_batches(step3_job(line), 8, 4)
    given = duration(small, parse_plan([*line.split(), "--seconds_per_step", "10"]), None)
    measured = duration(small, parse_plan(line.split()), 0.5)
    assert (given.step, measured.step, given.parts) == (10, 0.5 * 8 * 2, {})


def step3_job(line: str) -> Job:
    args = parse_plan(line.split())
    return job_of(step3_flags(args, "remax"), Machine(args.gpus), config_of)


def test_every_gpu_that_can_be_named_is_known():
    (kinds,) = [field.type for field in fields(PlanArguments) if field.name == "gpu"]
    assert set(get_args(kinds)) == DEVICES.keys()
    assert gpu_memory(parse_plan("--model gpt2 --gpu a100-40gb".split())) == 40


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model gpt2 --share all", "--share all: what models share must not learn; give --lora"),
        ("--model gpt2 --reward_fn --algo ppo", "--reward_fn with --algo ppo: the critic starts from a reward model"),
        ("--model gpt2 --rates there --prompts 5", "--rates there: has no metrics.jsonl"),
        ("--model gpt2 --seconds_per_step 5", "--prompts: give the size of the data set"),
        ("--model gpt2 --answer_len 2000", r"--prompt_len \+ --answer_len: 2256 tokens, but the model of --model has"),
        ("--model gpt2 --offload --zero 0", "--offload with --zero 0: offloading is a part of ZeRO"),
        ("--model none", "--model none: is no folder, no name that the planner knows"),
    ],
)
def test_bad_flags_are_refused(monkeypatch, capsys, line, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, capsys, line)


def test_a_run_that_tells_nothing_is_refused(monkeypatch, capsys, tmp_path):
    for name, text in (("run.json", "{}"), ("metrics.jsonl", "")):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="is no run of step 3"):
        run(monkeypatch, capsys, f"--model gpt2 --prompts 5 --rates {tmp_path}")
