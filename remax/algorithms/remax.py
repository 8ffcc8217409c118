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

from remax.algorithms.kl import KLPenalty
from remax.algorithms.shared import Algorithm, clipped_difference, with_advantages
from remax.sequences import Rollout


def remax_advantages(reward: Tensor, greedy_reward: Tensor, clip_value: float, clip_on: str) -> Tensor:
    """(B,) scores of the sampled and of the greedy answers -> (B,) clipped r - b.

    Discount and KL follow token by token in `shared.token_advantages`.
    """
    return clipped_difference(reward, greedy_reward, clip_value, clip_on)


@dataclass
class ReMax(Algorithm):
    """The defaults are the authors': discount .95, the difference clipped at 5, a one-step KL in the reward."""

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(reach="one_step"))
    gamma: float = 0.95
    clip_on: str = "difference"
    greedy: ClassVar[bool] = True

    def prepare(self, rollout: Rollout) -> Rollout:
        if rollout.baseline is None:
            raise ValueError("ReMax needs the reward of the greedy answers")
        advantages = remax_advantages(rollout.rewards, rollout.baseline, self.clip_reward_value, self.clip_on)
        return with_advantages(rollout, advantages)
