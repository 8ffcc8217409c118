"""RLOO: k answers per prompt, each compared with the mean of the others.

Kool et al. 2019; Ahmadian et al., arXiv 2402.14740.

    R_i = clip(r(x, y_i)) - beta * sum_t k_it                    the KL is part of the reward of the whole answer
    A_i = R_i - (1/(k-1)) sum_{j != i} R_j
    g   = (1/(N k)) sum_i sum_t grad log pi(y_it | x, y_i<t) * A_i

The others are independent of y_i, so E[g] is the gradient of E[r] - beta * KL(pi || rho), exactly. A different reach or
place of the KL is applied token by token as in ReMax; `needs_old_logprobs` tells whether R needs them before the
update.

The other answers may count unequally, which leaves E[g] alone as long as y_i has no say in it. With k answers of
unequal length the mean by weights is nearer the b that makes E[ |grad|^2 (R - b)^2 ] least:

    length_weighted   by their tokens T_j: OPO (arXiv 2505.23585)
    token_weighted    at token t by W_jt = sum_{h<=t} |grad log pi(y_jh)|^2 with respect to the logits: the optimal
                      token baseline (OTB, arXiv 2602.07078). For 1 - 2 pi(y) + sum_v pi(v)^2 stands 1 - pi(y), of the
                      same mean; an answer that has ended keeps its weight.

Both sources take the mean over all k answers, y_i among them, which is biased as GRPO's is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from remax.algorithms.base import (
    Algorithm,
    on_policy_loss,
    refuse_a_single_answer,
    scaled_over_the_batch,
    with_advantages,
)
from remax.algorithms.calibration import token_weights
from remax.algorithms.kl import token_kl
from remax.algorithms.terms import clip, leave_one_out_mean, weighted_mean_of_others
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
        baseline: How the others count: `others` equally, `length_weighted` or `token_weighted`.
        advantage_scaling: `none`, or `batch`: see `scaled_over_the_batch`.
    """

    samples_per_prompt: int = 4
    baseline: str = "others"
    advantage_scaling: str = "none"
    scalings: ClassVar[tuple[str, ...]] = ("none", "batch")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline not in ("others", "length_weighted", "token_weighted"):
            raise ValueError(f"rloo with baseline {self.baseline!r}; choose others, length_weighted or token_weighted")
        refuse_a_single_answer(self)
        if self._kl_in_returns and self.kl.estimator == "full":
            raise ValueError(
                "rloo has its KL in the return before the update, where only sampled estimators exist; use k1"
            )

    @property
    def _kl_in_returns(self) -> bool:
        return self.kl.active and self.kl.where == "reward" and self.kl.reach == "full_step"

    @property
    def needs_old_logprobs(self) -> bool:
        """Where the KL is part of the returns, or weights are."""
        return self._kl_in_returns or self.baseline == "token_weighted"

    def prepare(self, rollout: Rollout) -> Rollout:
        """See `rloo_advantages`."""
        on_reward = self.clip_on == "reward"
        returns = clip(rollout.rewards, self.clip_reward_value) if on_reward else rollout.rewards  # (B,)
        if self._kl_in_returns:
            old_logprobs = present(rollout.old_logprobs, "Rollout.old_logprobs")
            costs = token_kl(old_logprobs, rollout.reference_logprobs, self.kl.estimator)
            returns = returns - self.kl.per_answer(costs, rollout.sequences.answer_mask)
        if self.baseline == "others":
            advantages = rloo_advantages(returns, self.samples_per_prompt)  # (B,)
        else:
            others = weighted_mean_of_others(returns, self._weights(rollout), self.samples_per_prompt)
            advantages = returns[:, None] - others  # (B, A)
        prepared = with_advantages(rollout, advantages if on_reward else clip(advantages, self.clip_reward_value))
        return scaled_over_the_batch(self, prepared) if self.advantage_scaling == "batch" else prepared

    def _weights(self, rollout: Rollout) -> Tensor:
        """(B, A), or (B, 1) where they are the same at all tokens."""
        if self.baseline == "length_weighted":
            return rollout.sequences.answer_lengths[:, None]
        old_logprobs = present(rollout.old_logprobs, "Rollout.old_logprobs")
        return token_weights(old_logprobs, rollout.sequences.answer_mask).cumsum(1)

    def loss(self, batch: Rollout, output: PolicyOutput, denominator: float | Tensor) -> tuple[Tensor, Figures]:
        """See `Algorithm.loss`; a KL that is in the returns already is only measured."""
        return on_policy_loss(self, batch, output, denominator, penalised=not self._kl_in_returns)
