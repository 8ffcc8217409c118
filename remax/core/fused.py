"""Log-probs and entropy straight from hidden states and the head's weight, with few passes over the vocabulary.

With logits z = c (W h + b), a drawn word y, and for each token

    s = sum_v exp(z_v - max z),     D = exp(z - max z) - s 1_y,     so that D / s = p - 1_y,

the gradients of its log-prob log p_y = z_y - max z - log s are products with D, scaled by a number:

    in h: -(c / s) W^T D            in W: -(c / s) D h^T            in b: -(c / s) D

So D takes the place of the logits, D W is made while D is there, and the backward pass scales it by what arrives. For
the gradient of the weight D is kept where there is one chunk; with several that of each is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from remax.core.linear import product_in_float32


def fused_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    targets: Tensor,
    chunks: int = 1,
    scale: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """(n, H) hidden states, (V, H) weight, (V,) bias, (n,) targets -> log-probs and entropies, each (n,).

    Both are in float32 or wider. The entropy carries no gradient, and is 0 where it is not asked for.

    Args:
        weight: Of float32, float64 or bfloat16; D does not fit the range of float16.
        chunks: Pieces of which one's logits are in memory at a time.
        scale: c, by which the logits are multiplied.
    """
    if bias is not None:  # a word may be ruled out by -inf, and 0 times that is no number
        bias = bias.clamp(min=torch.finfo(bias.dtype).min / 4)
    learns = torch.is_grad_enabled()
    return _FusedStats.apply(hidden.to(weight.dtype), weight, bias, targets[:, None], chunks, scale, entropy, learns)


class _FusedStats(torch.autograd.Function):
    """The weight itself is kept for the backward pass, no view or copy of it: at ZeRO-3 it is gone in between."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (n, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (n, 1)
        chunks: int,
        scale: float,
        entropy: bool,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_weight, of_bias = (learns and needed for needed in ctx.needs_input_grad[:3])
        columns: list[tuple[Tensor, ...]] = []  # of each chunk
        kept = None
        for h, y in zip(hidden.tensor_split(chunks), targets.tensor_split(chunks), strict=True):
            z = _logits(h, weight, bias, scale)  # (n, V)
            highest = z.amax(-1, keepdim=True)  # (n, 1), as all that follows
            of_target = z.gather(-1, y) - highest
            z -= highest
            exp = z.exp() if entropy else z.exp_()
            total = exp.sum(-1, keepdim=True)
            log_total = total.log()
            h_of_p = log_total - z.mul_(exp).sum(-1, keepdim=True) / total if entropy else torch.zeros_like(total)
            del z  # (n, V) is not small
            product = total  # nothing to be read
            if of_hidden or of_weight or of_bias:
                d = exp.scatter_add_(-1, y, -total).to(weight.dtype)
                product = product_in_float32(d, weight) if of_hidden else total
                kept = d if chunks == 1 and (of_weight or of_bias) else None
            columns.append((of_target - log_total, h_of_p, highest, total, product))
        logprobs, entropies, highest, total, product = map(torch.cat, zip(*columns, strict=True))
        ctx.chunks, ctx.scale = chunks, scale
        ctx.save_for_backward(hidden, weight, bias, targets, highest, total, product, kept)
        ctx.mark_non_differentiable(entropies := entropies.squeeze(-1))
        return logprobs.squeeze(-1), entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, highest, total, product, kept = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        factor = -ctx.scale * grad[:, None] / total  # (n, 1)
        grad_hidden = (factor * product).to(hidden.dtype) if of_hidden else None
        grad_weight = grad_bias = None
        if of_weight or of_bias:
            of_chunks = [x.tensor_split(ctx.chunks) for x in (hidden, targets, highest, total, factor)]
            for h, y, high, s, f in zip(*of_chunks, strict=True):
                d = kept
                if d is None:
                    exp = _logits(h, weight, bias, ctx.scale).sub_(high).exp_()
                    d = exp.scatter_add_(-1, y, -s).to(weight.dtype)
                if of_weight:
                    scaled = (f * h).to(weight.dtype)
                    grad_weight = d.t() @ scaled if grad_weight is None else grad_weight.addmm_(d.t(), scaled)
                if of_bias:
                    of_chunk = d.t() @ f.squeeze(-1).to(weight.dtype)
                    grad_bias = of_chunk if grad_bias is None else grad_bias + of_chunk
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = product_in_float32(hidden, weight.t())
    if bias is not None:
        logits += bias
    return logits if scale == 1.0 else logits.mul_(scale)
