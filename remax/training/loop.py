"""The one training loop of all stages: epochs, evaluation, logging, stopping.

What is learned is up to the learner.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any, NoReturn, Protocol

from torch.utils.data import DataLoader

from remax.checkpoint.checkpoints import Checkpoints
from remax.checkpoint.ema import WeightAverage
from remax.checkpoint.state import RunState, Stateful
from remax.core.batches import groups
from remax.engines.base import TrainedEngine
from remax.engines.zero import Size, size_of
from utils.data.ahead import Ahead
from utils.distributed import gather_objects, is_main, peak_memory, print0, sum_across_ranks
from utils.metrics import MetricsLogger, progress
from utils.present import present
from utils.run import NotFinite, TrainingStopped, UserError
from utils.stopping import allow, asked_to_stop, deferring, leave
from utils.whereabouts import at


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
        seconds: Spent until the last checkpoint, over all starts.
        finished: An evaluation was a reason to stop.
        best: Figures of the best evaluation, that of the start (step 0) included.
    """

    step: int = 0
    epoch: int = 0
    seconds: float = 0.0
    finished: bool = False
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

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        vars(self).update(state)

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
    def engines(self) -> Mapping[str, TrainedEngine]:
        """The models that learn, by name."""
        ...

    @property
    def average(self) -> WeightAverage | None:
        """A moving average of the weights of the first of them."""
        ...

    @property
    def values(self) -> Mapping[str, Stateful]:
        """What else moves while it learns, by name."""
        ...

    def learn(self, step: int, batches: list[Any]) -> dict[str, float]:
        """One step on its batches; figures, equal on every rank.

        Among them are `tokens`, those of all ranks that a rate is told of, and the seconds of parts of the step, as
        "seconds_<part>".
        """
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


def train(
    learner: Learner,
    loader: DataLoader,
    cadence: Cadence,
    metrics: MetricsLogger,
    checkpoints: Checkpoints | None = None,
) -> TrainState:
    """The whole training, with an evaluation before it, at every cadence, and at its end; or the rest of it.

    Args:
        loader: Batches of this rank; its sampler has `set_epoch`.
        checkpoints: Those to write, and the one to go on from.

    Raises:
        TrainingStopped: See `Learner.check`; or a row of streamed data is faulty; on every rank at the same step.
        SystemExit: With `checkpoints`, a signal or --max_hours ended it; the state is saved.
    """
    run = _Run(learner, loader, cadence, metrics, checkpoints)
    if checkpoints is None:
        run.all_steps()
        return run.state
    with deferring(checkpoints.saving.max_hours):
        try:
            run.all_steps()
        except TrainingStopped:
            checkpoints.finish()
            raise
    return run.state


