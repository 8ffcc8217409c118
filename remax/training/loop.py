"""The one training loop of all stages: epochs, evaluation, logging, stopping.

What is learned is up to the learner.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol, cast

from torch import nn
from torch.utils.data import DataLoader

from remax.core.batches import groups
from remax.engines.zero import Size, size_of
from utils.data.loaders import ResumableSampler
from utils.distributed import peak_memory, print0
from utils.metrics import MetricsLogger, progress
from utils.run import TrainingStopped, UserError


@dataclass(frozen=True)
class Cadence:
    """When things happen, in optimizer steps (of step 3: rollouts that are learned from).

    Attributes:
        epochs: Passes over the data; 0: as many as `max_steps` takes.
        batches_per_step: Micro-batches that are accumulated, or prompt batches that are collected, before a step.
        max_steps: Where to stop; 0: at the end of the epochs.
        evaluate_every: Steps between evaluations; 0: once an epoch.
    """

    epochs: int = 1
    batches_per_step: int = 1
    max_steps: int = 0
    evaluate_every: int = 0

    def steps_per_epoch(self, batches: int) -> int:
        """Steps of an epoch with this many batches; the last step may have fewer of them than the others."""
        return math.ceil(batches / self.batches_per_step)

    def total_steps(self, batches: int) -> int:
        """Steps of a whole training with this many batches per epoch."""
        total = self.epochs * self.steps_per_epoch(batches)
        if not self.epochs:
            return self.max_steps
        return min(total, self.max_steps) if self.max_steps else total

    def bound(self, batches: int) -> str:
        """Which of two bounds ends such a training; empty where there is only one."""
        if not (self.epochs and self.max_steps):
            return ""
        total, steps = self.epochs * self.steps_per_epoch(batches), f"--max_steps {self.max_steps}"
        if total < self.max_steps:
            return f"--num_train_epochs {self.epochs} ends before {steps}"
        return f"{steps}, of {total} with --num_train_epochs {self.epochs}"


@dataclass
class TrainState:
    """Where a training stands; equal on every rank.

    Attributes:
        epoch: Passes over the data that are complete.
        best: Figures of the best evaluation, that of the start (step 0) included.
    """

    step: int = 0
    epoch: int = 0
    evaluated: int = 0
    best_step: int = 0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)

    def record(self, figures: dict[str, float], headline: str, sign: int = 1) -> bool:
        """Takes in an evaluation at the present step; whether it is the best so far by the figure `headline`."""
        self.after, self.evaluated = figures, self.step
        if self.step == 0:
            self.before = figures
        new, old = sign * figures[headline], sign * self.best.get(headline, math.nan)
        best = not self.best or new > old or (math.isnan(old) and not math.isnan(new))
        if best:
            self.best, self.best_step = figures, self.step
        return best

    def course(self, headline: str) -> str:
        """The figure before, after, and at its best where that was neither: "1.2 -> 2.5 (2.7 at step 40)"."""
        before, after, best = (figures[headline] for figures in (self.before, self.after, self.best))
        text = f"{headline} {before:.4g} -> {after:.4g}"
        return text if self.best_step == self.step else f"{text} (best: {best:.4g} at step {self.best_step})"

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """What results.json says of the training."""
        return {"before": self.before, "after": self.after, "best": self.best}


class Evaluation(Protocol):
    """What an evaluation gives: figures, equal on every rank, and whatever else its reader knows of."""

    @property
    def figures(self) -> dict[str, float]:
        """By name."""
        ...


class Learner(Protocol):
    """What the loop drives."""

    @property
    def label(self) -> str:
        """Name of the progress bar."""
        ...

    @property
    def headline(self) -> str:
        """The figure of `evaluate` that people look at, and that the best model is chosen by."""
        ...

    @property
    def sign(self) -> int:
        """1 where a higher `headline` is better, else -1."""
        ...

    @property
    def trained(self) -> Mapping[str, nn.Module]:
        """The models that learn, by name."""
        ...

    def learn(self, step: int, batches: list[Any]) -> dict[str, float]:
        """One step on its batches; figures, equal on every rank."""
        ...

    def check(self, step: int, figures: dict[str, float]) -> None:
        """After the figures were logged: raises TrainingStopped, on every rank, where going on is pointless."""
        ...

    def evaluate(self) -> Evaluation:
        """Measures on held-out rows, with the model in eval mode."""
        ...

    def evaluated(self, state: TrainState, evaluation: Any, best: bool) -> str | None:
        """After an evaluation was logged; why to stop now, or None. The same on every rank."""
        ...


def train(learner: Learner, loader: DataLoader, cadence: Cadence, metrics: MetricsLogger) -> TrainState:
    """The whole training, with an evaluation before it, at every cadence, and at its end.

    Args:
        loader: Batches of this rank; its sampler has `set_epoch`.

    Raises:
        TrainingStopped: See `Learner.check`; or a row of streamed data is faulty; on every rank at the same step.
    """
    epoch_steps, total = cadence.steps_per_epoch(len(loader)), cadence.total_steps(len(loader))
    state, started = TrainState(), time.perf_counter()
    if bound := cadence.bound(len(loader)):
        print0(f"{total} steps: {bound}")
    sizes = {name: size_of(model) for name, model in learner.trained.items()}
    for name, size in sizes.items():
        print0(f"{name}: {size}")
    whole = sum(sizes.values(), Size())

    def evaluate() -> str | None:
        with error_context(f"evaluation at step {state.step}"):
            evaluation = learner.evaluate()
        figures = evaluation.figures
        spent = {"seconds": time.perf_counter() - started, "peak_memory_gib": peak_memory() / 2**30}
        if state.step == 0:
            spent |= {"parameters": whole.parameters, "trained_share": whole.share}
        values = {f"eval/{k}": v for k, v in figures.items()} | {f"run/{k}": v for k, v in spent.items()}
        metrics.log(state.step, values, epoch=state.step / epoch_steps)
        return learner.evaluated(state, evaluation, state.record(figures, learner.headline, learner.sign))

    evaluate()
    with progress(total, desc=learner.label, unit="steps") as bar:
        for batches in batches_of_steps(loader, cadence, state):
            state.step += 1
            with error_context(f"step {state.step}"):
                figures = learner.learn(state.step, batches)
            metrics.log(state.step, {f"train/{k}": v for k, v in figures.items()}, epoch=state.step / epoch_steps)
            bar.update(1)
            learner.check(state.step, figures)
            if state.step % (cadence.evaluate_every or epoch_steps) == 0 or state.step == total:
                if reason := evaluate():
                    print0(f"stopped at step {state.step}: {reason}")
                    break
            if state.step == total:
                break
    if state.evaluated < state.step:  # of a stream nobody knew that it would end here
        evaluate()
    ended = ""
    if total > state.step and state.epoch == cadence.epochs:
        ended = (
            f" (of --max_steps {total}: the data ended with --num_train_epochs {cadence.epochs}, before the learning "
            "rate had run its course)"
        )
    elif bound and total == state.step:
        ended = f" ({bound})"
    seconds = time.perf_counter() - started
    print0(f"{state.step} steps in {seconds:.0f} s{ended}; {state.course(learner.headline)}")
    return state


def batches_of_steps(loader: DataLoader, cadence: Cadence, state: TrainState) -> Iterator[list[Any]]:
    """The batches of one step after the other, epoch by epoch; counts the epochs in `state`.

    Raises:
        TrainingStopped: A row of streamed data is faulty; on every rank at the same step, as each reads all rows.
    """
    for epoch in range(cadence.epochs) if cadence.epochs else count():
        cast(ResumableSampler, loader.sampler).set_epoch(epoch)
        before = state.step
        try:
            yield from groups(loader, cadence.batches_per_step)
        except UserError as error:
            raise TrainingStopped(f"The training data cannot be read any further: {error}") from error
        state.epoch = epoch + 1
        if state.step == before:
            return  # no rows: another pass would not find any


@contextmanager
def error_context(when: str) -> Iterator[None]:
    """A UserError raised inside, such as a reward function's, says when it happened."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{when}: {error}") from error
