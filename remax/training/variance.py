"""How noisy the gradient is.

Measured are the sizes of advantages under different baselines on the same answers, and the gradient's own variance.

The gradient of one answer is A * sum_t grad log pi(y_t). A constant added to A leaves its expectation alone and adds
noise, so what counts is the mean SQUARE of A, not its spread around its own mean: by the latter no baseline and the
mean reward would look alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from remax.algorithms.base import Totals, on_one_rank
from remax.algorithms.terms import discount, grouped, leave_one_out_mean
from remax.core.rollout import Rollout
from remax.core.sequences import Sequences
from remax.engines.policy import Actor
from utils.distributed import gather_objects, sum_across_ranks


def advantage_variances(
    rewards: Tensor,
    greedy: Tensor | None = None,
    samples_per_prompt: int = 1,
    moving_average: float | None = None,
    sum_across_ranks: Callable[[Mapping[str, float | Tensor]], Totals] = on_one_rank,
    tolerance: float = 1e-6,
) -> Totals:
    """(B,) rewards, answers to one prompt adjacent -> means over the answers of all ranks, one for each baseline.

    variance/none            r^2
    variance/mean            (r - mean of all answers)^2
    variance/greedy          (r - greedy)^2                      with `greedy`, (B,)
    variance/leave_one_out   (r - mean of the group's others)^2  with samples_per_prompt >= 2
    variance/moving_average  (r - moving_average)^2              with `moving_average`
    no_signal/greedy         share of prompts whose answers all score as the greedy one, within `tolerance`
    no_signal/group          share of prompts whose answers all score alike: nothing is learned from them

    Variances are in squared units of reward.
    """
    advantages = baseline_advantages(rewards, greedy, samples_per_prompt, moving_average, sum_across_ranks)
    silent = {}
    if greedy is not None:
        silent["no_signal/greedy"] = grouped(advantages["greedy"].abs(), samples_per_prompt).amax(1) <= tolerance
    if samples_per_prompt > 1:
        groups = grouped(rewards.double(), samples_per_prompt)  # (B/k, k)
        silent["no_signal/group"] = groups.amax(1) - groups.amin(1) <= tolerance
    totals = {f"variance/{name}": x.square().sum() for name, x in advantages.items()}
    totals |= {name: x.sum() * samples_per_prompt for name, x in silent.items()}
    sums = sum_across_ranks(totals | {"n": len(rewards)})
    return {name: sums[name] / sums["n"] for name in totals}


def baseline_advantages(
    rewards: Tensor,
    greedy: Tensor | None = None,
    samples_per_prompt: int = 1,
    moving_average: float | None = None,
    sum_across_ranks: Callable[[Mapping[str, float | Tensor]], Totals] = on_one_rank,
) -> dict[str, Tensor]:
    """The baselines of `advantage_variances`, by name -> (B,) float64 rewards minus each of them."""
    rewards = rewards.double()
    sums = sum_across_ranks({"r": rewards.sum(), "n": len(rewards)})
    advantages = {"none": rewards, "mean": rewards - sums["r"] / sums["n"]}
    if greedy is not None:
        advantages["greedy"] = rewards - greedy.double()
    if samples_per_prompt > 1:
        advantages["leave_one_out"] = rewards - leave_one_out_mean(rewards, samples_per_prompt)
    if moving_average is not None:
        advantages["moving_average"] = rewards - moving_average
    return advantages


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
    """How noisy the estimates of one gradient are.

    Attributes:
        variance: Trace of the covariance of one estimate.
        signal: Squared norm of the mean gradient (an unbiased estimate, so it may come out negative where noise rules).
    """

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


def answer_projections(actor: Actor, sequences: Sequences, gamma: float, count: int, seed: int) -> Tensor:
    """(B, count) float64: `project` of grad sum_t gamma^(T-t+1) log pi(y_t), one answer after the other.

    Plain autograd on the bare model, so that nothing reaches the engine's gradients or its optimizer. Memory: one
    answer's activations and one gradient of the trainable parameters, beside the parameters themselves (whole, also
    under ZeRO-3).
    """
    rows = []
    with actor.generating():
        parameters = [p for p in actor.model.parameters() if p.requires_grad]
        for i in range(len(sequences)):
            one = sequences.select(slice(i, i + 1))
            chunks = 1 + one.answer_width // actor.chunk_size
            logprobs = actor.model(one, chunks=chunks, sampling=actor.sampling)[0]  # (1, A)
            weights = discount(one.answer_mask, gamma, logprobs.dtype)
            gradients = torch.autograd.grad((weights * logprobs).sum(), parameters, allow_unused=True)
            rows.append(project(gradients, count, seed))
    return torch.stack(rows)


@dataclass
class VarianceMeter:
    """One of the trainer's watchers (--log_variance): the same answers, under every baseline that they allow.

    It gives `advantage_variances` at each step, at no cost. Every `gradient_steps` steps (0: never) it also gives, with
    S the gradient of an answer's log-prob and k answers to each prompt,

        gradient_variance/<baseline>   E|g - E g|^2 of one prompt's share g = 1/k sum_i (r_i - b_i) S_i
        gradient_signal                |E g|^2, by the baseline of least variance (may come out below 0: noise)

    for `prompts` prompts of each rank, at the cost of a forward and a backward pass each. The gradient of S is taken
    once and scaled for every baseline. Reward part only, without clip and KL, at the weights right after the update.

    Attributes:
        samples_per_prompt: k.
        gradient_steps: Steps between measurements of the gradient, 0 for none.
        prompts: Prompts of each rank that the gradient is measured on.
        projections: Random directions that gradients are projected on.
        decay: Of the moving average of earlier steps' mean rewards.
        moving_average: None before the first step.
    """

    actor: Actor
    samples_per_prompt: int = 1
    gamma: float = 1.0
    gradient_steps: int = 0
    prompts: int = 8
    projections: int = 8
    decay: float = 0.9
    moving_average: float | None = field(default=None, init=False)

    def __call__(self, step: int, rollout: Rollout, figures: dict[str, float]) -> dict[str, float]:
        """The figures of a step."""
        greedy, k = rollout.baseline, self.samples_per_prompt
        result = advantage_variances(rollout.rewards, greedy, k, self.moving_average, sum_across_ranks)
        if self.gradient_steps and step % self.gradient_steps == 0:
            advantages = baseline_advantages(rollout.rewards, greedy, k, self.moving_average, sum_across_ranks)
            result |= self.gradient_figures(step, rollout.sequences, advantages)
        past = figures["reward"] if self.moving_average is None else self.moving_average
        self.moving_average = self.decay * past + (1 - self.decay) * figures["reward"]
        return result

    def gradient_figures(self, step: int, sequences: Sequences, advantages: dict[str, Tensor]) -> dict[str, float]:
        """The same on every rank; none where all ranks together have fewer than two prompts."""
        k = self.samples_per_prompt
        rows = min(len(sequences) // k, self.prompts) * k
        products = answer_projections(
            self.actor, sequences.select(slice(0, rows)), self.gamma, self.projections, step
        )  # (rows, projections)
        measured = {}
        for name, advantage in advantages.items():
            shares = (
                (advantage[:rows, None] * products).view(-1, k, self.projections).mean(1)
            )  # (rows / k, projections)
            everywhere = torch.cat([part for part in gather_objects(shares.cpu())])
            if len(everywhere) > 1:
                measured[name] = gradient_variance(everywhere)
        if not measured:
            return {}
        result = {f"gradient_variance/{name}": x.variance for name, x in measured.items()}
        return result | {"gradient_signal": min(measured.values(), key=lambda x: x.variance).signal}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as this one would have."""
        return {"moving_average": self.moving_average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.moving_average = state["moving_average"]
