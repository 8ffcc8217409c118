"""An exponential moving average of the policy's weights (--enable_ema), exported beside the policy.

It lives in float32 in rank 0's memory and is fed from the same gathered state dict that exports use, so that it is
right at every ZeRO stage; the price is one gathering of the weights per step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from remax.checkpoint.export import full_state_dict


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, after every step of the loop.

    Of LoRA's two factors each is averaged by itself, which is not the average of their product.
    """

    def __init__(self, hf: PreTrainedModel, *, zero3: bool, decay: float = 0.992):
        self.hf, self.zero3, self.decay = hf, zero3, decay
        self.average = {name: tensor.float() for name, tensor in full_state_dict(hf, zero3).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Every rank must call it."""
        for name, tensor in full_state_dict(self.hf, self.zero3).items():
            self.average[name].lerp_(tensor.float(), 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights in the model's dtype, on rank 0; empty elsewhere."""
        return {name: tensor.to(self.hf.dtype) for name, tensor in self.average.items()}
