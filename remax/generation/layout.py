"""Products with weights that are laid out once while a CPU decodes.

torch multiplies numbers of 32 bits by MKL, which arranges a weight anew in each product. For the few rows of a decode
that takes up to as long as the product itself. oneDNN, which torch brings along, takes weights that it has arranged
before. With 4 to 32 rows a layer of 256 to 1024 numbers is 1.2 to 1.6 times as fast so, a head of 8192 words 1.5 to 2.5
times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MOST_BYTES = 2**31  # of weights that are copied
FEWEST_ROWS = 3  # below, calling oneDNN takes longer than it saves
USUAL_ROWS = 64  # that the arrangement is made for; for 1 it would be another


@contextmanager
def laid_out_for_few_rows(model: nn.Module) -> Iterator[None]:
    """Inside, the linear layers of a float32 model on a CPU multiply by arranged copies of their weights.

    The weights themselves are left alone. There are no gradients inside.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    weights = {id(layer.weight): layer.weight.detach() for layer in layers}  # tied ones once
    suits = all(w.is_cpu and w.dtype == torch.float32 for w in weights.values()) and _is_here()
    suits = suits and not any(hasattr(layer.weight, "ds_id") for layer in layers)  # ZeRO-3 gathers its own parameters
    if not suits or sum(w.numel() * w.itemsize for w in weights.values()) > MOST_BYTES:
        yield
        return
    copies = {i: torch.ops.mkldnn._reorder_linear_weight(w, USUAL_ROWS) for i, w in weights.items()}
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = _multiply(layer, copies[id(layer.weight)])  # type: ignore[method-assign]
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward  # type: ignore[method-assign]


def _is_here() -> bool:
    """Whether this torch has oneDNN, and the two operators that its compiler makes of a linear layer on a CPU."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _multiply(layer: nn.Linear, copy: Tensor) -> Callable[..., Any]:
    """The layer's forward; what is no plain product is left to the one that it has."""
    otherwise = layer.forward

    def forward(hidden: Tensor, **options: Any) -> Any:
        if options or hidden.numel() < FEWEST_ROWS * layer.in_features:
            return otherwise(hidden, **options)
        return torch.ops.mkldnn._linear_pointwise(hidden, copy, layer.bias, "none", [], "")

    return forward
