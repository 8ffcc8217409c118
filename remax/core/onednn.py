"""The linear layers of a float32 model on a CPU by oneDNN, which torch brings along, where nothing is learned.

torch multiplies such numbers by MKL. On an AMD CPU oneDNN needs 10 to 20 % less for the many tokens of a forward. For
the few rows of a decode either of them spends as long on arranging a weight as on the product itself; oneDNN takes
weights that it has arranged before. So with 4 to 32 rows a layer of 256 to 1024 numbers is 1.2 to 1.6 times as fast, a
head of 8192 words 1.5 to 2.5 times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MOST_BYTES = 2**31  # of weights that are copied
FEWEST_ROWS = 3  # of a product by an arranged weight: below, calling oneDNN takes longer than it saves
USUAL_ROWS = 64  # that the arrangement is made for; for 1 it would be another
MANY_ROWS = 512  # of a product that is worth arranging the weight for


@contextmanager
def for_few_rows(model: nn.Module) -> Iterator[None]:
    """Inside, the model multiplies by copies of its weights that have been arranged."""
    layers = _layers(model)
    weights = {id(layer.weight): layer.weight.detach() for layer in layers}  # tied ones once
    if sum(w.numel() * w.itemsize for w in weights.values()) > MOST_BYTES:
        layers, weights = [], {}
    copies = {i: torch.ops.mkldnn._reorder_linear_weight(w, USUAL_ROWS) for i, w in weights.items()}
    with _multiplied({layer: _forward(layer, copies[id(layer.weight)], FEWEST_ROWS) for layer in layers}):
        yield


@contextmanager
def for_many_rows(model: nn.Module) -> Iterator[None]:
    """Inside, the model multiplies many rows by its weights, which are arranged in each product."""
    with _multiplied({layer: _forward(layer, layer.weight, MANY_ROWS) for layer in _layers(model)}):
        yield


def _layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers; none where oneDNN does not serve all of them, or ZeRO-3 gathers their weights."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    weights = [layer.weight for layer in layers]
    # the operators that torch's compiler makes of a linear layer on a CPU
    names = ("_reorder_linear_weight", "_linear_pointwise")
    here = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    suits = all(w.is_cpu and w.dtype == torch.float32 and not hasattr(w, "ds_id") for w in weights)
    return layers if here and suits else []


def _forward(layer: nn.Linear, weight: Tensor, fewest: int) -> Callable[..., Any]:
    """A forward of the layer, which leaves to the one that it has what is no plain product, small, or learned from."""
    otherwise = layer.forward

    def forward(hidden: Tensor, **options: Any) -> Any:
        if options or hidden.numel() < fewest * layer.in_features or torch.is_grad_enabled():
            return otherwise(hidden, **options)
        return torch.ops.mkldnn._linear_pointwise(hidden, weight, layer.bias, "none", [], "")

    return forward


@contextmanager
def _multiplied(forwards: dict[nn.Linear, Callable[..., Any]]) -> Iterator[None]:
    """Inside, layers have these forwards."""
    before = {layer: layer.__dict__.get("forward") for layer in forwards}
    try:
        for layer, forward in forwards.items():
            layer.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for layer, former in before.items():
            del layer.forward
            if former is not None:
                layer.forward = former  # type: ignore[method-assign]
