"""From a few typed settings to DeepSpeed's configuration dictionary; the only place that knows its keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

LARGEST_BUCKET = 500_000_000  # DeepSpeed's default
# Parameters that ZeRO-3 has put together at a time. A layer of a 7B model has 200 million: with less than a few layers'
# worth each gather waits for the one before.
MOST_LIVE = 1_000_000_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EngineConfig:
    """How one model is spread over the ranks.

    Attributes:
        zero_stage: 0 (a copy on each rank) to 3 (optimizer states, gradients and parameters partitioned).
        offload: A trained model's optimizer states in CPU memory (stage >= 1).
        offload_parameters: The parameters in CPU memory (stage 3), trained or frozen.
        dtype: `fp32`, `bf16` or `fp16`.
        micro_batch_size: Rows per forward on one rank.
        gradient_clipping: Largest gradient norm, 0 for none.
    """

    zero_stage: int = 0
    offload: bool = False
    offload_parameters: bool = False
    dtype: str = "fp32"
    micro_batch_size: int = 1
    gradient_clipping: float = 1.0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format as torch knows it."""
        return DTYPES[self.dtype]


def _common(config: EngineConfig) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        # The loss is normalised by its own global denominator, and the engine wrapper says which micro-batch is the
        # last, so DeepSpeed must neither divide by a number of steps nor count to one.
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "bf16": {"enabled": config.dtype == "bf16"},
        "fp16": {"enabled": config.dtype == "fp16", "initial_scale_power": 16, "loss_scale_window": 100},
        # Gradients of 16 bits are added up in fp32: a sum of 128 micro-batches in bf16 is wrong in its second digit.
        "data_types": {"grad_accum_dtype": "fp32"},
        "wall_clock_breakdown": False,
    }


def _zero3(offload_parameters: bool) -> dict[str, Any]:
    return {
        "offload_param": {"device": "cpu" if offload_parameters else "none", "pin_memory": torch.cuda.is_available()},
        "stage3_param_persistence_threshold": 10_000,
        "stage3_max_live_parameters": MOST_LIVE,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_gather_16bit_weights_on_model_save": True,
    }


def training_config(config: EngineConfig, parameters: int = LARGEST_BUCKET) -> dict[str, Any]:
    """For a model of which so many parameters learn."""
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": torch.cuda.is_available()}
    # Buffers of so many numbers are held for the gradients: no more than there are, but an even number.
    bucket = min(LARGEST_BUCKET, parameters + parameters % 2)
    zero |= dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size"), bucket)
    if config.zero_stage >= 1:
        zero["offload_optimizer"] = {
            "device": "cpu" if config.offload else "none",
            "pin_memory": torch.cuda.is_available(),
        }
    if config.zero_stage == 3:
        zero |= _zero3(config.offload_parameters)
    return _common(config) | {
        "zero_optimization": zero,
        "gradient_clipping": config.gradient_clipping,
        "zero_allow_untested_optimizer": True,
    }


def inference_config(config: EngineConfig) -> dict[str, Any]:
    """For a frozen model at ZeRO-3; at stage 0 a frozen model needs no engine."""
    zero = {"stage": 3, "overlap_comm": torch.cuda.is_available()} | _zero3(config.offload_parameters)
    return _common(config) | {"zero_optimization": zero}
