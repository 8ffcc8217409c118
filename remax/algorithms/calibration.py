"""What an answer is worth by what does not depend on it, fitted on earlier rollouts: the baseline of ReMax, calibrated.

ReMax weighs grad log pi(y_t) with A_t = g_t (r - b) - p_t, where g_t discounts the reward at token t, p_t is what t is
charged for its KL (kl.py) and b is a baseline. With respect to the logits, that token's gradient has the squared length

    w_t A_t^2,   w_t = 1 - 2 pi(y_t) + sum_v pi(v)^2

and different tokens have different logits, so sum_t w_t A_t^2 is the squared length of an answer's gradient. Its mean
over earlier answers is what is made small here, by the coefficients c of

    A_t = g_t (r - c . f) - p_t - c_past q_t        f = (1, r(ybar), P(ybar), mean of R over the prompt's other answers)

    P = sum_t w_t g_t p_t / sum_t w_t g_t^2         an answer's KL as a single cost: for r = 0 the best b is -P
    R = r - P                                       the return that a baseline of this answer is compared with
    q_t = p_1 - p_t                                 with a full_step KL alone: what the tokens BEFORE t cost

ybar is the greedy answer. Nothing that c multiplies depends on y_t or what follows it, so any c leaves the expected
gradient alone. They come from weighted least squares:

    c = argmin  sum w_t A_t^2 / (mean over answers of sum_t w_t g_t^2)  +  ridge (c_1^2 + s^2 |(c - c_0)_others|^2)

with s^2 the variance of A_t / g_t by the paper's c_0 = (0, 1, 0, 0), c_past = 0. Every feature is in units of reward,
so a coefficient of the size of 1 needs no evidence, and a KL that has not grown yet gets none. The constant c_1 is held
at zero where the features have their mean, by as much as one answer says. Nothing changes where a constant is added to
all rewards, or all are scaled. Older rollouts count less, by a factor for each. For w_t stands 1 - pi(y_t): it has the
same mean over y_t, 1 - sum_v pi(v)^2, and needs the drawn token's log-prob alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

FEATURES = ("constant", "greedy", "kl", "others", "past")
PAPER = dict.fromkeys(FEATURES, 0.0) | {"greedy": 1.0}
CHARGED = PAPER | {"kl": -1.0}  # the greedy answer pays for its KL as the sampled ones do


def token_weights(logprobs: Tensor | None, mask: Tensor) -> Tensor:
    """(B, A) log-probs of drawn tokens, None where they are unknown -> (B, A) float64 w_t, or 1; 0 behind answers."""
    return mask.double() if logprobs is None else -torch.expm1(logprobs.double().clamp(max=0.0)) * mask


def answer_cost(penalty: Tensor, weights: Tensor, discounts: Tensor) -> Tensor:
    """(B, A) p_t, w_t and g_t -> (B,) P."""
    return (weights * discounts * penalty).sum(1) / (weights * discounts.square()).sum(1).clamp(min=1e-12)


def past_cost(penalty: Tensor, mask: Tensor) -> Tensor:
    """(B, A) p_t of a full_step KL -> (B, A) q_t."""
    return (penalty[:, :1] - penalty) * mask


@dataclass
class Calibration:
    """Least squares on sums that are forgotten exponentially; see the top of the file.

    Attributes:
        forgetting: What the sums are multiplied with before a rollout's own are added.
        ridge: How hard the coefficients are held at those of the paper.
        sums: Over the tokens of earlier rollouts and all ranks: products of each two of the features and the
            `advantage` that the paper's baseline leaves, times w_t; and the number of `answers`.
    """

    forgetting: float = 0.9
    ridge: float = 1.0
    sums: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.forgetting < 1:
            raise ValueError(f"forgetting is {self.forgetting}; it must lie in [0, 1)")
        if not self.ridge > 0:
            raise ValueError(f"ridge is {self.ridge}; it must be positive")

    def coefficients(self) -> dict[str, float]:
        """The coefficients c, by `FEATURES`; that of a feature which was always zero stays as it is."""
        weight = self.sums.get("constant x constant", 0.0)
        if weight <= 0:
            return PAPER
        columns, n = (*FEATURES, "advantage"), self.sums["answers"]
        second = torch.tensor([[self._product(a, b) for b in columns] for a in columns], dtype=torch.float64)
        mean = second[0] / weight
        spread = second / weight - mean[:, None] * mean  # weighted covariance
        noise = spread[-1, -1].clamp(min=0.0)
        held = n * spread[1:-1, 1:-1] + self.ridge * noise * torch.eye(len(FEATURES) - 1, dtype=torch.float64)
        slopes = torch.linalg.pinv(held, hermitian=True) @ (n * spread[1:-1, -1])
        constant = mean[-1] * n / (n + self.ridge) - slopes @ mean[1:-1]
        changes = zip(FEATURES, [float(constant), *slopes.tolist()], strict=True)
        return {name: PAPER[name] + change for name, change in changes}

    def _product(self, a: str, b: str) -> float:
        return self.sums[f"{a} x {b}"] if f"{a} x {b}" in self.sums else self.sums[f"{b} x {a}"]

    def learn(
        self,
        columns: Mapping[str, Tensor],
        advantage: Tensor,
        weights: Tensor,
        sum_across_ranks: Callable[[Mapping[str, float | Tensor]], dict[str, float]],
    ) -> None:
        """Adds a rollout to the sums; one with a number that is not finite is left out, on all ranks.

        Args:
            columns: By `FEATURES`, (B, A) g_t times the feature, or q_t; zeros where there is none.
            advantage: (B, A) A_t by the paper's baseline.
            weights: (B, A) w_t.
        """
        nothing, names = torch.zeros_like(advantage), (*FEATURES, "advantage")
        z = torch.stack([*(columns.get(name, nothing) for name in FEATURES), advantage]).double().flatten(1)  # (6, B A)
        second = (z * weights.double().flatten()) @ z.T
        own = {f"{a} x {b}": second[i, j] for i, a in enumerate(names) for j, b in enumerate(names) if i <= j}
        found = sum_across_ranks(own | {"answers": len(weights)})
        if all(map(math.isfinite, found.values())):
            self.sums = {name: self.forgetting * self.sums.get(name, 0.0) + x for name, x in found.items()}
