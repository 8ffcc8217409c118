"""RAFT and SuperHF: supervised learning from the best of k answers to each prompt.

Dong et al., arXiv 2304.06767 (ranked within a prompt); Mukobi et al., arXiv 2310.16763.

    y*   = of the k answers to x the one of the highest reward, of equals the first
    loss = (1/n) sum_x sum_t ( -log pi(y*_t | x, y*_<t) + c KL_t )             n: tokens of all y*
    KL_t = sum_v pi(v | s_t) log( pi(v | s_t) / rho(v | s_t) )                 RAFT: c = 0

What it estimates, summed over tokens (aggregation `sequence`): with P_k(y) the chance that y is the best of k, the
gradient of sum_y P_k(y) ( log pi(y) - c sum_t KL_t ), P_k and the states held. So a reward counts by its rank alone,
and what is not the best teaches nothing. The KL is that of the whole vocabulary at the states of y*: the log-ratios of
the drawn tokens would be none, since best answers are no sample of the policy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from remax.algorithms.base import Algorithm, on_policy_loss, refuse_a_single_answer, with_advantages
from remax.algorithms.kl import KLPenalty
from remax.algorithms.terms import grouped, masked_total
from remax.core.logprobs import PolicyOutput
from remax.core.rollout import Rollout
from remax.core.sums import Figure, Figures


def row_of_each(chosen: Tensor, samples_per_prompt: int) -> Tensor:
    """(N, n) answers by their numbers 0..k-1 of a prompt's k -> (N * n,) their rows, those to one prompt adjacent."""
    first = torch.arange(len(chosen), device=chosen.device)[:, None] * samples_per_prompt
    return (first + chosen).flatten()


@dataclass
class RAFT(Algorithm):
    """RAFT.

    Attributes:
        samples_per_prompt: k, at least 2.
        epochs: Passes over the best answers of a rollout.
    """

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(0.0))
    loss_aggregation: str = "token"
    samples_per_prompt: int = 4
    epochs: int = 1
    kept: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__.lower()
        refuse_a_single_answer(self, "takes the best of at least 2 answers")
        if self.gamma != 1:
            raise ValueError(f"{name} has no discount: gamma is 1")
        self._check_kl(name)

    def _check_kl(self, name: str) -> None:
        if self.kl.active:
            raise ValueError(f"{name} has no KL penalty; superhf is the same with one")

    @property
    def needs_reference(self) -> bool:
        """Never: of the reference the KL over the vocabulary needs hidden states alone."""
        return False

    @property
    def price_of_kl(self) -> float:
        """None: a KL weighs against log-probs here."""
        return 0.0

    def prepare(self, rollout: Rollout) -> Rollout:
        """A weight of 1 for each answer."""
        return with_advantages(rollout, torch.ones_like(rollout.rewards))

    def learned(self, rollout: Rollout) -> Rollout:
        """The best answer to each prompt."""
        best = grouped(rollout.rewards, self.samples_per_prompt).argmax(1, keepdim=True)  # (B/k, 1)
        return rollout.select(row_of_each(best, self.samples_per_prompt))

    def loss(self, batch: Rollout, output: PolicyOutput, denominator: float | Tensor) -> tuple[Tensor, Figures]:
        """See the top of the file."""
        loss, figures = on_policy_loss(self, batch, output, denominator)
        if output.full_kl is not None:
            figures["kept_kl"] = Figure(masked_total(output.full_kl, batch.sequences.answer_mask), len(batch))
        return loss, figures | {"kept_reward": Figure(batch.rewards.sum(), len(batch))}


@dataclass
class SuperHF(RAFT):
    """SuperHF, with the paper's settings."""

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(0.35, "full", where="loss", reach="one_step"))
    samples_per_prompt: int = 16

    def _check_kl(self, name: str) -> None:
        if not self.kl.active:
            return
        if (self.kl.estimator, self.kl.where, self.kl.reach) != ("full", "loss", "one_step"):
            raise ValueError(
                f"{name} holds the states of the best answers, which are no sample of the policy: only "
                "full_kl_one_step in the loss is a KL there"
            )
        if self.kl.normalize or self.kl.target is not None:
            raise ValueError(f"{name} has a KL of fixed weight, of a mean over tokens as it is")
