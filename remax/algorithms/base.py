"""What the algorithms have in common: clipping, discount, groups, aggregation, and the loss of the on-policy ones.

Every algorithm is a dataclass of its hyper-parameters that the trainer calls in one way:

    rollout = algorithm.prepare(rollout)                  # once a rollout: numbers that need more than one row
    learned = algorithm.learned(rollout)                  # the rows that the update reads
    denominator = sum over ranks of algorithm.count(learned.sequences)
    for batch in learned.split(rows):                     # any cut
        loss, figures = algorithm.loss(batch, output, denominator)
    algorithm.update(kl, answers)                         # means over the step and all ranks

A loss is a sum over the micro-batch divided by the denominator of the WHOLE optimizer step (all micro-batches, all
ranks), so that adding the gradients up gives the same update however the rows are cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from remax.algorithms.kl import KLPenalty, token_kl
from remax.algorithms.terms import (
    AGGREGATIONS,
    aggregate,
    clipped_difference,
    masked_total,
    token_advantages,
    whitened,
)
from remax.core.logprobs import PolicyOutput
from remax.core.rollout import Rollout
from remax.core.sequences import Sequences
from remax.core.sums import Figure, Figures
from utils.present import present

Totals = dict[str, float]


def on_one_rank(totals: Mapping[str, float | Tensor]) -> Totals:
    """The sums over ranks, where there is one rank."""
    return {name: float(value) for name, value in totals.items()}


@dataclass
class Algorithm(ABC):
    """The hyper-parameters that all algorithms know, and what the trainer reads.

    Attributes:
        clip_reward_value: Limit in units of reward, 0 for none.
        clip_on: What the limit acts on: the `reward`, or the `difference` from the baseline (for groups: the advantage
            of the answer).
        loss_aggregation: See `aggregate`.
        longest_answer: Tokens that an answer has at most, for `constant`.
        entropy_coef: Weight of the bonus sum_t H_t, reward per nat; its gradient holds the states fixed.
        sum_across_ranks: Adds named numbers up over all ranks; one rank by default.
        samples_per_prompt: Answers drawn for each prompt.
        greedy: The algorithm needs `Rollout.baseline`.
        kept: How many of the answers to a prompt `learned` keeps; None: all. Where it is a number, `prepare` has their
            rewards alone, and what the models know of those that are kept is there for `loss`.
        compares_answers: `loss` needs all of these in one micro-batch.
        scalings: What its advantage_scaling may be, where it has one.
        critic: The algorithm needs `Rollout.values`, and has `value_loss`.
    """

    kl: KLPenalty = field(default_factory=KLPenalty)
    gamma: float = 1.0
    clip_reward_value: float = 5.0
    clip_on: str = "reward"
    loss_aggregation: str = "sequence"
    longest_answer: int = 1
    entropy_coef: float = 0.0
    sum_across_ranks: Callable[[Mapping[str, float | Tensor]], Totals] = field(default=on_one_rank, repr=False)
    # Settings of the algorithms that declare them again; of the others, constants.
    samples_per_prompt: int = field(default=1, init=False, repr=False)
    epochs: int = field(default=1, init=False, repr=False)

    greedy: ClassVar[bool] = False
    kept: ClassVar[int | None] = None
    compares_answers: ClassVar[bool] = False
    critic: ClassVar[bool] = False
    scalings: ClassVar[tuple[str, ...]] = ("none",)

    def __post_init__(self) -> None:
        if self.clip_on not in ("reward", "difference"):
            raise ValueError(f"clip_on {self.clip_on!r} is unknown; choose reward or difference")
        if self.loss_aggregation not in AGGREGATIONS:
            raise ValueError(
                f"loss_aggregation {self.loss_aggregation!r} is unknown; choose from {', '.join(AGGREGATIONS)}"
            )
        if self.longest_answer < 1:
            raise ValueError(f"longest_answer is {self.longest_answer}; it must be at least 1")
        scaling, known = getattr(self, "advantage_scaling", "none"), self.scalings
        if scaling not in known:
            name = type(self).__name__.lower()
            raise ValueError(f"{name} with advantage_scaling {scaling!r}; choose {' or '.join(known)}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma is {self.gamma}; it must lie in (0, 1]")
        if self.clip_reward_value < 0:
            raise ValueError(f"clip_reward_value is {self.clip_reward_value}; it must be positive, or 0 for none")

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether `prepare` or `loss` reads Rollout.old_logprobs: a forward of the actor before the update."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether `prepare` or `loss` reads Rollout.reference_logprobs: not without a penalty."""
        return self.kl.active

    @property
    def price_of_kl(self) -> float:
        """What a nat costs in reward."""
        return self.kl.coefficient

    @property
    def needs_greedy_cost(self) -> bool:
        """Whether `prepare` reads Rollout.greedy_cost: a forward of actor and reference on the greedy answers."""
        return False

    @property
    def needs_entropy(self) -> bool:
        """Whether `loss` needs PolicyOutput.entropy, with gradient (it is reported whenever it is there)."""
        return self.entropy_coef != 0

    @abstractmethod
    def prepare(self, rollout: Rollout) -> Rollout:
        """Fills `advantages` for all answers that this rank collected for one optimizer step."""

    def learned(self, rollout: Rollout) -> Rollout:
        """The rows of a prepared rollout that the update reads, those to one prompt adjacent."""
        return rollout

    def loss(self, batch: Rollout, output: PolicyOutput, denominator: float | Tensor) -> tuple[Tensor, Figures]:
        """The micro-batch's share of the step's loss, and its figures."""
        return on_policy_loss(self, batch, output, denominator)

    def value_loss(self, batch: Rollout, values: Tensor, denominator: float | Tensor) -> tuple[Tensor, Figures]:
        """The micro-batch's share of the critic's loss, and its figures, where the algorithm has a critic."""
        raise TypeError(f"{type(self).__name__} has no critic")

    def count(self, sequences: Sequences) -> int:
        """This batch's share of the loss's denominator: answers, or answer tokens."""
        if self.loss_aggregation == "constant":
            return len(sequences) * self.longest_answer
        return sequences.answer_tokens if self.loss_aggregation == "token" else len(sequences)

    def against_greedy(self, batch: Rollout, logprobs: Tensor) -> Tensor:
        """(B, A) weights of the tokens' log-probs as they would be with the greedy answers' rewards as baseline.

        For people, who look at answers that nothing is learned from; of ReMax these are its weights. `batch` has a
        baseline and the reference's log-probs, and `logprobs`, (B, A), are the policy's.
        """
        mask = batch.sequences.answer_mask
        baseline = present(batch.baseline, "Rollout.baseline")
        difference = clipped_difference(batch.rewards, baseline, self.clip_reward_value, self.clip_on)  # (B,)
        penalty = self.charged(logprobs, batch.reference_logprobs, mask)  # (B, A)
        return token_advantages(difference[:, None], mask, self.gamma, penalty)

    def charged(self, logprobs: Tensor, reference_logprobs: Tensor | None, mask: Tensor) -> Tensor:
        """(B, A) log-probs of some answers -> (B, A) what their tokens' advantages are charged for the KL.

        In the place of a KL over the whole vocabulary stands what the drawn tokens tell of it.
        """
        estimator = "k1" if self.kl.estimator == "full" else self.kl.estimator
        return self.kl.in_advantage(token_kl(logprobs, reference_logprobs, estimator), mask)

    def cost(self, logprobs: Tensor, reference_logprobs: Tensor | None, mask: Tensor) -> Tensor:
        """(B, A) log-probs of some answers -> (B,) what they are charged for their KL, where it `needs_greedy_cost`."""
        raise TypeError(f"{type(self).__name__} compares nothing with what a KL costs")

    def update(self, kl: float, answers: float) -> None:
        """After a step, with its KL in nats per answer and its number of answers, over all ranks."""
        self.kl.update(kl, answers)

    def token_advantages(self, batch: Rollout, penalty: Tensor) -> Tensor:
        """(B, A) weights of the tokens' log-probs, from the answers' advantages and the (B, A) KL penalty."""
        advantages = present(batch.advantages, "Rollout.advantages")
        return token_advantages(advantages, batch.sequences.answer_mask, self.gamma, penalty)

    def figures(self) -> dict[str, float]:
        """What a step is logged with besides its means: numbers that are the same on every rank."""
        return {"kl_coefficient": self.kl.coefficient}

    def state_dict(self) -> dict[str, Any]:
        """What `update` and `prepare` have moved since the start."""
        return {"kl_coefficient": self.kl.coefficient}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        if self.kl.target is not None:  # a fixed coefficient is the user's, also after a resume with another one
            self.kl.coefficient = present(state["kl_coefficient"], "kl_coefficient")


