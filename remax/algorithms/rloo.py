"""RLOO: k answers per prompt, each compared with the mean of the others.

Kool et al. 2019; Ahmadian et al., arXiv 2402.14740.

    R_i = clip(r(x, y_i)) - beta * sum_t k_it                    the KL is part of the reward of the whole answer
    A_i = R_i - (1/(k-1)) sum_{j != i} R_j
    g   = (1/(N k)) sum_i sum_t grad log pi(y_it | x, y_i<t) * A_i

The others are independent of y_i, so E[g] is the gradient of E[r] - beta * KL(pi || rho), exactly. A different reach or
place of the KL is applied token by token as in ReMax; `needs_old_logprobs` tells whether R needs them before the
update.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from remax.algorithms.base import Algorithm, on_policy_loss, with_advantages
from remax.algorithms.kl import token_kl
from remax.algorithms.terms import clip, leave_one_out_mean
from remax.core.logprobs import PolicyOutput
from remax.core.rollout import Rollout
from remax.core.sums import Figures
from utils.present import present


def rloo_advantages(returns: Tensor, samples_per_prompt: int) -> Tensor:
    """(B,) R of the answers, those to one prompt adjacent -> (B,) advantages."""
    return returns - leave_one_out_mean(returns, samples_per_prompt)


@dataclass
class RLOO(Algorithm):
    """RLOO.

    Attributes:
        samples_per_prompt: k, at least 2.
    """

    samples_per_prompt: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples_per_prompt < 2:
            raise ValueError(
                f"rloo with samples_per_prompt {self.samples_per_prompt}: it compares at least 2 answers to a prompt"
            )
        if self._kl_in_returns and self.kl.estimator == "full":
            raise ValueError(
                "rloo has its KL in the return before the update, where only sampled estimators exist; use k1"
            )

    @property
    def _kl_in_returns(self) -> bool:
        return self.kl.active and self.kl.where == "reward" and self.kl.reach == "full_step"

    @property
    def needs_old_logprobs(self) -> bool:
        """Where the KL is part of the returns."""
        return self._kl_in_returns

    def prepare(self, rollout: Rollout) -> Rollout:
        """See `rloo_advantages`."""
        on_reward = self.clip_on == "reward"
        returns = clip(rollout.rewards, self.clip_reward_value) if on_reward else rollout.rewards  # (B,)
        if self._kl_in_returns:
            old_logprobs = present(rollout.old_logprobs, "Rollout.old_logprobs")
            costs = token_kl(old_logprobs, rollout.reference_logprobs, self.kl.estimator)
            returns = returns - self.kl.per_answer(costs, rollout.sequences.answer_mask)
        advantages = rloo_advantages(returns, self.samples_per_prompt)
        return with_advantages(rollout, advantages if on_reward else clip(advantages, self.clip_reward_value))

    def loss(self, batch: Rollout, output: PolicyOutput, denominator: float | Tensor) -> tuple[Tensor, Figures]:
        """See `Algorithm.loss`; a KL that is in the returns already is only measured."""
        return on_policy_loss(self, batch, output, denominator, penalised=not self._kl_in_returns)
