"""What steps 1 and 2 learn: a loss over batches, and the figures that tell how well."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from remax.core.losses import (
    answer_logprob,
    dpo_losses,
    mean_over_pairs,
    ordered_pairs,
    pairwise_losses,
    plackett_luce_losses,
    ranking_loss,
    supervised_loss,
)
from remax.core.sequences import Sequences, learned_mask
from remax.engines.policy import Actor, Reference
from remax.engines.scorer import TrainedReward
from remax.evaluation.policy import perplexity
from remax.evaluation.ranking import pair_scores, ranking_accuracy
from utils.data.batches import PairBatch, RankedBatch, SupervisedBatch


class Task(Protocol):
    """What a fine-tuning stage learns."""

    learner: Actor | TrainedReward
    headline: str  # the metric of `evaluate` that people look at

    def sequences(self, batch: Any) -> Sequences:
        """The rows that the model reads: both answers of a pair."""

    def count(self, batch: Any) -> int:
        """What the loss is a mean of, in this batch: answer tokens, pairs, or prompts with their answers."""

    def loss(self, batch: Any, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's summed loss over `denominator`, and sums of other figures over what `count` counts."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out rows, equal on every rank."""


@dataclass
class Supervised:
    """Step 1: next-token loss on the answers only, EOS included; prompt and padding masked."""

    learner: Actor
    eval_loader: Iterable[SupervisedBatch]
    headline: str = "perplexity"

    def sequences(self, batch: SupervisedBatch) -> Sequences:
        return Sequences.from_batch(batch)

    def count(self, batch: SupervisedBatch) -> int:
        return int(learned_mask(batch, self.sequences(batch)).sum())

    def loss(self, batch: SupervisedBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        sequences = self.sequences(batch)
        output = self.learner.logprobs(sequences)
        return supervised_loss(output.logprobs, learned_mask(batch, sequences), denominator), {}

    def evaluate(self) -> dict[str, float]:
        return perplexity(self.learner, self.eval_loader)


@dataclass
class Ranking:
    """Step 2: the chosen answer's score above the rejected one's (Bradley-Terry); of several ranked answers each one's
    above those of the answers ranked below it.
    """

    learner: TrainedReward
    eval_loader: Iterable[PairBatch | RankedBatch]
    use_margin: bool = False  # the data's `margin` column
    label_smoothing: float = 0.0
    centring: float = 0.0
    ranked_loss: Literal["pairs", "plackett-luce"] = "pairs"  # of batches with several ranked answers
    headline: str = "accuracy"

    def sequences(self, batch: PairBatch | RankedBatch) -> Sequences:
        ranked = isinstance(batch, RankedBatch)
        return Sequences.from_batch(batch) if ranked else Sequences.from_pairs(batch)

    def count(self, batch: PairBatch | RankedBatch) -> int:
        return len(batch)

    def loss(self, batch: PairBatch | RankedBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(batch, RankedBatch):
            return self.loss_of_rankings(batch, denominator)
        chosen, rejected = pair_scores(self.learner, batch)
        figures = {"accuracy": (chosen > rejected).float().sum(), "margin": (chosen - rejected).detach().sum()}
        margin = batch.margin if self.use_margin else None
        options = {"label_smoothing": self.label_smoothing, "centring": self.centring}
        return ranking_loss(chosen, rejected, denominator, margin, **options), figures

    def loss_of_rankings(self, batch: RankedBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        """A prompt with its answers counts once, however many they are; the figures are means over its pairs."""
        scores = self.learner.score(self.sequences(batch))  # (N,)
        row, ranks, rows = batch.row, batch.ranks, self.count(batch)
        if self.ranked_loss == "plackett-luce":
            losses = plackett_luce_losses(scores, row, ranks, rows, centring=self.centring)
        else:
            options = {"label_smoothing": self.label_smoothing, "centring": self.centring}
            losses = pairwise_losses(scores, row, ranks, rows, **options)
        better, worse = ordered_pairs(row, ranks)
        difference = (scores[better] - scores[worse]).detach()
        figures = {"accuracy": (difference > 0).float(), "margin": difference}
        means = {name: mean_over_pairs(values, row[better], rows).sum() for name, values in figures.items()}
        return losses.sum() / denominator, means

    def evaluate(self) -> dict[str, float]:
        return ranking_accuracy(self.learner, self.eval_loader)


@dataclass
class DirectPreference:
    """DPO, or R-DPO with `alpha`: a policy straight from the pairs, without a reward model.

    An answer's implicit reward is beta * (log pi(y|x) - log pi_ref(y|x)).
    """

    learner: Actor
    reference: Reference
    eval_loader: Iterable[PairBatch]
    beta: float = 0.1
    alpha: float = 0.0
    headline: str = "accuracy"

    def sequences(self, batch: PairBatch) -> Sequences:
        return Sequences.from_pairs(batch)

    def count(self, batch: PairBatch) -> int:
        return len(batch)

    def loss(self, batch: PairBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        policy, reference, lengths = self.answers(batch)
        losses = dpo_losses(
            *policy,
            *reference,
            beta=self.beta,
            alpha=self.alpha,
            chosen_lengths=lengths[0],
            rejected_lengths=lengths[1],
        )
        chosen, rejected = (self.beta * (p.detach() - r) for p, r in zip(policy, reference, strict=True))
        figures = {"accuracy": (chosen > rejected).float().sum(), "margin": (chosen - rejected).sum()}
        return losses.sum() / denominator, figures

    def evaluate(self) -> dict[str, float]:
        return ranking_accuracy(self.learner, self.eval_loader, self.implicit_rewards)

    def implicit_rewards(self, learner: Actor, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """(B,) of the chosen and of the rejected answers."""
        policy, reference, _ = self.answers(batch)
        return tuple(self.beta * (p - r) for p, r in zip(policy, reference, strict=True))

    def answers(self, batch: PairBatch) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(chosen, rejected) log-probs of whole answers under the policy, under the reference, and their lengths."""
        both = self.sequences(batch)
        policy = answer_logprob(self.learner.logprobs(both).logprobs, both.answer_mask)  # (2B,)
        reference = answer_logprob(self.reference.logprobs(both), both.answer_mask)
        return policy.chunk(2), reference.chunk(2), both.answer_lengths.chunk(2)