def refuse_a_single_answer(algorithm: Algorithm, why: str = "compares at least 2 answers to a prompt") -> None:
    """For algorithms that need several answers to a prompt.

    Raises:
        ValueError: samples_per_prompt is below 2.
    """
    if algorithm.samples_per_prompt < 2:
        name = type(algorithm).__name__.lower()
        raise ValueError(f"{name} with samples_per_prompt {algorithm.samples_per_prompt}: it {why}")


def with_advantages(rollout: Rollout, advantages: Tensor) -> Rollout:
    """Equal advantages (B,) for all tokens of an answer, or (B, A) for each its own."""
    return replace(rollout, advantages=advantages[:, None] if advantages.dim() == 1 else advantages)


def scaled_over_the_batch(algorithm: Algorithm, rollout: Rollout) -> Rollout:
    """Advantages of mean 0 and variance 1 over the answer tokens of all ranks (REINFORCE++, arXiv 2501.03262).

    Mean and deviation hold each answer's own advantage, a bias of the order of 1 / answers; beyond that the gradient is
    the unscaled one, divided by the deviation.
    """
    advantages = present(rollout.advantages, "Rollout.advantages")
    mask = rollout.sequences.answer_mask
    return replace(rollout, advantages=whitened(advantages, mask, algorithm.sum_across_ranks))


