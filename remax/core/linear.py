"""A linear layer of 16-bit numbers that gives its sums in float32, as they were added up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """(n, k) @ (k, m), in float32 where the numbers have 16 bits."""
    if a.dtype not in SIXTEEN_BITS:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _LinearInFloat32(torch.autograd.Function):
    """The weight itself is kept for the backward pass, no view or copy of it: at ZeRO-3 it is gone in between."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return product_in_float32(hidden, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        grad = grad.to(weight.dtype)  # (n, V), as the backward of a layer of 16 bits has it
        grad_hidden = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = grad.t() @ hidden if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight


def linear_in_float32(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Hidden @ weight^T + bias, (..., H) and (V, H) -> (..., V), in float32 where the numbers have 16 bits.

    A logit of 20 that is rounded to bfloat16 has steps of 1/8, and so would log-probs; the sums of the product are
    float32 until then.
    """
    hidden = hidden.to(weight.dtype)
    if weight.dtype not in SIXTEEN_BITS:
        return F.linear(hidden, weight, bias)
    logits = _LinearInFloat32.apply(hidden.flatten(0, -2), weight).unflatten(0, hidden.shape[:-1])
    return logits if bias is None else logits + bias
