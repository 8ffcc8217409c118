"""How weights lie in memory while a CPU decodes.

A linear layer multiplies by its transposed weight. For the few rows of a decode a CPU's product spends a fifth to a
third of its time on that transposition, so it is done once, before a rollout of many steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

MOST_BYTES = 2**31  # of weights that are copied


@contextmanager
def laid_out_for_few_rows(model: nn.Module) -> Iterator[None]:
    """Inside, the linear layers of a float32 model on a CPU have copies of their weights, stored column by column.

    The weights themselves are left alone, and are the layers' again afterwards.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and "weight" in module._parameters]
    before = [layer.weight for layer in layers]
    own = {id(weight): weight for weight in before}  # tied ones once
    suits = all(w.is_cpu and w.dtype == torch.float32 and w.dim() == 2 for w in before)
    suits = suits and not any(hasattr(w, "ds_id") for w in before)  # ZeRO-3 looks for its own parameters
    if not suits or sum(w.numel() * w.itemsize for w in own.values()) > MOST_BYTES:
        yield
        return
    copies = {i: nn.Parameter(w.detach().t().contiguous().t(), requires_grad=False) for i, w in own.items()}
    try:
        for layer, weight in zip(layers, before, strict=True):
            layer.weight = copies[id(weight)]
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.weight = weight
