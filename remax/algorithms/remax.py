"""ReMax: REINFORCE with the reward of the greedy answer as baseline (Li et al., arXiv 2310.10505, Algorithm 1).

For prompts x_1..x_N draw y_i ~ pi(.|x_i), decode ybar_i greedily, and take one step along

    g = (1/N) sum_i sum_t grad log pi(y_it | x_i, y_i<t) * A_it
    A_t = gamma^(T-t+1) * clip( r(x, y) - b(x) )  -  beta * (KL terms of kl.py)

    greedy      b = r(x, ybar), the paper's
    greedy_kl   b = r(x, ybar) - P(ybar): the greedy answer is charged for its KL as the sampled ones are
    calibrated  b = c . (1, r(x, ybar), P(ybar), mean return of the prompt's other answers), and with a full_step KL a
                share of what a token's predecessors cost: c from earlier rollouts, see calibration.py

The baseline depends on the prompt, the weights and the past but not on y, so with gamma = 1 it leaves E[g] as it is:
the gradient of E[clip(r - b)] - beta * KL, which without a clip is that of E[r] - beta * KL. With gamma < 1 the weight
depends on how long the answer becomes, b no longer drops out, and E[g] treats r - b as the reward.
No value model, no GAE, no ratio: the step is on-policy, since there is exactly one per rollout. Several answers to a
prompt (N counts them all) share its greedy one.

Variance: for two answers of rewards r1 > r2 and p = pi(the better) it is p(1-p)(d - b)^2 with d = r1(1-p) + r2 p, so a
baseline helps iff 0 < b < 2d. The greedy one can hurt a policy that is nearly sure already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from remax.algorithms.base import Algorithm, with_advantages
from remax.algorithms.calibration import CHARGED, PAPER, Calibration, answer_cost, past_cost, token_weights
from remax.algorithms.kl import KLPenalty
from remax.algorithms.terms import clip, clipped_difference, discount, leave_one_out_mean
from remax.core.rollout import Rollout
from utils.present import present


def remax_advantages(
    reward: Tensor,
    baseline: Tensor,
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
        baseline: (B,) b(x): r(x, ybar), scores of the greedy answers to the same prompts, or what is made of them.
        penalty: (B, A) beta times the KL terms of the tokens, see `KLPenalty.in_advantage`.
        mask: (B, A), True on the answer's tokens.
        clip_value: Limit of the difference in units of reward, 0 for none.
        clip_on: What is clipped: the `difference`, or each `reward`.

    Returns:
        (B, A) detached weights.
    """
    difference = clipped_difference(reward, baseline, clip_value, clip_on)  # (B,) r(x, y) - b(x)
    discounted = discount(mask, gamma, penalty.dtype) * difference.to(penalty.dtype)[:, None]  # (B, A)
    return discounted - penalty


