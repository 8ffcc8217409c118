"""An exponential moving average of the policy's weights (--enable_ema), exported beside the policy.

It is shared out: each rank keeps its share of every trained tensor, in float32 in CPU memory, so that a step costs no
communication at any ZeRO stage. The shares are put together for the export.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from remax.checkpoint.export import full_state_dict
from utils.distributed import device, is_main, rank, world_size


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, after every step of the loop.

    Of LoRA's two factors each is averaged by itself, which is not the average of their product.
    """

    def __init__(self, hf: PreTrainedModel, *, zero3: bool, decay: float = 0.992):
        self.hf, self.zero3, self.decay = hf, zero3, decay
        self.average = {name: self._share(p).float() for name, p in hf.named_parameters() if p.requires_grad}

    def _share(self, parameter: nn.Parameter) -> Tensor:
        """(ceil(n / ranks),) of the n numbers, in CPU memory, cut as ZeRO-3 cuts them: in rank order, 0 at the end."""
        if self.zero3:
            share: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            return share.detach().to("cpu", copy=True)
        flat, length = parameter.detach().flatten(), -(-parameter.numel() // world_size())
        share = flat[rank() * length : (rank() + 1) * length]
        return pad(share, (0, length - len(share))).to("cpu", copy=True)

    @torch.no_grad()
    def update(self) -> None:
        """Every rank must call it."""
        for name, average in self.average.items():
            average.lerp_(self._share(self.hf.get_parameter(name)).float(), 1 - self.decay)

    def tensors(self) -> dict[tuple[str, int], Tensor]:
        """(parameter, start) -> this rank's numbers of it from `start` on; not copies."""
        parts = {}
        for name, average in self.average.items():
            start = rank() * len(average)
            if (length := min(len(average), self._size(name) - start)) > 0:
                parts[name, start] = average[:length]
        return parts

    @torch.no_grad()
    def restore(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Goes on from what `tensors` gave on all ranks; `read` takes a parameter, a start and a length."""
        for name, average in self.average.items():
            start = rank() * len(average)
            if (length := min(len(average), self._size(name) - start)) > 0:
                average[:length] = read(name, start, length)

    def _size(self, name: str) -> int:
        parameter = self.hf.get_parameter(name)
        return getattr(parameter, "ds_numel", parameter.numel())

    def state(self) -> dict[str, Tensor]:
        """The averaged weights in the model's dtype, on rank 0; empty elsewhere. Every rank must call it."""
        state = full_state_dict(self.hf, self.zero3)
        for name, average in self.average.items():
            share = average.to(self.hf.dtype)
            if dist.is_initialized():
                whole = torch.empty(len(share) * world_size(), dtype=share.dtype, device=device())
                dist.all_gather_into_tensor(whole, share.to(device()))
                share = whole.cpu() if is_main() else share
            if is_main():
                state[name] = share[: state[name].numel()].view_as(state[name])
        return state
