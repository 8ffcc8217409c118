"""PPO with a critic (Schulman et al., arXiv 1707.06347), with the defaults of DeepSpeed-Chat (arXiv 2308.01320).

    r_t = -beta * k_t,  and + clip(r(x, y)) at the last token               k_t by the policy that sampled
    delta_t = r_t + gamma V(s_{t+1}) - V(s_t),   V = 0 after the last token, ended or cut
    A_t = sum_{h>=t} (gamma lam)^(h-t) delta_h,   target_t = A_t + V(s_t)                  (GAE, arXiv 1506.02438)
    policy loss  sum_t max( -A_t ratio_t, -A_t clip(ratio_t, 1 - eps, 1 + eps) ),   ratio_t = pi(y_t) / pi_old(y_t)
    value loss   sum_t max( (V - target)^2, (clip(V, V_old - eps_v, V_old + eps_v) - target)^2 ) / 2

What the policy gradient estimates at the first step (ratio 1) with gamma = 1: for lam = 1 the gradient of
E[r] - beta * KL, exactly, whatever V is. For lam < 1 its bias is zero where V is the policy's true value V_pi, else

    (1 - lam) E[ sum_t grad log pi(y_t) sum_{n>=1} lam^(n-1) (V - V_pi)(s_{t+n}) ].

DeepSpeed-Chat does not whiten advantages; advantage_scaling `batch` does, over all answer tokens of the step. A KL in
the loss with reach full_step is both: the differentiable c_t there, and r_t = -beta c_t here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from remax.algorithms.base import Algorithm, common_figures, regularisers
from remax.algorithms.kl import token_kl
from remax.algorithms.terms import aggregate, clip, masked_total, whitened
from remax.core.logprobs import PolicyOutput
from remax.core.rollout import Rollout
from remax.core.sums import Figure, Figures
from utils.present import present


def token_rewards(reward: Tensor, mask: Tensor) -> Tensor:
    """(B,) score of the answer -> (B, A), at its last token."""
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))  # (B, A)
    return reward[:, None] * last


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(B, A) rewards and values, values[:, j] before token j -> (B, A) advantages and targets, zero after answers."""
    values = values.masked_fill(~mask, 0.0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))  # V(s_{t+1})
    delta = (rewards + gamma * following - values).masked_fill(~mask, 0.0)
    steps = torch.arange(mask.shape[1], device=mask.device)
    ahead = steps[:, None] - steps  # (A, A): h - t
    decay = torch.full((), gamma * lam, dtype=delta.dtype, device=delta.device) ** ahead.clamp(min=0) * (ahead >= 0)
    advantages = (delta @ decay).masked_fill(~mask, 0.0)
    return advantages, advantages + values


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """(B, A) each -> (B, A) loss of the tokens, and (B, A) bool: where the clip takes the gradient away."""
    ratio = (logprobs - old_logprobs).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(plain, clipped), clipped > plain