class _Run:
    """One start of a training, until its end or its interruption."""

    def __init__(
        self,
        learner: Learner,
        loader: DataLoader,
        cadence: Cadence,
        metrics: MetricsLogger,
        checkpoints: Checkpoints | None,
    ):
        self.learner, self.loader, self.cadence, self.metrics = learner, loader, cadence, metrics
        self.ahead = Ahead(loader, cadence.batches_per_step + 1)
        self.checkpoints, self.state = checkpoints, TrainState()
        self.epoch_steps = cadence.steps_per_epoch(len(loader))
        self.total, self.bound = cadence.total_steps(len(loader)), cadence.bound(len(loader))
        self.started = time.perf_counter()
        self.pause = 0.0  # seconds that the last checkpoint has taken
        self.turn = self.logged = self.started  # when the loop turned to the next batches, and last logged a step
        self.aside = 0.0  # seconds since then that belong to no step: evaluations and checkpoints
        self.suspect, self.norm_known = 0, False  # the first of the last steps that were not finite; 0: they were
        self.left_out = range(0)  # of the batches that are drawn from here on
        self.asked = self.started  # when the loop last asked whether to stop
        self.longest = 0.0  # seconds that it has taken from one such question to the next

    @property
    def seconds(self) -> float:
        """Of this start and those before it."""
        return self.state.seconds + time.perf_counter() - self.started

    def all_steps(self) -> None:
        state, learner, total = self.state, self.learner, self.total
        if self.bound:
            print0(f"{total} steps: {self.bound}")
        sizes = {name: size_of(engine.model) for name, engine in learner.engines.items()}
        for name, size in sizes.items():
            print0(f"{name}: {size}")
        self.begin()
        if state.step == 0:
            whole = sum(sizes.values(), Size())
            self.evaluate({"parameters": whole.parameters, "trained_share": whole.share})
        with progress(total, desc=learner.label, unit="steps", done=state.step) as bar:
            while True:
                try:
                    self.steps(bar)
                    break
                except NotFinite as lost:
                    self.go_back(lost)
                    bar.n = state.step
        if state.evaluated < state.step:  # of a stream nobody knew that it would end here
            self.evaluate()
        # A long training has its end kept, too: the model is still to be written, and somebody may wish to go on.
        self.keep(self.checkpoints is not None and self.checkpoints.last is not None)
        if self.checkpoints:
            self.checkpoints.finish()
        print0(f"{state.step} steps in {self.seconds:.0f} s{self.ended()}; {state.course(learner.headline)}")

    def steps(self, bar: Any) -> None:
        """From where the state stands to the end."""
        state, total = self.state, self.total
        if state.finished or state.step >= total:
            return
        self.turn = self.logged = time.perf_counter()
        self.aside = 0.0
        with closing(batches_of_steps(self.ahead, self.cadence, state)) as steps:
            for drawn, batches in enumerate(steps):
                if drawn in self.left_out:
                    continue
                self.step(batches)
                bar.update(1)
                if state.step % (self.cadence.evaluate_every or self.epoch_steps) == 0 or state.step == total:
                    with self.outside_of_steps():
                        reason = self.evaluate()
                    if reason:
                        print0(f"stopped at step {state.step}: {reason}")
                        state.finished = True
                        break
                if state.step >= total:
                    break
                self.keep(self.checkpoints is not None and self.checkpoints.due(state.step))
                self.turn = time.perf_counter()

    def go_back(self, lost: NotFinite) -> None:
        """To the last checkpoint, and on without the batches of the last steps that were not finite; once.

        Raises:
            NotFinite: `lost`, where that is not wished, was done before, or cannot be done.
        """
        first, last, seconds = self.suspect or self.state.step, self.state.step, self.seconds
        if self.checkpoints is None or not self.checkpoints.saving.go_back or self.left_out:
            raise lost
        if not self.checkpoints.go_back():
            raise NotFinite(f"{lost}. There is no checkpoint yet for --on_nan rollback to go back to") from None
        state = self.state
        self.started, state.seconds, self.suspect = time.perf_counter(), seconds, 0
        self.left_out = range(first - state.step - 1, last - state.step)
        self.metrics.go_back(state.step)
        batch = f"the batch of step {first}" if first == last else f"the batches of steps {first} to {last}"
        told = f"{lost}. --on_nan rollback: back to step {state.step}, and on without {batch}"
        self.metrics.remark("rollback", told, state.step)
        print0(told)

    def begin(self) -> None:
        """Goes on from a checkpoint, where there is one to go on from."""
        if self.checkpoints is None:
            return
        values: dict[str, Stateful] = {
            "training": self.state,
            "rows": self.ahead,
            **self.learner.values,
        }
        self.checkpoints.begin(RunState(self.learner.engines, values, self.learner.average))
        if self.state.step:
            print0(f"goes on after step {self.state.step} of {self.total}")
            self.tell_of_rows()

    def tell_of_rows(self) -> None:
        """Steps made count as steps: after other batches or ranks, those that are to come may not fit the rows left."""
        cadence, sampler, step = self.cadence, self.ahead.sampler, self.state.step
        if not cadence.epochs or self.total == cadence.max_steps:  # the rows are not what it ends with
            return
        batches = math.ceil(len(self.loader) - sampler.drawn / present(self.loader.batch_size, "batch_size"))
        rest = (cadence.epochs - sampler.epoch - 1) * self.epoch_steps + cadence.steps_per_epoch(batches)
        if rest != self.total - step:
            print0(
                f"--num_train_epochs {cadence.epochs}: the rows that are left are enough for {rest} steps, and "
                f"{max(0, self.total - step)} are to come; --max_steps {step + rest} without --num_train_epochs takes "
                "each once"
            )

    def step(self, batches: list[Any]) -> None:
        """One step of the learner, with its figures."""
        state, waited = self.state, time.perf_counter() - self.turn
        state.step += 1
        with error_context(f"step {state.step}"), at(f"step {state.step}"):
            figures = self.learner.learn(state.step, batches)
        shown = {f"train/{k}": v for k, v in self.timed(figures, waited).items()}
        if self.pause:
            shown["train/seconds_checkpoint"], self.pause = self.pause, 0.0
        self.metrics.log(state.step, shown, epoch=state.step / self.epoch_steps)
        self.suspect = 0 if self.finite(figures) else self.suspect or state.step
        self.learner.check(state.step, figures)

    def timed(self, figures: Mapping[str, float], waited: float) -> dict[str, float]:
        """The figures of a step with its wall time, which its parts, the wait for batches and the rest add up to.

        It goes from one step's log to the next one's, without evaluations and checkpoints.
        """
        now = time.perf_counter()
        seconds, self.logged, self.aside = now - self.logged - self.aside, now, 0.0
        parts = sum(value for name, value in figures.items() if name.startswith("seconds_"))
        spent = {
            "seconds_data": waited,
            "seconds_rest": max(seconds - waited - parts, 0.0),
            "seconds_per_step": seconds,
        }
        rest = {name: value for name, value in figures.items() if name != "tokens"}
        return {**rest, **spent, "tokens_per_second": figures["tokens"] / seconds}

    @contextmanager
    def outside_of_steps(self) -> Iterator[None]:
        """What happens inside is part of no step's time."""
        begin = time.perf_counter()
        yield
        self.aside += time.perf_counter() - begin

    def finite(self, figures: Mapping[str, float]) -> bool:
        """Whether a step's loss is a number, and the gradient that was applied."""
        norm = figures.get("grad_norm", math.nan)
        self.norm_known = self.norm_known or math.isfinite(norm)  # some engines cannot tell it
        applied = math.isfinite(norm) or not self.norm_known or bool(figures.get("skipped"))
        return math.isfinite(figures.get("loss", 0.0)) and applied

    def evaluate(self, more: Mapping[str, float] | None = None) -> str | None:
        """Measures and logs; why to stop now, or None."""
        state = self.state
        place = f"evaluation at step {state.step}"
        with error_context(place), at(place):
            evaluation = self.learner.evaluate()
        figures = evaluation.figures
        spent = {"seconds": self.seconds, "peak_memory_gib": peak_memory() / 2**30, **(more or {})}
        values = {f"eval/{k}": v for k, v in figures.items()} | {f"run/{k}": v for k, v in spent.items()}
        self.metrics.log(state.step, values, epoch=state.step / self.epoch_steps)
        best = state.record(figures, self.learner.headline, self.learner.sign)
        return self.learner.evaluated(state, evaluation, best)

    def keep(self, due: bool) -> None:
        """A checkpoint after a step, where one is due by the clock of rank 0; the end, where something asks for it."""
        if self.checkpoints is None:
            return
        reason = asked_to_stop()
        told = sum_across_ranks({"save": due and is_main(), "stop": reason is not None})
        if (told["save"] or told["stop"]) and not self.suspect:
            self.save()
        if told["stop"]:
            self.stop(next(filter(None, gather_objects(reason))))
        now = time.perf_counter()
        self.asked, self.longest = now, max(self.longest, now - self.asked)
        allow(2 * (self.longest + self.checkpoints.slowest))

    def save(self) -> None:
        """Everything until here, on the disk or on its way there."""
        assert self.checkpoints is not None
        state, seconds = self.state, self.seconds
        self.started, state.seconds = time.perf_counter(), seconds
        with at(f"the checkpoint of step {state.step}"), self.outside_of_steps():
            self.metrics.flush()
            self.pause = self.checkpoints.save(state.step)

    def stop(self, reason: str) -> NoReturn:
        """Leaves when the checkpoint is written.

        Raises:
            SystemExit: Its status says why, see `utils.stopping.leave`.
        """
        assert self.checkpoints is not None
        self.checkpoints.finish()
        last, kept = self.checkpoints.last, self.checkpoints.kept(self.state.step)
        state = f"its state is in {last}, and --resume auto goes on from there"
        if not kept:
            state = f"its state could not be saved; that of before is in {last}" if last else "no state could be saved"
        print0(f"stopped by {reason} after step {self.state.step}: {state}")
        leave(reason)

    def ended(self) -> str:
        """Why the training ended where it did, if that is worth a word."""
        state = self.state
        if self.total > state.step and state.epoch == self.cadence.epochs:
            planned = f"--max_steps {self.total}" if self.total == self.cadence.max_steps else f"{self.total}"
            return (
                f" (of {planned}: the data ended with --num_train_epochs {self.cadence.epochs}, before "
                "the learning rate had run its course)"
            )
        return f" ({self.bound})" if self.bound and self.total == state.step else ""


def batches_of_steps(loader: Ahead, cadence: Cadence, state: TrainState) -> Generator[list[Any], None, None]:
    """The batches of one step after the other, epoch by epoch; counts the epochs in `state`, and begins where it is.

    Raises:
        TrainingStopped: A row of streamed data is faulty; on every rank at the same step, as each reads all rows.
    """
    sampler = loader.sampler
    for epoch in count(state.epoch):
        if epoch == cadence.epochs and cadence.epochs:
            return
        sampler.set_epoch(epoch)
        before, begun = state.step, sampler.resume_at
        try:
            with closing(iter(loader)) as batches:
                yield from groups(batches, cadence.batches_per_step)
        except UserError as error:
            raise TrainingStopped(f"The training data cannot be read any further: {error}") from error
        state.epoch = epoch + 1
        if state.step == before and not begun:
            return  # no rows: another pass would not find any


@contextmanager
def error_context(when: str) -> Iterator[None]:
    """A UserError raised inside, such as a reward function's, says when it happened."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{when}: {error}") from error
