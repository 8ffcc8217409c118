"""Phases of a job, and the batch that fits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from remax.engines.deepspeed_config import EngineConfig
from remax.planning.advice import WAYS, Way, choose, in_batches, largest, micro_of
from remax.planning.dry_run import Sketch
from remax.planning.phases import GIB, Job, Planned, Rows, plan
from remax.planning.shapes import config_of
from remax.planning.states import CRITIC_UPDATE, EVALUATION, PHASES, ROLLOUT, SCORING, STEP, UPDATE, Machine


def job(name: str, rows: Rows, gpus: int = 1, ppo: bool = False) -> Job:
    config = config_of(name, "--model")

    def model(scores: bool = False, zero: int = 0) -> Planned:
        return Planned(Sketch(config, torch.bfloat16, scores=scores), EngineConfig(zero, dtype="bf16"))

    critic = model(True, 2) if ppo else None
    return Job(model(zero=2), rows, Machine(gpus), model(), (model(True),), critic, old_logprobs=ppo)


@pytest.mark.parametrize("ppo", (False, True))
def test_the_measured_peak_of_a_gpu(ppo, root):
    measured = json.loads((root / "docs/results/memory.json").read_text())[f"1.1B, {'PPO' if ppo else 'ReMax'}"]
    rows = Rows(32, greedy=not ppo, micro=16, evaluated=16, prompt=64, answer=128)
    found = plan(job("TinyLlama-1.1B", rows, ppo=ppo))
    assert {phase: found.of(phase) for phase in measured} == pytest.approx(measured, rel=0.03)
    assert set(found.phases) == set(measured)
    assert found.of(UPDATE) == found.peak
    assert (CRITIC_UPDATE in found.phases) == ppo


def test_phases_and_rows():
    rows = Rows(8, samples=1, greedy=True, micro=4, evaluated=16, prompt=128, answer=128)
    assert (rows.answers, rows.decoded, rows.decoded, rows.micro_batches) == (8, 16, 16, 2)
    # 16 rows are 4 micro-batches, all of which go together; of 100 rows of 256 tokens 32 have 8192
    assert (rows.together(16), rows.together(100)) == (16, 25)
    assert rows.together(16, share=True) == 12  # 8 prompts and 16 answers of 128 tokens
    small, large = (plan(job("gpt2", Rows(n, greedy=True, micro=4, prompt=128, answer=128))) for n in (8, 16))
    assert large.of(ROLLOUT) > small.of(ROLLOUT)
    assert large.of(UPDATE) == small.of(UPDATE)  # micro-batches of the same size
    assert small.phases == [ROLLOUT, SCORING, UPDATE, STEP, EVALUATION]
    on_cpu = Planned(Sketch(config_of("opt-125m", "--model"), torch.float32, cuda=False), EngineConfig())
    held = plan(Job(on_cpu, Rows(4, micro=4, prompt=8, answer=8), Machine(cuda=False)))
    (laid_out,) = [term.at[ROLLOUT] for term in held.terms if "weights as a CPU reads" in term.name]
    assert laid_out == 4 * (12 * 12 * 768**2 + 50272 * 768)  # 12 layers of 4 + 2 * 4 squares, and the head
    steps = plan(job("gpt2", Rows(micro=4, batches=2, prompt=0, answer=128)))
    assert steps.phases == [UPDATE, STEP, EVALUATION]
    assert small.peak == max(small.of(phase) for phase in small.phases)
    assert not plan(job("gpt2", rows)).fits(1 * GIB)


def test_what_recorded_steps_work_on_stays():
    # 12 layers of keys and values of 768 numbers of 2 bytes, for 127 tokens of 8 prompts and two answers each of 128;
    # 7 prompts are rounded up to as many.
    one = job("gpt2", Rows(8, greedy=True, micro=4, prompt=128, answer=128))
    fresh, kept = plan(one), plan(replace(one, cuda_graphs=True))
    (cache,) = [term.at for term in kept.terms if term.name == "CUDA graphs: keys and values of the answers"]
    assert set(cache) == set(PHASES) and cache[UPDATE] == pytest.approx(24 * 768 * 2 * 8 * (127 + 256), rel=0.02)
    assert kept.of(UPDATE) >= fresh.of(UPDATE) + cache[UPDATE] and kept.of(ROLLOUT) == fresh.of(ROLLOUT)
    seven = plan(replace(one.with_rows(7, 4), cuda_graphs=True))
    assert cache in [term.at for term in seven.terms]


@pytest.mark.parametrize("micro", [0, 4])
def test_the_largest_batch_fits_and_a_larger_one_does_not(micro):
    one = WAYS[0].of(job("gpt2", Rows(greedy=True, evaluated=4, prompt=128, answer=128)))
    found = largest(one, 10 * GIB, micro)
    prompts = found.job.rows.prompts
    assert found.fits(10 * GIB) and prompts > 8
    assert not in_batches(one, prompts + max(micro, 1), micro).fits(10 * GIB)
    assert largest(one, 2 * GIB, micro) is None


def test_micro_batches_cut_answers_evenly():
    assert [micro_of(n, Rows(), 8) for n in (3, 8, 12, 16)] == [3, 8, 6, 8]
    assert micro_of(5, Rows(samples=4), 0) == 20 and micro_of(3, Rows(samples=4), 8) == 6
    # of 16 answers to each of 3 prompts one is learned from, or two that stay together
    assert micro_of(3, Rows(samples=16, kept=1), 8) == 3
    assert [micro_of(6, Rows(samples=16, kept=2), micro) for micro in (1, 7, 0)] == [2, 6, 12]


def test_what_is_said_of_7b():
    # On 4 GPUs of 80 GB without offloading PPO does not fit, ReMax does, with 16 prompts on each.
    memory, spread = 80 * GIB, Way(2, 3, checkpointing=True)
    remax, ppo = (job("Llama-2-7b", Rows(greedy=not ppo), 4, ppo) for ppo in (False, True))
    assert in_batches(spread.of(remax), 16, 16).fits(memory)
    assert not in_batches(spread.of(ppo), 1, 1).fits(memory)
    assert in_batches(Way(2, 3, checkpointing=True, offload=True).of(ppo), 16, 16).fits(memory)


def test_the_first_way_with_enough_rows_is_taken():
    of_gpt2 = job("gpt2", Rows(greedy=True, prompt=64, answer=64))
    few, many, most = (in_batches(of_gpt2, n, 0) for n in (2, 16, 64))
    found = list(zip(WAYS, (few, many, most), strict=False))
    assert choose(found) == (WAYS[1], many)  # 32 rows with the greedy ones
    assert choose(found, wanted=20) == (WAYS[2], most)
    assert choose(found[:1]) == (WAYS[0], few)


def test_flags_of_a_way():
    assert Way(2, 3, True, True, True).flags(critic=True, reference=True, reward=False) == [
        "--actor_zero_stage 2",
        "--actor_gradient_checkpointing",
        "--critic_gradient_checkpointing",
        "--offload",
        "--offload_reference_model",
    ]