def regularisers(
    algorithm: Algorithm, batch: Rollout, output: PolicyOutput, *, penalised: bool = True
) -> tuple[Tensor, Tensor, Figures]:
    """What the KL penalty and the entropy bonus contribute.

    Args:
        penalised: False: the KL is in `batch.advantages` already, and only measured here.

    Returns:
        (B, A) to subtract from the advantages, detached; (B, A) to add to the loss, with gradient; figures.
    """
    mask, kl = batch.sequences.answer_mask, algorithm.kl
    zeros = torch.zeros_like(output.logprobs)
    in_advantage, in_loss = zeros.detach(), zeros
    figures: Figures = {}
    if batch.reference_logprobs is not None:
        k1 = masked_total(output.logprobs - batch.reference_logprobs, mask)  # whatever is penalised
        figures["kl"] = Figure(k1, len(batch))
    if kl.active and penalised:
        costs = token_kl(output.logprobs, batch.reference_logprobs, kl.estimator, output.full_kl)
        if kl.where == "loss" and not costs.requires_grad and torch.is_grad_enabled():
            raise ValueError("a KL in the loss needs its costs with gradient")
        in_advantage, in_loss = kl.in_advantage(costs, mask), kl.in_loss(costs, mask)
    if output.entropy is not None:
        figures["entropy"] = Figure(masked_total(output.entropy, mask), mask.sum())
    if algorithm.needs_entropy:
        if output.entropy is None or (not output.entropy.requires_grad and torch.is_grad_enabled()):
            raise ValueError("an entropy bonus needs PolicyOutput.entropy, with gradient")
        in_loss = in_loss - algorithm.entropy_coef * output.entropy
    return in_advantage, in_loss, figures


def on_policy_loss(
    algorithm: Algorithm, batch: Rollout, output: PolicyOutput, denominator: float | Tensor, *, penalised: bool = True
) -> tuple[Tensor, Figures]:
    """For answers drawn from the present policy: -sum_t A_t log pi(y_t), with A_t detached, and the KL in the loss."""
    mask = batch.sequences.answer_mask
    in_advantage, in_loss, figures = regularisers(algorithm, batch, output, penalised=penalised)
    advantages = algorithm.token_advantages(batch, in_advantage)  # (B, A)
    loss = aggregate(-advantages * output.logprobs + in_loss, mask, algorithm.loss_aggregation, denominator)
    return loss, figures | common_figures(loss, advantages, mask)


def common_figures(loss: Tensor, advantages: Tensor, mask: Tensor) -> Figures:
    """What every algorithm reports: its loss, and mean and mean square of the tokens' advantages."""
    tokens = mask.sum()
    return {
        "loss": Figure(loss.detach()),
        "advantage": Figure(masked_total(advantages, mask), tokens),
        "advantage_square": Figure(masked_total(advantages.square(), mask), tokens),
    }
