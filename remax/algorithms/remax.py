"""ReMax: REINFORCE with the reward of the greedy answer as baseline (Li et al., arXiv 2310.10505, Algorithm 1).

For prompts x_1..x_N draw y_i ~ pi(.|x_i), decode ybar_i greedily, and take one step along

    g = (1/N) sum_i sum_t grad log pi(y_it | x_i, y_i<t) * A_it
    A_t = gamma^(T-t+1) * clip( r(x, y) - r(x, ybar) )  -  beta * (KL terms of kl.py)

The baseline depends on the prompt and the weights but not on y, so with gamma = 1 it leaves E[g] as it is: the gradient
of E[clip(r - b)] - beta * KL, which without a clip is that of E[r] - beta * KL. With gamma < 1 the weight depends on
how long the answer becomes, b no longer drops out, and E[g] treats r - b as the reward.
No value model, no GAE, no ratio: the step is on-policy, since there is exactly one per rollout.

Variance: for two answers of rewards r1 > r2 and p = pi(the better) it is p(1-p)(d - b)^2 with d = r1(1-p) + r2 p, so a
baseline helps iff 0 < b < 2d. The greedy one can hurt a policy that is nearly sure already.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from remax.algorithms.base import Algorithm, with_advantages
from remax.algorithms.kl import KLPenalty
from remax.algorithms.terms import clipped_difference, discount
from remax.core.rollout import Rollout
from utils.present import present


def remax_advantages(
    reward: Tensor,
    greedy_reward: Tensor,
    penalty: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    clip_value: float = 0.0,
    clip_on: str = "difference",
) -> Tensor:
    """A_t of the formula above: what each token of a sampled answer is weighted with.

    Args:
        reward: (B,) r(x, y), scores of the sampled answers.
        greedy_reward: (B,) r(x, ybar), scores of the greedy answers to the same prompts.
        penalty: (B, A) beta times the KL terms of the tokens, see `KLPenalty.in_advantage`.
        mask: (B, A), True on the answer's tokens.
        clip_value: Limit of the difference in units of reward, 0 for none.
        clip_on: What is clipped: the `difference`, or each `reward`.

    Returns:
        (B, A) detached weights.
    """
    difference = clipped_difference(reward, greedy_reward, clip_value, clip_on)  # (B,) r(x, y) - r(x, ybar)
    discounted = discount(mask, gamma, penalty.dtype) * difference.to(penalty.dtype)[:, None]  # (B, A)
    return discounted - penalty


@dataclass
class ReMax(Algorithm):
    """The defaults are the authors': discount .95, the difference clipped at 5, a one-step KL in the reward."""

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(reach="one_step"))
    gamma: float = 0.95
    clip_on: str = "difference"
    greedy: ClassVar[bool] = True

    def prepare(self, rollout: Rollout) -> Rollout:
        """Fills in the answers' advantages, for those who watch; `loss` takes them from the rewards."""
        if rollout.baseline is None:
            raise ValueError("ReMax needs the reward of the greedy answers")
        difference = clipped_difference(rollout.rewards, rollout.baseline, self.clip_reward_value, self.clip_on)
        return with_advantages(rollout, difference)

    def token_advantages(self, batch: Rollout, penalty: Tensor) -> Tensor:
        """See `remax_advantages`."""
        return remax_advantages(
            batch.rewards,
            present(batch.baseline, "Rollout.baseline"),
            penalty,
            batch.sequences.answer_mask,
            gamma=self.gamma,
            clip_value=self.clip_reward_value,
            clip_on=self.clip_on,
        )
