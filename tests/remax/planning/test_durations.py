"""What a step takes, by hand and at its limits."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

import pytest
import torch

from remax.engines.deepspeed_config import EngineConfig
from remax.planning.advice import WAYS, Way
from remax.planning.dry_run import Sketch
from remax.planning.durations import (
    DEVICES,
    Decode,
    Device,
    Part,
    Rates,
    Work,
    adam,
    decode,
    forward,
    hours,
    learns,
    reads,
    seconds,
    work,
)
from remax.planning.phases import GIB, Job, Planned, Rows
from remax.planning.shapes import config_of
from remax.planning.states import Machine

CONFIG = config_of("llama:64,128,2,4,2,100", "--model")
# of each layer: queries and output 64 x 64, keys and values 64 x 32, three of 64 x 128, two norms; a norm at the end
WEIGHTS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
PARAMETERS = WEIGHTS + 2 * 64 * 100


def model(scores: bool = False, **engine) -> Planned:
    return Planned(Sketch(CONFIG, torch.bfloat16, scores=scores), EngineConfig(dtype="bf16", **engine))


def job(ranks: int = 1, prompts: int = 8, critic: bool = False, memory: float = 1 * GIB, **rows) -> Job:
    found = Rows(prompts, greedy=not critic, micro=4, prompt=16, answer=16, **rows)
    of_critic = model(True, zero_stage=2) if critic else None
    machine = Machine(ranks, memory=memory)
    return Job(model(zero_stage=2), found, machine, model(), (model(True),), of_critic, old_logprobs=critic)


def test_operations_by_hand():
    # 3 rows of 5 tokens attend to 1 + 2 + ... + 5 = 15 tokens; logits of 2 tokens a row
    assert forward(model(), 3, 5, 2) == 3 * (2 * WEIGHTS * 5 + 4 * 2 * 64 * 15 + 2 * 2 * 64 * 100)
    assert forward(model(True), 3, 5, 2) == pytest.approx(3 * (2 * WEIGHTS * 5 + 4 * 2 * 64 * 15), rel=0.01)
    once, plain = forward(model(), 3, 5, 2), model(zero_stage=2)
    assert learns(plain, 1, 3, 5, 2, 1).operations == 3 * once
    again = replace(plain, sketch=replace(plain.sketch, checkpointing=True))
    assert learns(again, 1, 3, 5, 2, 1).operations == 4 * once
    adapters = replace(plain, sketch=replace(plain.sketch, lora=(4, "all-linear", True)))
    assert learns(adapters, 1, 3, 5, 2, 1).operations == 2 * forward(adapters, 3, 5, 2)


def test_bytes_by_hand():
    frozen = model(zero_stage=3, offload_parameters=True)
    # of 4 ranks each fetches a quarter of the weights, and gets three quarters from the others; for each of 2 forwards
    of_read = reads(frozen, 4, 6, 5, forwards=2)
    assert (of_read.exchanged, of_read.fetched) == (2 * 2 * PARAMETERS * 0.75, 2 * 2 * PARAMETERS / 4)
    assert reads(model(), 4, 6, 5).exchanged == 0
    # ZeRO 2: gradients after each micro-batch, weights after the step; Adam in CPU memory: 4 + 2 bytes a parameter
    away = model(zero_stage=2, offload=True)
    of_update = learns(away, 4, 6, 5, 5, forwards=3)
    assert of_update.exchanged == (3 + 1) * 2 * PARAMETERS * 0.75
    assert of_update.fetched == 6 * PARAMETERS / 4
    assert adam(away, 4) == (PARAMETERS, 0) and adam(away, 16) == (PARAMETERS / 2, 0)  # 8 GPUs a machine
    assert adam(model(zero_stage=2), 4) == (0, 30 * PARAMETERS / 4)
    # keys and values: 2 layers, 2 key heads of 16 numbers, both, 2 bytes; 4 prompts of 10 tokens, 8 answers, half of 6
    assert decode(model(), 4, 8, 10, 6) == Decode(6, 2, 2 * PARAMETERS + 256 * (4 * 10 + 8 * 3))


DEVICE = Device(memory=1, half=100.0, single=50.0, bandwidth=10.0, link=5.0)
RATES = Rates(decode=0.5, forward=0.5, update=0.25, pcie=2.0, adam=4.0, launch=0.1, recorded=0.01, network=1.0)


def test_seconds_by_hand():
    decodes = [Decode(steps=3, layers=2, read=5.0), Decode(steps=3, layers=2, read=0.5)]
    decodes.append(Decode(steps=3, layers=2, read=0.5, recorded=True))
    done = Work(decodes, Part(100.0), Part(100.0, exchanged=20.0), Part(100.0, fetched=6.0), adam=8.0, states=10.0)
    found = seconds(done, job(), DEVICE, RATES)
    # 3 steps of 5 bytes at 5 a second, 3 that launch 2 layers, 3 that repeat them and read .5; prompts: 100 / 50
    assert found["generate"] == pytest.approx(3 * 1.0 + 3 * 0.2 + 3 * (0.02 + 0.1) + 2.0)
    assert found["score"] == pytest.approx(20 / 5)  # rather than 100 / 50
    assert found["update"] == pytest.approx(100 / 25 + 6 / 2 + 8 / 4 + 10 / 5)
    assert seconds(done, job(16), DEVICE, RATES)["score"] == pytest.approx(20.0)  # over the network
    assert hours(7200, job(2), 4.0) == pytest.approx(7200 / 16 * 4 / 3600)


def test_a_faster_device_quickens_what_it_bounds():
    done = work(job())
    base = seconds(done, job(), DEVICE, replace(RATES, launch=0))
    wide = seconds(done, job(), replace(DEVICE, bandwidth=20.0), replace(RATES, launch=0))
    prompts = done.generate.operations / 50
    assert wide["generate"] - prompts == pytest.approx((base["generate"] - prompts) / 2)
    assert wide["score"] == base["score"]
    few = replace(DEVICE, bandwidth=1e9)  # bound by launches: bandwidth is of no use
    assert seconds(done, job(), replace(few, bandwidth=2e9), RATES)["generate"] == pytest.approx(
        seconds(done, job(), few, RATES)["generate"]
    )
    quick = seconds(done, job(), replace(DEVICE, half=200.0), RATES)
    assert quick["score"] == pytest.approx(base["score"] / 2)


LLAMA = config_of("Llama-2-7b", "--model")


@pytest.mark.parametrize("way", [WAYS[0], WAYS[3], Way(3, 3, True, True, True)], ids=str)
def test_more_gpus_are_never_slower(way):
    def per_prompt(ranks: int, prompts: int) -> float:
        def large(scores: bool = False) -> Planned:
            return Planned(Sketch(LLAMA, torch.bfloat16, scores=scores), EngineConfig(2, dtype="bf16"))

        rows = Rows(prompts, greedy=True, micro=8)
        one = way.of(Job(large(), rows, Machine(ranks, memory=80 * GIB), large(), (large(True),)))
        return sum(seconds(work(one), one, DEVICES["a100"]).values()) / (prompts * ranks)

    times = [per_prompt(ranks, 16) for ranks in (1, 2, 4, 8)]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[3] > 0.9 * 8 if not way.offload else times[0] / times[3] > 4
    times = [per_prompt(4, prompts) for prompts in (1, 8, 64)]
    assert times == sorted(times, reverse=True)


def test_the_work_of_a_step():
    remax, ppo = work(job()), work(job(critic=True))
    (written,) = remax.decodes  # sampled and greedy answers together
    assert written == decode(model(), 8, 16, 16, 16)
    assert remax.generate.operations == forward(model(), 8, 16, 0)
    assert remax.score.operations == forward(model(True), 16, 32, 0) + forward(model(), 8, 32, 16)
    assert remax.update.operations == 3 * forward(model(), 8, 32, 16)
    critic = forward(model(True), 8, 32, 0)
    assert ppo.score.operations == 2 * forward(model(), 8, 32, 16) + 2 * critic
    assert ppo.update.operations == remax.update.operations + 3 * critic
    twice = work(job(batches=2))
    assert len(twice.decodes) == 2 and twice.update.operations == 2 * remax.update.operations
    # beside the models (14 bytes a parameter, 2 if frozen) half of what is free holds 3 prompts of 16 + 2 * 16 tokens
    at_rest = (14 + 2) * PARAMETERS + 2 * (PARAMETERS - 64 * 100 + 64)
    cramped = work(job(memory=at_rest + 2 * 3.5 * 256 * 48))
    assert [one.read for one in cramped.decodes] == [decode(model(), n, 2 * n, 16, 16).read for n in (3, 3, 2)]


def test_the_decode_by_graphs_takes_what_was_measured(root):
    """docs/results/rlhf_step_gpu.json: `recorded` is what its decode takes beside what it reads."""
    (cell, *_) = json.loads((root / "docs/results/rlhf_step_gpu.json").read_text())["cells"]
    setting, generate = cell["setting"], statistics.median(step["generate"] for step in cell["ways"]["ReMax"])
    sketch = Sketch(config_of("TinyLlama-1.1B", "--model"), torch.bfloat16)
    one = decode(Planned(sketch, EngineConfig(2, dtype="bf16")), 32, 64, setting["prompt"], setting["answer"], True)
    beside = generate / one.steps - one.read / (Rates().decode * DEVICES["h100"].bandwidth)
    assert Rates().recorded == pytest.approx(beside / one.layers, rel=0.02)