def clipped_value_loss(values: Tensor, old_values: Tensor, targets: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """(B, A) each -> (B, A) loss of the tokens, and (B, A) bool: where the clip takes the gradient away."""
    clipped = values.clamp(old_values - cliprange, old_values + cliprange)  # exactly `values` within the range
    plain_error, clipped_error = (values - targets).square(), (clipped - targets).square()
    return torch.maximum(plain_error, clipped_error) / 2, clipped_error > plain_error


@dataclass
class PPO(Algorithm):
    """PPO with the defaults of DeepSpeed-Chat.

    Attributes:
        cliprange: How far the ratio may move from 1.
        cliprange_value: How far the value may move from that of the rollout.
        advantage_scaling: `batch` makes mean 0 and variance 1 over the answer tokens of all ranks; `none` does not.
    """

    loss_aggregation: str = "token"
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    epochs: int = 1
    advantage_scaling: str = "none"
    critic: ClassVar[bool] = True
    scalings: ClassVar[tuple[str, ...]] = ("batch", "none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_on == "difference":
            raise ValueError("ppo has a baseline for each token, not for the answer: it can only clip on the reward")
        if self.kl.active and self.kl.where == "reward" and self.kl.reach == "one_step":
            raise ValueError(
                "ppo gives the KL to GAE as rewards, so it reaches all earlier tokens; use full_step, or the loss"
            )
        if self.kl.needs_full_kl and self.kl.reach == "full_step":
            raise ValueError(
                "ppo gives the KL to GAE before the update, where only sampled estimators exist; use one_step or k1"
            )
        if not 0 <= self.lam <= 1 or self.epochs < 1 or self.cliprange <= 0 or self.cliprange_value <= 0:
            raise ValueError("ppo needs lam in [0, 1], at least one epoch, and positive clip ranges")

    @property
    def needs_old_logprobs(self) -> bool:
        """Always: the ratio and the KL are measured from them."""
        return True

    def prepare(self, rollout: Rollout) -> Rollout:
        """Advantages and the critic's targets, see `gae`."""
        mask, reward = rollout.sequences.answer_mask, clip(rollout.rewards, self.clip_reward_value)
        rewards = token_rewards(reward, mask)  # (B, A)
        if self.kl.active and self.kl.reach == "full_step":
            old_logprobs = present(rollout.old_logprobs, "Rollout.old_logprobs")
            costs = token_kl(old_logprobs, rollout.reference_logprobs, self.kl.estimator)
            if self.kl.normalize:  # a mean over the answer is known at its end
                rewards = rewards - token_rewards(self.kl.per_answer(costs, mask), mask)
            else:
                rewards = rewards - self.kl.coefficient * costs.masked_fill(~mask, 0.0)
        values = present(rollout.values, "Rollout.values")
        advantages, returns = gae(rewards, values, mask, self.gamma, self.lam)
        if self.advantage_scaling == "batch":
            advantages = whitened(advantages, mask, self.sum_across_ranks)
        return replace(rollout, advantages=advantages, returns=returns)

    def loss(self, batch: Rollout, output: PolicyOutput, denominator: float | Tensor) -> tuple[Tensor, Figures]:
        """The clipped surrogate; see the top of the file."""
        mask = batch.sequences.answer_mask
        _, in_loss, figures = regularisers(self, batch, output, penalised=self.kl.where == "loss")
        old_logprobs = present(batch.old_logprobs, "Rollout.old_logprobs")
        advantages = present(batch.advantages, "Rollout.advantages")
        per_token, cut = clipped_policy_loss(output.logprobs, old_logprobs, advantages, self.cliprange)
        loss = aggregate(per_token + in_loss, mask, self.loss_aggregation, denominator)
        ratio = (output.logprobs - old_logprobs).exp()
        figures["ratio_clipped"] = Figure(masked_total(cut.to(loss.dtype), mask), mask.sum())
        figures["ratio"] = Figure(masked_total(ratio, mask), mask.sum())
        return loss, figures | common_figures(loss, advantages, mask)

    def value_loss(self, batch: Rollout, values: Tensor, denominator: float | Tensor) -> tuple[Tensor, Figures]:
        """The clipped value loss.

        Args:
            values: (B, A) of the critic now, with gradient; values[:, j] before answer token j.
        """
        mask, returns = batch.sequences.answer_mask, present(batch.returns, "Rollout.returns")
        old_values = present(batch.values, "Rollout.values")
        per_token, cut = clipped_value_loss(values, old_values, returns, self.cliprange_value)
        loss = aggregate(per_token, mask, self.loss_aggregation, denominator)
        return loss, {
            "value_loss": Figure(loss.detach()),
            "value": Figure(masked_total(values, mask), mask.sum()),
            "value_error": Figure(masked_total((values - returns).square(), mask), mask.sum()),
            "value_clipped": Figure(masked_total(cut.to(loss.dtype), mask), mask.sum()),
        }
