"""INPO: iterative Nash policy optimisation, on pairs of the policy's own answers (Zhang et al., arXiv 2407.00617).

    y_w, y_l = of the k answers to x the ones of the highest and of the lowest reward, which stand for a preference
    h    = D(pi) - (tau/eta) D(rho) - (1 - tau/eta) D(pi_t),       D(p) = log p(y_w | x) - log p(y_l | x)
    loss = (1/N) sum_x (h - 1/(2 eta))^2                           of N prompts; 0 where all k rewards are equal

rho is the reference and pi_t the policy that wrote the answers, so a rollout with its epochs is an iteration of the
paper. Where pi has not moved yet, h is (tau/eta) (D(pi) - D(rho)): the further pi_t prefers y_w than rho does, the
smaller the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from remax.algorithms.base import Algorithm, refuse_a_single_answer, with_advantages
from remax.algorithms.kl import KLPenalty
from remax.algorithms.raft import row_of_each
from remax.algorithms.terms import grouped, masked_total
from remax.core.logprobs import PolicyOutput
from remax.core.rollout import Rollout
from remax.core.sequences import Sequences
from remax.core.sums import Figure, Figures
from utils.present import present


def margins(logprobs: Tensor, mask: Tensor) -> Tensor:
    """(2N, A) log-probs of the tokens of pairs, the better answer first -> (N,) D."""
    better, worse = logprobs.masked_fill(~mask, 0.0).sum(1).view(-1, 2).unbind(1)
    return better - worse


@dataclass
class INPO(Algorithm):
    """INPO with the paper's eta.

    Attributes:
        samples_per_prompt: k, at least 2.
        eta: The larger, the nearer pi_t.
        tau: Of the pull to the reference, at most eta; None: a third of it, as in the authors' models.
        epochs: Passes over the pairs of a rollout.
    """

    kl: KLPenalty = field(default_factory=lambda: KLPenalty(0.0))
    samples_per_prompt: int = 8
    eta: float = 7.5e-3
    tau: float | None = None
    epochs: int = 1
    kept: ClassVar[int | None] = 2
    compares_answers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_a_single_answer(self)
        if self.kl.active or self.entropy_coef:
            raise ValueError("inpo has no KL penalty and no entropy bonus; tau pulls to the reference")
        if self.gamma != 1 or self.loss_aggregation != "sequence":
            raise ValueError("inpo compares whole answers: gamma is 1, and the aggregation sequence")
        if self.eta <= 0 or not 0 <= self.share_of_reference <= 1:
            raise ValueError(f"inpo with eta {self.eta:g} and tau {self.tau}: 0 < eta, and tau from 0 to eta")

    @property
    def share_of_reference(self) -> float:
        """Tau / eta."""
        return 1 / 3 if self.tau is None else self.tau / self.eta

    @property
    def needs_old_logprobs(self) -> bool:
        """Always: pi_t."""
        return True

    @property
    def needs_reference(self) -> bool:
        """Always: rho."""
        return True

    def prepare(self, rollout: Rollout) -> Rollout:
        """A weight of 1 for each answer to a prompt; 0 where all score alike, and nothing is preferred."""
        rewards = grouped(rollout.rewards, self.samples_per_prompt)  # (B/k, k)
        differ = rewards.amax(1) > rewards.amin(1)
        return with_advantages(rollout, differ.repeat_interleave(self.samples_per_prompt).to(rewards.dtype))

    def learned(self, rollout: Rollout) -> Rollout:
        """The best and the worst answer to each prompt."""
        rewards = grouped(rollout.rewards, self.samples_per_prompt)  # (B/k, k)
        pair = torch.stack([rewards.argmax(1), rewards.argmin(1)], 1)  # (B/k, 2)
        return rollout.select(row_of_each(pair, self.samples_per_prompt))

    def count(self, sequences: Sequences) -> int:
        """Pairs."""
        return len(sequences) // 2

    def loss(self, batch: Rollout, output: PolicyOutput, denominator: float | Tensor) -> tuple[Tensor, Figures]:
        """See the top of the file."""
        mask, share = batch.sequences.answer_mask, self.share_of_reference
        reference = present(batch.reference_logprobs, "Rollout.reference_logprobs")
        of_rows = (output.logprobs, reference, present(batch.old_logprobs, "Rollout.old_logprobs"))
        now, of_reference, before = (margins(logprobs, mask) for logprobs in of_rows)  # (N,) each
        h = now - share * of_reference - (1 - share) * before
        preferred = present(batch.advantages, "Rollout.advantages")[::2, 0]
        loss = ((h - 1 / (2 * self.eta)).square() * preferred).sum() / denominator
        figures: Figures = {
            "loss": Figure(loss.detach()),
            "margin": Figure(h.detach().sum(), len(h)),
            "kept_reward": Figure(batch.rewards[::2].sum(), len(h)),
        }
        if output.entropy is not None:
            figures["entropy"] = Figure(masked_total(output.entropy, mask), mask.sum())
        return loss, figures
