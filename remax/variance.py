"""How noisy the gradient is: sizes of advantages under different baselines on the same answers, and the gradient's own
variance.

The gradient of one answer is A * sum_t grad log pi(y_t). A constant added to A leaves its expectation alone and adds
noise, so what counts is the mean SQUARE of A, not its spread around its own mean: by the latter no baseline and the
mean reward would look alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from remax.algorithms.shared import Totals, grouped, leave_one_out_mean, on_one_rank


def advantage_variances(
    rewards: Tensor,
    greedy: Tensor | None = None,
    samples_per_prompt: int = 1,
    moving_average: float | None = None,
    sum_across_ranks: Callable[[dict[str, float | Tensor]], Totals] = on_one_rank,
    tolerance: float = 1e-6,
) -> Totals:
    """(B,) rewards, answers to one prompt adjacent, and the same answers' other baselines -> means over the answers of
    all ranks.

    variance/none            r^2
    variance/mean            (r - mean of all answers)^2
    variance/greedy          (r - greedy)^2                      with `greedy`, (B,)
    variance/leave_one_out   (r - mean of the group's others)^2  with samples_per_prompt >= 2
    variance/moving_average  (r - moving_average)^2              with `moving_average`
    no_signal/greedy         share of prompts whose answers all score as the greedy one, within `tolerance`
    no_signal/group          share of prompts whose answers all score alike: nothing is learned from them
    Variances in squared units of reward.
    """
    rewards = rewards.double()
    sums = sum_across_ranks({"r": rewards.sum(), "n": len(rewards)})
    mean = sums["r"] / sums["n"]
    squares = {"variance/none": rewards, "variance/mean": rewards - mean}  # (B,) each
    silent = {}
    if greedy is not None:
        squares["variance/greedy"] = rewards - greedy.double()
        silent["no_signal/greedy"] = grouped(squares["variance/greedy"].abs(), samples_per_prompt).amax(1) <= tolerance
    if samples_per_prompt > 1:
        squares["variance/leave_one_out"] = rewards - leave_one_out_mean(rewards, samples_per_prompt)
        groups = grouped(rewards, samples_per_prompt)  # (B/k, k)
        silent["no_signal/group"] = groups.amax(1) - groups.amin(1) <= tolerance
    if moving_average is not None:
        squares["variance/moving_average"] = rewards - moving_average
    totals = {name: x.square().sum() for name, x in squares.items()}
    totals |= {name: x.sum() * samples_per_prompt for name, x in silent.items()}
    return {name: total / sums["n"] for name, total in sum_across_ranks(totals).items()}


def project(gradients: Iterable[Tensor | None], count: int, seed: int) -> Tensor:
    """Gradient of one estimate, by parameter (None: zero) -> (count,) float64 products with random +-1 vectors.

    The vectors depend on `seed` and the parameter's place only, so gradients to be compared must be listed in one
    order. They are drawn anew each time and never stored: memory is one vector of the largest parameter. Where each
    rank holds a shard of the gradient, give each rank a seed of its own and add the products up over ranks.
    """
    products = None
    for place, gradient in enumerate(gradients):
        if gradient is None:
            continue
        flat = gradient.detach().flatten()
        generator = torch.Generator(flat.device).manual_seed(seed * 1_000_003 + place)
        products = torch.zeros(count, dtype=torch.float64, device=flat.device) if products is None else products
        for j in range(count):
            signs = torch.randint(0, 2, flat.shape, generator=generator, device=flat.device, dtype=torch.int8) * 2 - 1
            products[j] += (flat * signs).sum(dtype=torch.float64)
    return torch.zeros(count, dtype=torch.float64) if products is None else products


@dataclass(frozen=True)
class GradientVariance:
    """variance: trace of the covariance of one estimate.   standard_error: its own.   signal: squared norm of the mean
    gradient (an unbiased estimate, so it may come out negative where noise rules)."""

    variance: float
    standard_error: float
    signal: float


def gradient_variance(projections: Tensor) -> GradientVariance:
    """(n, count) from `project`: n >= 2 independent estimates of one gradient, all with one seed.

    For random signs z, E[(z . v)^2] = |v|^2, so the spread of the projections estimates E|g - E g|^2 without keeping
    any gradient.
    """
    n = len(projections)
    if n < 2:
        raise ValueError(f"the variance of {n} gradient has no estimate; give at least 2")
    mean = projections.mean(0)  # (count,)
    spread = (projections - mean).square().mean(1) * n / (n - 1)  # (n,)
    variance = spread.mean().item()
    return GradientVariance(variance, spread.std().item() / n**0.5, mean.square().mean().item() - variance / n)
