"""GRPO: k answers per prompt, standardised within the group, KL in the loss (Shao et al., arXiv 2402.03300).

    A_i = (r_i - mean_j r_j) / (std_j r_j + eps)
    loss = -(1/(N k)) sum_i (1/T_i) sum_t ( A_i log pi(y_it) - beta * k3_it )       one step per rollout: ratio 1

What it estimates. Without the std the mean contains r_i, so E is (k-1)/k times the gradient of E[r]: the direction of
RLOO, its length shrunk. With the std, k = 2 and eps -> 0, A_i = sign(r_i - r_j) / sqrt(2): the gradient of the chance
of beating one's own other answer; in general prompts with little spread in reward count as much as those with a lot.
The mean over each answer's own tokens (`sequence_mean`, the paper's) weighs tokens of long answers less; `sequence`
does not. k3 in the loss pulls along KL(rho || pi), see kl.py. The std is that of a sample (divided by k - 1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from remax.algorithms.base import Algorithm, refuse_a_single_answer, scaled_over_the_batch, with_advantages
from remax.algorithms.kl import KLPenalty
from remax.algorithms.terms import clip, grouped
from remax.core.rollout import Rollout

ROUNDING = 1e-5  # relative, of a score in fp32


def grpo_advantages(reward: Tensor, samples_per_prompt: int, *, scale_by_std: bool = True, eps: float = 1e-4) -> Tensor:
    """(B,) scores, answers to one prompt adjacent -> (B,) advantages; zero where all answers of a group score alike.

    Alike but for rounding: a reward model gives the same answer another last digit in another place of a batch.
    """
    groups = grouped(reward, samples_per_prompt)  # (B/k, k)
    advantages = groups - groups.mean(1, keepdim=True)
    alike = advantages.abs().amax(1, keepdim=True) <= ROUNDING * groups.abs().amax(1, keepdim=True)
    advantages = advantages.masked_fill(alike, 0.0)
    if scale_by_std:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    return advantages.flatten()


@dataclass
class GRPO(Algorithm):
    """GRPO with the paper's defaults.

    Attributes:
        samples_per_prompt: k, at least 2.
        advantage_scaling: `group` divides by the std, `none` leaves r_i - mean (Liu et al., arXiv 2503.20783), and
            `batch` makes mean 0 and variance 1 of that over the answer tokens of all ranks (REINFORCE++ with a group
            baseline, Hu et al., arXiv 2501.03262).
        eps: Added to the standard deviation.
    """

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(0.04, estimator="k3", where="loss", reach="one_step"))
    loss_aggregation: str = "sequence_mean"
    samples_per_prompt: int = 4
    advantage_scaling: str = "group"
    eps: float = 1e-4
    scalings: ClassVar[tuple[str, ...]] = ("group", "none", "batch")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_a_single_answer(self)

    def prepare(self, rollout: Rollout) -> Rollout:
        """See `grpo_advantages`."""
        reward = clip(rollout.rewards, self.clip_reward_value) if self.clip_on == "reward" else rollout.rewards
        advantages = grpo_advantages(
            reward, self.samples_per_prompt, scale_by_std=self.advantage_scaling == "group", eps=self.eps
        )
        if self.clip_on == "difference":
            advantages = clip(advantages, self.clip_reward_value)
        prepared = with_advantages(rollout, advantages)
        return scaled_over_the_batch(self, prepared) if self.advantage_scaling == "batch" else prepared
