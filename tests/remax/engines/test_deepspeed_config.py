"""What DeepSpeed is told, for each way to spread a model."""

from __future__ import annotations

import pytest
import torch

from remax.engines.deepspeed_config import DTYPES, EngineConfig, inference_config, training_config


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("offload", [False, True])
def test_training(stage, offload):
    config = training_config(EngineConfig(stage, offload, micro_batch_size=3, gradient_clipping=0.5))
    zero = config["zero_optimization"]
    assert zero["stage"] == stage
    assert zero.get("offload_optimizer", {}).get("device") == {True: "cpu", False: "none"}[offload] or stage == 0
    assert ("offload_param" in zero) == (stage == 3)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_clipping"] == 0.5
    # The loss has its own denominator and the wrapper names the last micro-batch: DeepSpeed must divide by nothing.
    assert config["gradient_accumulation_steps"] == 1


def test_buckets_are_no_larger_than_the_model():
    zero = training_config(EngineConfig(2), parameters=1000)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 1000
    zero = training_config(EngineConfig(2), parameters=7_000_000_000)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 500_000_000
    assert (
        training_config(EngineConfig(2), parameters=1001)["zero_optimization"]["allgather_bucket_size"] == 1002
    )  # even


def test_the_next_layers_travel_while_one_computes(monkeypatch):
    # Two layers of 200 million parameters must fit at the least, or every gather waits for the one before.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for make in (training_config, inference_config):
        zero = make(EngineConfig(3))["zero_optimization"]
        assert zero["overlap_comm"] and zero["stage3_max_live_parameters"] >= 2 * 200_000_000
        assert 5e7 <= zero["stage3_prefetch_bucket_size"] <= 1e8


def test_gradients_are_added_up_in_fp32():
    assert training_config(EngineConfig(2, dtype="bf16"))["data_types"] == {"grad_accum_dtype": "fp32"}


def test_parameters_are_offloaded_only_where_asked():
    def device(config: EngineConfig) -> str:
        return training_config(config)["zero_optimization"]["offload_param"]["device"]

    assert device(EngineConfig(3, offload=True)) == "none"
    assert device(EngineConfig(3, offload=True, offload_parameters=True)) == "cpu"


@pytest.mark.parametrize("offload", [False, True])
def test_inference_needs_no_optimizer(offload):
    config = inference_config(EngineConfig(3, offload_parameters=offload))
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["offload_param"]["device"] == ("cpu" if offload else "none")
    # A model is partitioned while it is read, with the training configuration (`engines.loading`), and its parts stay
    # where they were put then: the two configurations must agree on the place.
    reading = training_config(EngineConfig(3, offload_parameters=offload))
    assert config["zero_optimization"]["offload_param"] == reading["zero_optimization"]["offload_param"]
    assert "offload_optimizer" not in config["zero_optimization"] and "gradient_clipping" not in config


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_precision(dtype):
    for config in (training_config(EngineConfig(2, dtype=dtype)), inference_config(EngineConfig(3, dtype=dtype))):
        assert {name for name in ("bf16", "fp16") if config[name]["enabled"]} == {dtype} - {"fp32"}
    assert EngineConfig(dtype=dtype).torch_dtype == DTYPES[dtype]
    assert {torch.float32, torch.bfloat16, torch.float16} == set(DTYPES.values())


def test_the_library_accepts_every_configuration():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in range(4):
        for offload in (False, True):
            for make in (training_config, inference_config):
                zero = DeepSpeedZeroConfig(**make(EngineConfig(stage, offload))["zero_optimization"])
                assert zero.stage == (stage if make is training_config else 3)
