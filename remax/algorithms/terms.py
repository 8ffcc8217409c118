"""The terms that the algorithms' formulas are made of: free functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from remax.algorithms.kl import reverse_cumsum

AGGREGATIONS = ("sequence", "token", "sequence_mean", "constant")


def clip(x: Tensor, limit: float) -> Tensor:
    """The values, none beyond [-limit, limit]; a limit of 0 does not clip."""
    return x.clamp(-limit, limit) if limit else x


def clipped_difference(reward: Tensor, baseline: Tensor, limit: float, clip_on: str) -> Tensor:
    """(B,) rewards and baselines -> (B,) clip(r - b) on the `difference`, clip(r) - clip(b) on the `reward`."""
    return clip(reward - baseline, limit) if clip_on == "difference" else clip(reward, limit) - clip(baseline, limit)


def discount(mask: Tensor, gamma: float, dtype: torch.dtype) -> Tensor:
    """(B, A) mask -> (B, A) weights gamma^(T-t+1), t = 1..T: a factor for each token left, the present one included.

    The last token has exponent 1, as in the ReMax authors' code. gamma = 1 is Algorithm 1 of the paper.
    """
    left = reverse_cumsum(mask.long())  # T, T-1, .., 1, 0, 0
    return torch.full((), gamma, dtype=dtype, device=mask.device) ** left * mask


def grouped(x: Tensor, samples_per_prompt: int) -> Tensor:
    """(B,) -> (B/k, k): the k answers of one prompt stand in adjacent rows."""
    if len(x) % samples_per_prompt:
        raise ValueError(f"{len(x)} answers cannot be groups of {samples_per_prompt} answers to one prompt")
    return x.view(-1, samples_per_prompt)


def leave_one_out_mean(x: Tensor, samples_per_prompt: int) -> Tensor:
    """(B,) -> (B,): mean of the other answers to the same prompt."""
    groups = grouped(x, samples_per_prompt)  # (B/k, k)
    return ((groups.sum(1, keepdim=True) - groups) / (samples_per_prompt - 1)).flatten()


def weighted_mean_of_others(x: Tensor, weights: Tensor, samples_per_prompt: int) -> Tensor:
    """(B,) numbers, (B, A) weights -> (B, A): mean of the other answers to the same prompt, by their weights.

    Where all of these are zero it is the plain mean.
    """
    groups = (weights.double() + 1e-9).view(-1, samples_per_prompt, weights.shape[1])  # (B/k, k, A)
    values = grouped(x, samples_per_prompt).double()[..., None] * groups
    others = (values.sum(1, keepdim=True) - values) / (groups.sum(1, keepdim=True) - groups)
    return others.flatten(0, 1).to(x.dtype)


def whitened(
    x: Tensor, mask: Tensor, sum_across_ranks: Callable[[Mapping[str, float | Tensor]], dict[str, float]]
) -> Tensor:
    """(B, A), or (B, 1) of whole answers -> mean 0 and variance 1 over the answer tokens of all ranks."""
    double = x.double()
    sums = sum_across_ranks({"x": (double * mask).sum(), "xx": (double.square() * mask).sum(), "n": mask.sum()})
    mean = sums["x"] / sums["n"]
    std = max(sums["xx"] / sums["n"] - mean**2, 0.0) ** 0.5
    found = (x - mean) / (std + 1e-8)
    return found if x.shape[1] == 1 else found.masked_fill(~mask, 0.0)


def aggregate(per_token: Tensor, mask: Tensor, aggregation: str, denominator: float | Tensor) -> Tensor:
    """(B, A) -> scalar: sum over the answer tokens, divided by the step's denominator.

    `sequence` sums over an answer's tokens, and the denominator counts answers: unbiased for E[R]. For `token` the
    denominator counts answer tokens. Their number is random too, so a step of few answers is a little biased (as
    1 / answers). `sequence_mean` takes the mean over an answer's tokens, so that each token of a long answer counts
    less, and the denominator counts answers. For `constant` it counts the tokens that the answers might have had at
    most (Dr. GRPO, Liu et al., arXiv 2503.20783): `sequence`, divided by that length.
    """
    per_token = per_token.masked_fill(~mask, 0.0)
    if aggregation == "sequence_mean":
        per_token = per_token / mask.sum(1, keepdim=True).clamp(min=1)
    return per_token.sum() / denominator


def masked_total(x: Tensor, mask: Tensor) -> Tensor:
    """(B, A) -> scalar sum over answer tokens, detached: a metric."""
    return x.detach().masked_fill(~mask, 0.0).sum()


def token_advantages(advantage: Tensor, mask: Tensor, gamma: float, penalty: Tensor) -> Tensor:
    """(B, 1) advantage of the answer, (B, A) penalty -> (B, A): A_t = gamma^(T-t+1) * advantage - penalty_t."""
    return discount(mask, gamma, penalty.dtype) * advantage.to(penalty.dtype) - penalty
