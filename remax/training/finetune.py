"""The one training loop of steps 1 and 2. What is learned is a `Task`; the loop is cadence: accumulate, step, evaluate,
log, stop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from remax.core.batches import Batch, groups, to_device
from remax.training.tasks import Task
from utils.distributed import print0, sum_across_ranks
from utils.metrics import MetricsLogger, progress
from utils.run import TrainingStopped, UserError


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
