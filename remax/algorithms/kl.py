"""The KL penalty that keeps the policy pi near the frozen reference rho: its estimator, place and reach.

All algorithms share this file. A step t in state s_t (prompt and answer so far) that drew token y_t costs beta * c_t,
where c_t is one of

    k1          log pi(y_t|s_t) - log rho(y_t|s_t)        E[c_t] = KL_t(pi || rho)
    k2          k1^2 / 2                                  biased in value, small variance
    k3          rho/pi - 1 + k1  =  exp(-k1) - 1 + k1     E[c_t] = KL_t(pi || rho), never negative (*)
    bregman     pi/rho - 1 - k1  =  exp(k1) - 1 - k1      E[c_t] = chi2_t(pi || rho) - KL_t(pi || rho), never negative
    js          (log(pi/m) + rho/pi log(rho/m)) / 2       E[c_t] = JS_t(pi, rho), never negative; m = (pi + rho) / 2 (*)
    clamped_js  (max(0, log(pi/m)) + max(0, log(rho/m))) / 2     between 0 and log(2) / 2, and no estimate of JS_t
    full        sum_v pi(v|s_t) log(pi/rho)(v|s_t)        is KL_t(pi || rho): the whole vocabulary, no sampling noise

(k1, k2, k3: J. Schulman, "Approximating KL divergence", 2020. k2, bregman and clamped_js are the squared error, Bregman
and Jensen-Shannon term of S. Sun et al., arXiv 2309.09055, as their code has them, in the reward of PPO; js is what the
last one stands for. chi2(pi || rho) = sum_v (pi - rho)^2 / rho.)
The gradient of the exact objective E[R] - beta E[sum_t c_t] is

    E[ sum_t grad log pi(y_t|s_t) (R - beta sum_{h>=t} c_h)  -  beta sum_t grad c_t ]
             (future) what y_t does to later costs              (local) what the weights do to c_t itself

A choice of `where` and `reach` keeps some of these terms, and this table says what a sample's gradient then estimates:

    where   reach      estimates the gradient of (E_sg: expectation over states that are held fixed)
    reward  full_step  k1: the exact objective, whose penalty is beta KL(pi || rho) of whole answers, since the local
                       term has expectation zero. The others: that term is missing, a bias of +beta E[sum_t grad c_t].
    reward  one_step   k1: the penalty beta E_sg[sum_t KL_t(pi || rho)]: each step is pulled to the reference but not
                       held responsible for where it leads. The others: beta E_sg[sum_t E[c_t]], with the bias above.
    loss    full_step  the exact objective: its penalty is beta KL(pi || rho) for k3, full; beta E[sum_t JS_t] for js.
    loss    one_step   the penalty beta E_sg[sum_t D_t]. D_t = KL_t(pi || rho) for k2 and full, as k1 one_step in the
                       reward with less noise; in the other direction KL_t(rho || pi) for k3; chi2_t(pi || rho) / 2 for
                       bregman; (TV_t(pi, rho) - KL_t(rho || m)) / 2 for clamped_js, TV_t = sum_v max(0, rho - pi); and
                       sum_v rho G(pi/rho) for js, G(w) = integral from 1 to w of log((1 + x) / 2) / (2 x) dx.

`reward` puts detached numbers into the advantage, `loss` a differentiable term into the loss (and for full_step the
detached future into the advantage). Two settings have expected gradient zero, so they would only add noise, and are
refused: k1 in the loss, since E[grad log pi] = 0, and full one_step in the reward, since KL_t depends on s_t alone.

The discount gamma acts on the reward's advantage only; the KL is not discounted (nor is it in the ReMax authors' code).

`normalize` charges the mean over the answer's T tokens instead of the sum: objective E[R] - beta E[(1/T) sum_t c_t]. As
T depends on every token, full_step then charges each token with the whole answer's mean: costs that lie before t no
longer cancel. For k1 in the reward the local term (1/T) sum_t grad log pi no longer vanishes either; it is the 1 in
(1 + sum_t k_t) / T, which keeps the gradient exact. one_step divides c_t by T, a smaller beta for longer answers, and
is no longer the gradient of a stated objective.

With temperature or top-p/top-k replayed, pi is the sampling distribution, and everything above holds for it.
(*) Where pi is truncated, E[c_t] lacks what rho has outside of pi's words: their mass for k3, log(2) / 2 times it for
js. k1, bregman and full stay exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

ESTIMATORS = ("k1", "k2", "k3", "bregman", "js", "clamped_js", "full")
WHERE = ("reward", "loss")
REACHES = ("one_step", "full_step")

# --penalty -> (estimator or None: the algorithm's own, reach). The lower four are names of the ReMax authors' flag.
PENALTIES: dict[str, tuple[str | None, str]] = {
    "one_step": (None, "one_step"),
    "full_step": (None, "full_step"),
    "full_kl_one_step": ("full", "one_step"),
    "full_kl_full_step": ("full", "full_step"),
    "kl_onestep": ("k1", "one_step"),
    "kl": ("k1", "full_step"),
    "full_kl_onestep": ("full", "one_step"),
    "full_kl": ("full", "full_step"),
}


def token_kl(
    logprobs: Tensor, reference_logprobs: Tensor | None, estimator: str, full_kl: Tensor | None = None
) -> Tensor:
    """(B, A) log-probs of the drawn tokens under policy and reference -> (B, A) costs c_t, gradient included."""
    if estimator == "full":
        if full_kl is None:
            raise ValueError("the full-vocabulary KL needs PolicyOutput.full_kl")
        return full_kl
    if reference_logprobs is None:
        raise ValueError("a KL penalty needs the reference's log-probs")
    k1 = logprobs - reference_logprobs
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return k1.square() / 2
    if estimator == "bregman":
        return torch.expm1(k1) - k1
    if estimator == "js":  # log(pi/m) = log 2 - log(1 + rho/pi)
        return (math.log(2) - softplus(-k1) + (-k1).exp() * (math.log(2) - softplus(k1))) / 2
    if estimator == "clamped_js":  # only the larger of pi and rho is above m
        return (math.log(2) - softplus(-k1.abs())) / 2
    return torch.expm1(-k1) + k1


def reverse_cumsum(x: Tensor) -> Tensor:
    """(B, A) -> (B, A): sum_{h>=t} x_h."""
    return x.flip(1).cumsum(1).flip(1)


@dataclass
class KLPenalty:
    """beta * c_t, and how beta moves.

    Attributes:
        coefficient: beta, in reward per nat; 0 is no penalty.
        estimator: One of `ESTIMATORS`, see the top of the file.
        normalize: Whether the mean over an answer's tokens is charged instead of the sum.
        target: Nats per answer that an adaptive coefficient steers to; None keeps it fixed.
        horizon: Answers over which a KL that is 20 % or more off its target moves beta by 20 % (Ziegler et al., arXiv
            1909.08593, section 2.2).

    Raises:
        ValueError: The choice cannot act.
    """

    coefficient: float = 0.1
    estimator: str = "k1"
    where: str = "reward"
    reach: str = "full_step"
    normalize: bool = False
    target: float | None = None
    horizon: int = 10_000

    def __post_init__(self) -> None:
        for value, known, what in [
            (self.estimator, ESTIMATORS, "KL estimator"),
            (self.where, WHERE, "KL place"),
            (self.reach, REACHES, "KL reach"),
        ]:
            if value not in known:
                raise ValueError(f"{what} {value!r} is unknown; choose from {', '.join(known)}")
        if self.coefficient < 0:
            raise ValueError(f"the KL coefficient is {self.coefficient}; it must not be negative")
        if self.where == "loss" and self.estimator == "k1":
            raise ValueError(
                "k1 in the loss has expected gradient zero; use another estimator there, or k1 in the reward"
            )
        if self.where == "reward" and self.estimator == "full" and self.reach == "one_step":
            raise ValueError(
                "the full-vocabulary KL, one_step and in the reward, has expected gradient zero; put it in the loss"
            )
        if self.target is not None and (self.target <= 0 or self.horizon < 1 or not self.active):
            raise ValueError("an adaptive KL coefficient needs a positive target, horizon and starting coefficient")

    @property
    def active(self) -> bool:
        """Whether there is a penalty at all."""
        return self.coefficient > 0

    @property
    def needs_full_kl(self) -> bool:
        """Whether the loss needs PolicyOutput.full_kl."""
        return self.active and self.estimator == "full"

    def per_answer(self, costs: Tensor, mask: Tensor) -> Tensor:
        """(B, A) costs -> (B,) beta times their sum over the answer, or the normalised one; detached."""
        total = costs.detach().masked_fill(~mask, 0.0).sum(1)
        if self.normalize:
            local_term = 1.0 if self.estimator == "k1" else 0.0  # (1/T) sum_t grad k1_t = (1/T) sum_t grad log pi
            total = (total + local_term) / mask.sum(1).clamp(min=1)
        return self.coefficient * total

    def in_advantage(self, costs: Tensor, mask: Tensor) -> Tensor:
        """(B, A) costs -> (B, A) to subtract from the advantages of the tokens; detached, zero after the answer."""
        c = costs.detach().masked_fill(~mask, 0.0)
        if self.reach == "one_step":
            if self.where == "loss":
                return torch.zeros_like(c)
            return self.coefficient * self._per_length(c, mask)
        if self.normalize:
            return self.per_answer(c, mask)[:, None] * mask
        if self.where == "loss" and self.estimator == "full":
            return self.coefficient * (reverse_cumsum(c) - c)  # KL_t does not depend on y_t: only later ones
        return self.coefficient * reverse_cumsum(c)

    def in_loss(self, costs: Tensor, mask: Tensor) -> Tensor:
        """(B, A) costs -> (B, A) to add to the loss of the tokens, with gradient; zeros for a penalty in the reward."""
        if self.where == "reward":
            return torch.zeros_like(costs)
        return self.coefficient * self._per_length(costs, mask)

    def _per_length(self, costs: Tensor, mask: Tensor) -> Tensor:
        return costs / mask.sum(1, keepdim=True).clamp(min=1) if self.normalize else costs

    def update(self, kl: float, answers: float) -> None:
        """Moves an adaptive coefficient after an optimizer step.

        beta <- beta * (1 + clip(kl / target - 1, -.2, .2) * answers / horizon). Both arguments must be taken over all
        ranks, or the ranks drift apart.

        Args:
            kl: Nats per answer in that step.
            answers: Number of answers in that step.
        """
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.coefficient *= 1.0 + error * answers / self.horizon


def build_penalty(
    default: KLPenalty,
    *,
    penalty: str | None = None,
    kl_ctl: float | None = None,
    kl_estimator: str | None = None,
    kl_in: str | None = None,
    normalize_kl: bool = False,
    kl_target: float | None = None,
    kl_horizon: int | None = None,
) -> KLPenalty:
    """`default` with the flags that are not None. Without `kl_in`, k1 acts in the reward and the others in the loss.

    Raises:
        ValueError: A name is unknown, or choices contradict each other or cannot act.
    """
    if penalty == "none":
        return replace(default, coefficient=0.0, target=None)
    if penalty is not None and penalty not in PENALTIES:
        raise ValueError(f"penalty {penalty!r} is unknown; choose from none, {', '.join(PENALTIES)}")
    named, reach = PENALTIES[penalty] if penalty is not None else (None, default.reach)
    if named and kl_estimator and named != kl_estimator:
        raise ValueError(f"penalty {penalty} uses the estimator {named}, but the estimator asked for is {kl_estimator}")
    estimator = named or kl_estimator or default.estimator
    return KLPenalty(
        coefficient=default.coefficient if kl_ctl is None else kl_ctl,
        estimator=estimator,
        where=kl_in or ("reward" if estimator == "k1" else "loss"),
        reach=reach,
        normalize=normalize_kl,
        target=kl_target,
        horizon=default.horizon if kl_horizon is None else kl_horizon,
    )
