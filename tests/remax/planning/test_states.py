"""What DeepSpeed holds, with P parameters all of which learn: bytes worked out from its stages."""

from __future__ import annotations

import pytest

from remax.engines.deepspeed_config import EngineConfig
from remax.planning.dry_run import Sizes
from remax.planning.states import ROLLOUT, SCORING, STEP, UPDATE, Machine, frozen, gathered, gradients, trained

P = 7_000_000_000
WHOLE = Sizes(P, P, 100_000_000)
GPUS, CPU = Machine(8), Machine(2, cuda=False)


def at(phase: str, engine: EngineConfig, machine: Machine = GPUS, size: Sizes = WHOLE) -> float:
    return sum(term.at.get(phase, 0.0) for term in trained("actor", size, engine, machine))


def test_zero_2_in_16_bits():
    engine = EngineConfig(2, dtype="bf16")
    assert at(ROLLOUT, engine) == 2 * P + 12 * P / 8
    assert at(STEP, engine) == 2 * P + 12 * P / 8 + 4 * P / 8  # the gradients' sum in fp32
    assert at(ROLLOUT, EngineConfig(2, dtype="fp16")) == at(ROLLOUT, engine)


def test_zero_3_shares_everything():
    engine = EngineConfig(3, dtype="bf16")
    assert at(ROLLOUT, engine) == pytest.approx((2 + 12 + 4) * P / 8 + 2 * 5e8)  # and a bucket, of 5e8 at most
    assert gathered(WHOLE, engine) == 2 * 1e9 and gathered(WHOLE, engine, whole=True) == 2 * P
    assert gathered(WHOLE, EngineConfig(2, dtype="bf16")) == 0


def test_offloading_leaves_the_sums_of_gradients_on_the_gpu_but_at_zero_3():
    engine = EngineConfig(2, offload=True, dtype="bf16")
    on_its_way = 2 * WHOLE.largest
    assert at(ROLLOUT, engine) == 2 * P + on_its_way
    assert at(STEP, engine) == 2 * P + on_its_way + 4 * P / 8
    assert sum(term.host for term in trained("actor", WHOLE, engine, GPUS)) == (12 + 4 + 2) * P / 8
    assert at(STEP, EngineConfig(3, offload=True, dtype="bf16")) == 2 * P / 8 + 2 * 5e8


def test_fp32_on_a_cpu():
    small = Sizes(1000, 1000, 100)
    assert at(STEP, EngineConfig(0), CPU, small) == (4 + 8 + 4) * 1000  # weights, Adam, gradients
    # at ZeRO 2 the optimizer's weights are a copy; gradients, the same in one piece
    assert at(STEP, EngineConfig(2), CPU, small) == 4 * 1000 + (12 + 4 + 4) * 1000 / 2
    start, layers, sent, arrived = gradients(small, EngineConfig(2), CPU, micro_batches=2)
    assert (start.sums, layers.buckets) == (4 * 500, 4 * 1000)
    assert (sent.sums, sent.buckets) == (4 * 500, 8 * 1000) and (arrived.sums, arrived.buckets) == (8 * 500, 4 * 1000)
    assert at(SCORING, EngineConfig(2), CPU, small) == 4 * 1000 + 12 * 1000 / 2


def test_adapters_have_gradients_of_their_own_size():
    lora = Sizes(P, 40_000_000, 100_000_000)
    engine = EngineConfig(2, dtype="bf16")
    assert at(STEP, engine, GPUS, lora) == 2 * P + 16 * 40_000_000 / 8
    assert max(moment.buckets for moment in gradients(lora, engine, GPUS, 2)) == 3 * 2 * 40_000_000


def test_the_moments_of_a_backward_pass():
    engine = EngineConfig(2, dtype="bf16")
    head, layers, reduced = gradients(WHOLE, engine, GPUS, micro_batches=4)
    assert (head.kept, head.head, head.sums, head.buckets) == (1, True, 4 * P / 8, 0)  # no gradient yet but the sums
    assert (layers.kept, layers.buckets) == (1, 2 * 2 * 5e8)  # one is filled while the other travels
    assert reduced.kept == pytest.approx(1 - 5e8 / P) and reduced.buckets == 3 * 2 * 5e8
    assert next(gradients(WHOLE, engine, GPUS, micro_batches=1)).sums == 0
    (*_, last) = gradients(WHOLE, EngineConfig(1, dtype="bf16"), GPUS, 2)
    assert last.buckets == 3 * 4 * 5e8  # ZeRO 1 sends what is summed, in fp32


def test_frozen_models():
    share = {stage: frozen("reward model", WHOLE, EngineConfig(stage, dtype="bf16"), GPUS)[0] for stage in (0, 3)}
    assert (share[0].at[UPDATE], share[3].at[UPDATE]) == (2 * P, 2 * P / 8)
    (away,) = frozen("reward model", WHOLE, EngineConfig(3, offload_parameters=True, dtype="bf16"), GPUS)
    assert not away.at and away.host == 2 * P / 8
