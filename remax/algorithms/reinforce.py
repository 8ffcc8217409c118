"""REINFORCE (Williams 1992), plain or with a moving average of the reward as baseline.

    g = (1/N) sum_i sum_t grad log pi(y_it | x_i, y_i<t) * A_it
    A_t = gamma^(T-t+1) * clip( r(x, y) - m )  -  beta * (KL terms of kl.py)

m = 0 (baseline_decay = 0), or the average of the mean rewards of EARLIER steps, m <- decay * m + (1 - decay) * mean(r).
Rewards of earlier steps do not depend on this step's y, so E[g] stays the gradient of E[r]; the present step's mean
would not do, as it contains r. The first step has no past: each answer is compared with the mean of all the others of
the step, which does not depend on y either.

With advantage_scaling `batch`, r - m is given mean 0 and variance 1 over the step's answer tokens: the normalisation of
REINFORCE++ (Hu et al., arXiv 2501.03262), which divides the gradient by the deviation; see `scaled_over_the_batch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from remax.algorithms.base import Algorithm, scaled_over_the_batch, with_advantages
from remax.algorithms.kl import KLPenalty
from remax.algorithms.terms import clipped_difference
from remax.core.rollout import Rollout


@dataclass
class Reinforce(Algorithm):
    """REINFORCE; the other defaults are those of ReMax.

    Attributes:
        baseline_decay: Weight of the past in the moving average; 0: no baseline.
        advantage_scaling: `batch` or `none`.
        moving_average: The baseline of the next step; None before the first.
    """

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(reach="one_step"))
    gamma: float = 0.95
    clip_on: str = "difference"
    baseline_decay: float = 0.0
    advantage_scaling: str = "none"
    moving_average: float | None = field(default=None, init=False)
    scalings: ClassVar[tuple[str, ...]] = ("none", "batch")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.baseline_decay < 1:
            raise ValueError(f"baseline_decay is {self.baseline_decay}; it must lie in [0, 1)")

    def prepare(self, rollout: Rollout) -> Rollout:
        """Advantages from the moving average, which then moves."""
        baseline = self._baseline(rollout.rewards) if self.baseline_decay else torch.zeros_like(rollout.rewards)
        advantages = clipped_difference(rollout.rewards, baseline, self.clip_reward_value, self.clip_on)
        prepared = with_advantages(rollout, advantages)
        return scaled_over_the_batch(self, prepared) if self.advantage_scaling == "batch" else prepared

    def _baseline(self, reward: Tensor) -> Tensor:
        """(B,) -> (B,) baseline of this step; then moves the average for the next one."""
        step = self.sum_across_ranks({"reward": reward.double().sum(), "rows": len(reward)})
        mean, previous = step["reward"] / step["rows"], self.moving_average
        if previous is None:
            self.moving_average = mean
            return (step["reward"] - reward) / max(step["rows"] - 1, 1)
        self.moving_average = self.baseline_decay * previous + (1 - self.baseline_decay) * mean
        return torch.full_like(reward, previous)

    def state_dict(self) -> dict[str, Any]:
        """See `Algorithm.state_dict`."""
        return {**super().state_dict(), "moving_average": self.moving_average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Algorithm.load_state_dict`."""
        super().load_state_dict(state)
        self.moving_average = state["moving_average"]