@dataclass
class ReMax(Algorithm):
    """The defaults are the authors': discount .95, the difference clipped at 5, a one-step KL in the reward.

    Attributes:
        samples_per_prompt: k, for one greedy answer.
        baseline: `greedy`, `greedy_kl` or `calibrated`.
        calibration: What earlier rollouts have taught.
        coefficients: Of the present rollout's baseline, by name.
    """

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(reach="one_step"))
    gamma: float = 0.95
    clip_on: str = "difference"
    samples_per_prompt: int = 1
    baseline: str = "greedy"
    calibration: Calibration = field(default_factory=Calibration, init=False)
    coefficients: dict[str, float] = field(default_factory=PAPER.copy, init=False)
    greedy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples_per_prompt < 1:
            raise ValueError(f"remax with samples_per_prompt {self.samples_per_prompt}: it needs at least 1 answer")
        if self.baseline not in ("greedy", "greedy_kl", "calibrated"):
            raise ValueError(f"remax with baseline {self.baseline!r}; choose greedy, greedy_kl or calibrated")

    @property
    def needs_greedy_cost(self) -> bool:
        """Where the greedy answer is charged for its KL."""
        return self.baseline != "greedy" and self._charges

    @property
    def needs_old_logprobs(self) -> bool:
        """Where the KL is part of the returns that the baseline is fitted to."""
        return self.baseline == "calibrated" and self._charges

    @property
    def _charges(self) -> bool:
        """Whether the KL is in the advantage."""
        return self.kl.active and (self.kl.where == "reward" or self.kl.reach == "full_step")

    def _penalty(self, logprobs: Tensor | None, reference_logprobs: Tensor | None, mask: Tensor) -> Tensor:
        """(B, A) float64 p_t, see `charged`."""
        if not self._charges:
            return torch.zeros_like(mask, dtype=torch.float64)
        return self.charged(present(logprobs, "log-probs"), reference_logprobs, mask).double()

    def cost(self, logprobs: Tensor, reference_logprobs: Tensor | None, mask: Tensor) -> Tensor:
        """See `Algorithm.cost`: (B,) float64 P of calibration.py."""
        discounts = discount(mask, self.gamma, torch.float64)
        return answer_cost(self._penalty(logprobs, reference_logprobs, mask), token_weights(logprobs, mask), discounts)

    def prepare(self, rollout: Rollout) -> Rollout:
        """Fills in the baseline, and the answers' advantages for those who watch; `loss` makes its own of the rewards.

        A calibrated baseline then learns of this rollout, for the next one.
        """
        if rollout.baseline is None:
            raise ValueError("ReMax needs the reward of the greedy answers")
        if self.baseline == "greedy":
            return self._compare(rollout, rollout.baseline)
        limit, on_reward = self.clip_reward_value, self.clip_on == "reward"
        rewards, greedy = ((clip(x, limit) if on_reward else x).double() for x in (rollout.rewards, rollout.baseline))
        features = {"constant": torch.ones_like(greedy), "greedy": greedy}  # (B,) each
        if self._charges:
            features["kl"] = present(rollout.greedy_cost, "Rollout.greedy_cost").double()
        if self.baseline == "greedy_kl":
            self.coefficients = CHARGED
            return self._compare(rollout, self._expected(features).to(rollout.rewards.dtype))

        mask, logprobs = rollout.sequences.answer_mask, rollout.old_logprobs
        discounts, weights = discount(mask, self.gamma, torch.float64), token_weights(logprobs, mask)  # (B, A)
        penalty = self._penalty(logprobs, rollout.reference_logprobs, mask)  # (B, A)
        if self.samples_per_prompt > 1:
            returns = rewards - answer_cost(penalty, weights, discounts)
            features["others"] = leave_one_out_mean(returns, self.samples_per_prompt)
        self.coefficients = self.calibration.coefficients()
        expected = self._expected(features)  # (B,)

        # What a clip leaves of the difference is what is learned from, and to be made small.
        difference = clipped_difference(rewards, expected, limit, self.clip_on)
        learned = difference + (clip(expected, limit) if on_reward else expected)
        columns = {name: discounts * feature[:, None] for name, feature in features.items()}
        if self.kl.reach == "full_step":  # of a one_step KL, p_1 - p_t holds what y_t itself costs
            columns["past"] = past_cost(penalty, mask)
        advantage = discounts * (learned - greedy)[:, None] - penalty
        self.calibration.learn(columns, advantage, weights, self.sum_across_ranks)
        return self._compare(rollout, expected.to(rollout.rewards.dtype))

    def _expected(self, features: Mapping[str, Tensor]) -> Tensor:
        """(B,) c . f."""
        return torch.stack([self.coefficients[name] * feature for name, feature in features.items()]).sum(0)

    def _compare(self, rollout: Rollout, expected: Tensor) -> Rollout:
        difference = clipped_difference(rollout.rewards, expected, self.clip_reward_value, self.clip_on)
        return with_advantages(replace(rollout, expected=expected), difference)

    def token_advantages(self, batch: Rollout, penalty: Tensor) -> Tensor:
        """See `remax_advantages`; a calibrated baseline also charges a share of what earlier tokens cost."""
        mask = batch.sequences.answer_mask
        if share := self.coefficients["past"]:
            penalty = penalty + share * past_cost(penalty, mask)
        return remax_advantages(
            batch.rewards,
            present(batch.expected, "Rollout.expected"),
            penalty,
            mask,
            gamma=self.gamma,
            clip_value=self.clip_reward_value,
            clip_on=self.clip_on,
        )

    def figures(self) -> dict[str, float]:
        """See `Algorithm.figures`; the coefficients that the last rollout was compared with."""
        own = self.coefficients if self.baseline == "calibrated" else {}
        return super().figures() | {f"calibration/{name}": c for name, c in own.items()}

    def state_dict(self) -> dict[str, Any]:
        """See `Algorithm.state_dict`."""
        own = {"calibration": dict(self.calibration.sums)} if self.baseline == "calibrated" else {}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Algorithm.load_state_dict`."""
        super().load_state_dict(state)
        if self.baseline == "calibrated":
            self.calibration.sums = dict(state["calibration"])
