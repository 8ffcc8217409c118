"""What steps 1 and 2 learn: a loss over batches, and the figures that tell how well."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

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

    @property
    def learner(self) -> Actor | TrainedReward:
        """The role that learns."""
        ...

    @property
    def headline(self) -> str:
        """The figure of `evaluate` that people look at."""
        ...

    @property
    def sign(self) -> int:
        """1 where a higher `headline` is better, else -1."""
        ...

    def sequences(self, batch: Any) -> Sequences:
        """The rows that the model reads: both answers of a pair."""
        ...

    def count(self, batch: Any) -> int:
        """What the loss is a mean of, in this batch: answer tokens, pairs, or prompts with their answers."""
        ...

    def loss(self, batch: Any, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's summed loss over `denominator`, and sums of other figures over what `count` counts."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out rows, equal on every rank."""
        ...


@dataclass
class Supervised:
    """Step 1: next-token loss on the answers only, EOS included; prompt and padding masked."""

    learner: Actor
    eval_loader: Iterable[SupervisedBatch]
    headline: str = "perplexity"
    sign: int = -1

    def sequences(self, batch: SupervisedBatch) -> Sequences:
        """Prompts with their answers."""
        return Sequences.from_batch(batch)

    def count(self, batch: SupervisedBatch) -> int:
        """Answer tokens that are learned."""
        return int(learned_mask(batch, self.sequences(batch)).sum())

    def loss(self, batch: SupervisedBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `supervised_loss`."""
        sequences = self.sequences(batch)
        output = self.learner.logprobs(sequences)
        return supervised_loss(output.logprobs, learned_mask(batch, sequences), denominator), {}

    def evaluate(self) -> dict[str, float]:
        """See `perplexity`."""
        return perplexity(self.learner, self.eval_loader)


@dataclass
class Ranking:
    """Step 2: the chosen answer's score above the rejected one's (Bradley-Terry).

    Of several ranked answers, each one's score above those of the answers ranked below it.

    Attributes:
        use_margin: Whether the data's `margin` column enters the loss.
        ranked_loss: The loss of batches with several ranked answers.
    """

    learner: TrainedReward
    eval_loader: Iterable[PairBatch | RankedBatch]
    use_margin: bool = False
    label_smoothing: float = 0.0
    centring: float = 0.0
    ranked_loss: Literal["pairs", "plackett-luce"] = "pairs"
    headline: str = "accuracy"
    sign: int = 1

    def sequences(self, batch: PairBatch | RankedBatch) -> Sequences:
        """All answers, each with its prompt."""
        return Sequences.from_batch(batch) if isinstance(batch, RankedBatch) else Sequences.from_pairs(batch)

    def count(self, batch: PairBatch | RankedBatch) -> int:
        """Pairs, or rankings."""
        return len(batch)

    def loss(self, batch: PairBatch | RankedBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `ranking_loss` and `loss_of_rankings`."""
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
        """See `ranking_accuracy`."""
        return ranking_accuracy(self.learner, self.eval_loader)


@dataclass(frozen=True)
class ImplicitReward:
    """The reward that a policy implies: beta * (log pi(y|x) - log pi_ref(y|x))."""

    policy: Actor
    reference: Reference
    beta: float

    @property
    def model(self) -> nn.Module:
        """The policy's."""
        return self.policy.model

    def logprobs(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """(B,) log-probs of whole answers under the policy, with gradient, and under the reference."""
        policy = answer_logprob(self.policy.logprobs(sequences).logprobs, sequences.answer_mask)
        return policy, answer_logprob(self.reference.logprobs(sequences), sequences.answer_mask)

    def score(self, sequences: Sequences) -> Tensor:
        """(B,) rewards of the answers."""
        policy, reference = self.logprobs(sequences)
        return self.beta * (policy - reference)


@dataclass
class DirectPreference:
    """DPO, or R-DPO with `alpha`, conservative with `label_smoothing`: a policy straight from the pairs."""

    learner: Actor
    reference: Reference
    eval_loader: Iterable[PairBatch]
    beta: float = 0.1
    alpha: float = 0.0
    label_smoothing: float = 0.0
    headline: str = "accuracy"
    sign: int = 1

    @property
    def implicit_reward(self) -> ImplicitReward:
        """What ranks the answers in the loss and in the evaluation."""
        return ImplicitReward(self.learner, self.reference, self.beta)

    def sequences(self, batch: PairBatch) -> Sequences:
        """Both answers of each pair."""
        return Sequences.from_pairs(batch)

    def count(self, batch: PairBatch) -> int:
        """Pairs."""
        return len(batch)

    def loss(self, batch: PairBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `dpo_losses`."""
        both = self.sequences(batch)
        policy, reference = self.implicit_reward.logprobs(both)  # (2B,)
        policy_chosen, policy_rejected = policy.chunk(2)
        reference_chosen, reference_rejected = reference.chunk(2)
        chosen_lengths, rejected_lengths = both.answer_lengths.chunk(2)
        losses = dpo_losses(
            policy_chosen,
            policy_rejected,
            reference_chosen,
            reference_rejected,
            beta=self.beta,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )
        chosen, rejected = (self.beta * (policy.detach() - reference)).chunk(2)
        figures = {"accuracy": (chosen > rejected).float().sum(), "margin": (chosen - rejected).sum()}
        return losses.sum() / denominator, figures

    def evaluate(self) -> dict[str, float]:
        """See `ranking_accuracy`."""
        return ranking_accuracy(self.implicit_reward, self.eval_loader)
