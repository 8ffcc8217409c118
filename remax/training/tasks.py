"""What steps 1 and 2 learn: a loss over batches, and the figures that tell how well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
from remax.core.sums import Figure, Figures
from remax.engines.policy import Actor, Reference, TrainedHydra
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

    def count(self, batch: Any) -> dict[str, int]:
        """What the loss is a mean of, in this batch: tokens of answers, pairs, rankings; or a sum of several means."""
        ...

    def loss(self, batch: Any, totals: Mapping[str, float]) -> tuple[Tensor, Figures]:
        """The batch's summed loss over the optimizer step's `totals` of what `count` counts, and other figures."""
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

    def count(self, batch: SupervisedBatch) -> dict[str, int]:
        """Answer tokens that are learned."""
        return {"tokens": int(learned_mask(batch, self.sequences(batch)).sum())}

    def loss(self, batch: SupervisedBatch, totals: Mapping[str, float]) -> tuple[Tensor, Figures]:
        """See `supervised_loss`."""
        sequences = self.sequences(batch)
        output = self.learner.logprobs(sequences)
        return supervised_loss(output.logprobs, learned_mask(batch, sequences), totals["tokens"]), {}

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
    calibration: list[dict[str, float]] = field(default_factory=list, init=False)  # of the last evaluation

    def sequences(self, batch: PairBatch | RankedBatch) -> Sequences:
        """All answers, each with its prompt."""
        return Sequences.from_batch(batch) if isinstance(batch, RankedBatch) else Sequences.from_pairs(batch)

    def count(self, batch: PairBatch | RankedBatch) -> dict[str, int]:
        """Pairs, or rankings."""
        return {"rows": len(batch)}

    def loss(self, batch: PairBatch | RankedBatch, totals: Mapping[str, float]) -> tuple[Tensor, Figures]:
        """See `ranking_loss` and `loss_of_rankings`."""
        if isinstance(batch, RankedBatch):
            return self.loss_of_rankings(batch, totals["rows"])
        chosen, rejected = pair_scores(self.learner, batch)
        return loss_of_pairs(self, batch, chosen, rejected, totals["rows"]), preferred(chosen, rejected)

    def loss_of_rankings(self, batch: RankedBatch, denominator: float) -> tuple[Tensor, Figures]:
        """A prompt with its answers counts once, however many they are; the figures are means over its pairs."""
        scores = self.learner.score(self.sequences(batch))  # (N,)
        row, ranks, rows = batch.row, batch.ranks, len(batch)
        if self.ranked_loss == "plackett-luce":
            losses = plackett_luce_losses(scores, row, ranks, rows, centring=self.centring)
        else:
            options = {"label_smoothing": self.label_smoothing, "centring": self.centring}
            losses = pairwise_losses(scores, row, ranks, rows, **options)
        better, worse = ordered_pairs(row, ranks)
        difference = (scores[better] - scores[worse]).detach()
        figures = {"accuracy": (difference > 0).float(), "margin": difference}
        sums = {name: mean_over_pairs(values, row[better], rows).sum() for name, values in figures.items()}
        return losses.sum() / denominator, {name: Figure(total, rows) for name, total in sums.items()}

    def evaluate(self) -> dict[str, float]:
        """See `ranking_accuracy`."""
        return ranking_accuracy(self.learner, self.eval_loader, self.calibration)


@dataclass
class Hydra:
    """Steps 1 and 2 at once: next-token loss on the chosen answers + weight * ranking loss of the pairs.

    The first is a mean over the chosen answers' tokens, the second over pairs. One forward of the backbone gives both.

    Attributes:
        use_margin: See `Ranking`.
    """

    learner: TrainedHydra
    eval_loader: Iterable[PairBatch]
    ranking_weight: float = 1.0
    use_margin: bool = False
    label_smoothing: float = 0.0
    centring: float = 0.0
    headline: str = "accuracy"
    sign: int = 1
    calibration: list[dict[str, float]] = field(default_factory=list, init=False)  # of the last evaluation

    def sequences(self, batch: PairBatch) -> Sequences:
        """Both answers of each pair."""
        return Sequences.from_pairs(batch)

    def count(self, batch: PairBatch) -> dict[str, int]:
        """Tokens of the chosen answers, and pairs."""
        return {"tokens": Sequences.from_batch(batch.of_chosen).answer_tokens, "pairs": len(batch)}

    def loss(self, batch: PairBatch, totals: Mapping[str, float]) -> tuple[Tensor, Figures]:
        """See `supervised_loss` and `ranking_loss`."""
        both, pairs = self.sequences(batch), len(batch)
        logprobs, scores = self.learner.logprobs_and_scores(both, rows=pairs)  # (B, A), (2B,)
        learned, (chosen, rejected) = both.select(slice(0, pairs)), scores.chunk(2)
        likelihood = supervised_loss(logprobs, learned.answer_mask, totals["tokens"])
        ranking = loss_of_pairs(self, batch, chosen, rejected, totals["pairs"])
        figures = {
            "cross_entropy": Figure(likelihood.detach() * totals["tokens"], learned.answer_tokens),
            "ranking_loss": Figure(ranking.detach() * totals["pairs"], pairs),
        }
        return likelihood + self.ranking_weight * ranking, figures | preferred(chosen, rejected)

    def evaluate(self) -> dict[str, float]:
        """See `perplexity`, of the chosen answers and its `loss` as `cross_entropy`, and `ranking_accuracy`."""
        figures = perplexity(self.learner, (batch.of_chosen for batch in self.eval_loader))
        of_chosen = {"cross_entropy": figures["loss"], "perplexity": figures["perplexity"]}
        return of_chosen | ranking_accuracy(self.learner, self.eval_loader, self.calibration)


def loss_of_pairs(
    task: Ranking | Hydra, batch: PairBatch, chosen: Tensor, rejected: Tensor, denominator: float
) -> Tensor:
    """(B,) scores of the two answers -> `ranking_loss` as the task wants it."""
    margin = batch.margin if task.use_margin else None
    options = {"label_smoothing": task.label_smoothing, "centring": task.centring}
    return ranking_loss(chosen, rejected, denominator, margin, **options)


def preferred(chosen: Tensor, rejected: Tensor) -> Figures:
    """(B,) scores of the two answers -> how often the chosen one's is the higher, and by how much."""
    sums = {"accuracy": (chosen > rejected).float().sum(), "margin": (chosen - rejected).detach().sum()}
    return {name: Figure(total, len(chosen)) for name, total in sums.items()}


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
    calibration: list[dict[str, float]] = field(default_factory=list, init=False)  # of the last evaluation

    @property
    def implicit_reward(self) -> ImplicitReward:
        """What ranks the answers in the loss and in the evaluation."""
        return ImplicitReward(self.learner, self.reference, self.beta)

    def sequences(self, batch: PairBatch) -> Sequences:
        """Both answers of each pair."""
        return Sequences.from_pairs(batch)

    def count(self, batch: PairBatch) -> dict[str, int]:
        """Pairs."""
        return {"pairs": len(batch)}

    def loss(self, batch: PairBatch, totals: Mapping[str, float]) -> tuple[Tensor, Figures]:
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
        return losses.sum() / totals["pairs"], preferred(chosen, rejected)

    def evaluate(self) -> dict[str, float]:
        """See `ranking_accuracy`."""
        return ranking_accuracy(self.implicit_reward, self.eval_loader, self.calibration)
