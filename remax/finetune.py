"""The one training loop of steps 1 and 2. What is learned is a `Task`; the loop is cadence: accumulate, step, evaluate,
log, stop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol, TypeVar

from torch import Tensor

from remax.engines import Actor, Reference, TrainedEngine, TrainedReward
from remax.evaluation import pair_scores, perplexity, to_device
from remax.losses import (
    answer_logprob,
    dpo_losses,
    mean_over_pairs,
    ordered_pairs,
    pairwise_losses,
    plackett_luce_losses,
    ranking_loss,
    supervised_loss,
)
from remax.ranking import ranking_accuracy
from remax.sentinel import TrainingStopped
from remax.sequences import Sequences, learned_mask
from utils.data.batches import Batch, PairBatch, RankedBatch, SupervisedBatch
from utils.distributed import print0, sum_across_ranks
from utils.metrics import MetricsLogger, progress
from utils.run import UserError

T = TypeVar("T")


class Task(Protocol):
    """What a fine-tuning stage learns."""

    engine: TrainedEngine
    headline: str  # the metric of `evaluate` that people look at

    def sequences(self, batch: Batch) -> Sequences:
        """The rows that the model reads: both answers of a pair."""

    def count(self, batch: Batch) -> int:
        """What the loss is a mean of, in this batch: answer tokens, pairs, or prompts with their answers."""

    def loss(self, batch: Batch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's summed loss over `denominator`, and sums of other figures over what `count` counts."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out rows, equal on every rank."""


@dataclass(frozen=True)
class FinetuneSettings:
    """Cadence, in optimizer steps; 0 means never, or for `evaluate_every` once per epoch."""

    epochs: int
    accumulation: int = 1
    max_steps: int = 0
    evaluate_every: int = 0


def total_steps(settings: FinetuneSettings, batches: int) -> int:
    """Optimizer steps of a whole training with so many micro-batches per epoch."""
    total = settings.epochs * steps_per_epoch(batches, settings.accumulation)
    return min(total, settings.max_steps) if settings.max_steps else total


def steps_per_epoch(batches: int, accumulation: int) -> int:
    """Optimizer steps of one epoch; its last one may accumulate fewer micro-batches."""
    return math.ceil(batches / accumulation)


def groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def batches_of_steps(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """`groups` of the micro-batches of one epoch.

    Raises:
        TrainingStopped: a faulty row of streamed data, on every rank at the same step, as each reads all rows.
    """
    try:
        yield from groups(loader, size)
    except UserError as error:
        raise TrainingStopped(f"The training data cannot be read any further: {error}") from error


def count_tokens(task: Task, batches: list[Batch]) -> dict[str, float]:
    """Tokens of the rows, prompt and answer, and token slots that the model computes for them; over all ranks."""
    rows = [task.sequences(batch) for batch in batches]
    tokens = sum(int(sequences.lengths.sum()) for sequences in rows)
    return sum_across_ranks({"tokens": tokens, "slots": sum(task.engine.slots(sequences) for sequences in rows)})


def optimizer_step(task: Task, batches: list[Batch]) -> dict[str, float]:
    """One optimizer step over several micro-batches, normalised by one count over all of them and all ranks."""
    batches = [to_device(batch) for batch in batches]
    count = sum_across_ranks({"count": sum(task.count(batch) for batch in batches)})["count"]
    sums: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        loss, figures = task.loss(batch, count)
        task.engine.backward(loss, last=i == len(batches) - 1)
        for name, value in {"loss": loss.detach() * count, **figures}.items():
            sums[name] = sums.get(name, 0.0) + value
    result = task.engine.step()
    means = {name: value / count for name, value in sum_across_ranks(sums).items()}
    return (
        means
        | {"grad_norm": result.grad_norm, "lr": result.learning_rate}
        | ({"skipped": 1.0} if result.skipped else {})
    )


def finetune(
    task: Task,
    loader,
    settings: FinetuneSettings,
    metrics: MetricsLogger,
    after_evaluation: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
) -> dict[str, dict[str, float]]:
    """Trains and returns the evaluation before and after: {"before": {...}, "after": {...}}.

    loader: batches of this rank; its sampler has `set_epoch`.
    after_evaluation(step, figures): called on every rank after each evaluation during and after training.
    """
    epoch_steps = steps_per_epoch(len(loader), settings.accumulation)
    total = total_steps(settings, len(loader))

    def evaluate(step: int) -> dict[str, float]:
        task.engine.train(False)
        figures = task.evaluate()
        task.engine.train(True)
        metrics.log(step, {f"eval/{k}": v for k, v in figures.items()}, epoch=step / epoch_steps)
        return figures

    before = after = evaluate(0)
    step, evaluated, started = 0, 0, time.perf_counter()
    with progress(total, desc="training", unit="steps") as bar:
        for epoch in range(settings.epochs):
            loader.sampler.set_epoch(epoch)
            for batches in batches_of_steps(loader, settings.accumulation):
                begin = time.perf_counter()
                figures = optimizer_step(task, batches)
                step += 1
                seconds = time.perf_counter() - begin
                read = count_tokens(task, batches)
                figures["padding_share"] = 1 - read["tokens"] / read["slots"]
                figures |= {"seconds_per_step": seconds, "tokens_per_second": read["tokens"] / seconds}
                metrics.log(step, {f"train/{k}": v for k, v in figures.items()}, epoch=step / epoch_steps)
                _stop_if_not_finite(step, figures)
                bar.update(1)
                at_epoch_end = step % epoch_steps == 0
                due = step % settings.evaluate_every == 0 if settings.evaluate_every else at_epoch_end
                if due or step == total:
                    after, evaluated = evaluate(step), step
                    after_evaluation(step, after)
                if step == total:
                    break
            if step == total:
                break
    if evaluated < step:  # of a stream nobody knew that it would end here
        after = evaluate(step)
        after_evaluation(step, after)
    print0(
        f"{step} steps in {time.perf_counter() - started:.0f} s{ended_early(step, total, settings.epochs)}; "
        f"{task.headline} {before[task.headline]:.4g} -> {after[task.headline]:.4g}"
    )
    return {"before": before, "after": after}


def ended_early(step: int, total: int, epochs: int) -> str:
    """What to say of data that were streamed and ended before --max_steps; else nothing."""
    if step == total:
        return ""
    return (
        f" (of --max_steps {total}: the data ended with --num_train_epochs {epochs}, before the learning rate had run "
        "its course)"
    )


def _stop_if_not_finite(step: int, figures: dict[str, float]) -> None:
    """Raises TrainingStopped. The figures are reduced, so every rank does so together."""
    if not math.isfinite(figures["loss"]):
        raise TrainingStopped(
            f"step {step}: loss is {figures['loss']} (gradient norm {figures['grad_norm']}, learning rate "
            f"{figures['lr']:.2e}). Likely a learning rate that is too high, or fp16 overflow: try --dtype bf16 or a "
            "tenth of the learning rate"
        )


@dataclass
class Supervised:
    """Step 1: next-token loss on the answers only, EOS included; prompt and padding masked."""

    engine: Actor
    eval_loader: Iterable[SupervisedBatch]
    headline: str = "perplexity"

    def sequences(self, batch: SupervisedBatch) -> Sequences:
        return Sequences.from_batch(batch)

    def count(self, batch: SupervisedBatch) -> int:
        return int(learned_mask(batch, self.sequences(batch)).sum())

    def loss(self, batch: SupervisedBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        sequences = self.sequences(batch)
        output = self.engine.logprobs(sequences)
        return supervised_loss(output.logprobs, learned_mask(batch, sequences), denominator), {}

    def evaluate(self) -> dict[str, float]:
        return perplexity(self.engine, self.eval_loader)


@dataclass
class Ranking:
    """Step 2: the chosen answer's score above the rejected one's (Bradley-Terry); of several ranked answers each one's
    above those of the answers ranked below it.
    """

    engine: TrainedReward
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
        chosen, rejected = pair_scores(self.engine, batch)
        figures = {"accuracy": (chosen > rejected).float().sum(), "margin": (chosen - rejected).detach().sum()}
        margin = batch.margin if self.use_margin else None
        options = {"label_smoothing": self.label_smoothing, "centring": self.centring}
        return ranking_loss(chosen, rejected, denominator, margin, **options), figures

    def loss_of_rankings(self, batch: RankedBatch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        """A prompt with its answers counts once, however many they are; the figures are means over its pairs."""
        scores = self.engine.score(self.sequences(batch))  # (N,)
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
        return ranking_accuracy(self.engine, self.eval_loader)


@dataclass
class DirectPreference:
    """DPO, or R-DPO with `alpha`: a policy straight from the pairs, without a reward model.

    An answer's implicit reward is beta * (log pi(y|x) - log pi_ref(y|x)).
    """

    engine: Actor
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
        return ranking_accuracy(self.engine, self.eval_loader, self.implicit_rewards)

    def implicit_rewards(self, engine: Actor, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """(B,) of the chosen and of the rejected answers."""
        policy, reference, _ = self.answers(batch)
        return tuple(self.beta * (p - r) for p, r in zip(policy, reference, strict=True))

    def answers(self, batch: PairBatch) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(chosen, rejected) log-probs of whole answers under the policy, under the reference, and their lengths."""
        both = self.sequences(batch)
        policy = answer_logprob(self.engine.logprobs(both).logprobs, both.answer_mask)  # (2B,)
        reference = answer_logprob(self.reference.logprobs(both), both.answer_mask)
        return policy.chunk(2), reference.chunk(2), both.answer_lengths.chunk(2)
