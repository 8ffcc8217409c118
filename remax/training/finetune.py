"""Steps 1 and 2 on the training loop: gradients of several micro-batches, one step, its figures.

What is learned is a `Task`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader

from remax.checkpoint.checkpoints import Checkpoints
from remax.checkpoint.state import Stateful
from remax.core.batches import to_device
from remax.core.sums import Figure, Figures, add, reduce
from remax.engines.base import TrainedEngine
from remax.training.loop import Cadence, Evaluation, TrainState, train
from remax.training.suspects import Decode, Part, suspects
from remax.training.tasks import Task
from utils.distributed import sum_across_ranks, world_size
from utils.metrics import MetricsLogger
from utils.run import NotFinite


def optimizer_step(task: Task, batches: list[Any], losses: list[Part] | None = None) -> dict[str, float]:
    """One optimizer step over several micro-batches, normalised by counts over all of them and all ranks.

    Args:
        losses: Takes the loss of each micro-batch, where it was computed.

    Returns:
        Means over what the task counts and, over all token slots that the model computed, the share of padding.
    """
    begin = time.perf_counter()
    # Counted before they are copied: on a GPU each number would be waited for.
    rows, counts = [task.sequences(batch) for batch in batches], [task.count(batch) for batch in batches]
    tokens = Figure(sum(sequences.tokens for sequences in rows), 1)
    slots = Figure(sum(task.learner.slots(sequences) for sequences in rows), 1)
    batches = [to_device(batch) for batch in batches]
    totals = sum_across_ranks({name: sum(count[name] for count in counts) for name in counts[0]})
    figures: Figures = {}
    for i, batch in enumerate(batches):
        loss, more = task.loss(batch, totals)
        if losses is not None:
            losses.append((rows[i], {"loss": loss.detach()}))
        task.learner.backward(loss, last=i == len(batches) - 1)
        name, total = next(iter(totals.items()))  # the batches' losses add up, whichever count they are weighed by
        figures = add(figures, {"loss": Figure(loss.detach() * total, counts[i][name]), **more})
    result = task.learner.step()
    means = reduce(figures | {"tokens of a rank": tokens, "slots of a rank": slots})
    tokens_read, slots_computed = means.pop("tokens of a rank"), means.pop("slots of a rank")
    return (
        means
        | result.figures
        | {"padding_share": 1 - tokens_read / slots_computed}
        | {"seconds_update": time.perf_counter() - begin, "tokens": tokens_read * world_size()}
    )


@dataclass(frozen=True)
class Measured:
    """An evaluation that has figures alone."""

    figures: dict[str, float]


@dataclass
class Finetuning:
    """A task on the training loop."""

    task: Task
    decode: Decode = str  # token ids as text
    label: str = "training"
    losses: list[Part] = field(default_factory=list, init=False)  # of the present step's micro-batches

    @property
    def headline(self) -> str:
        """See `Task.headline`."""
        return self.task.headline

    @property
    def sign(self) -> int:
        """See `Task.sign`."""
        return self.task.sign

    @property
    def engines(self) -> dict[str, TrainedEngine]:
        """The one model that learns."""
        return {"model": self.task.learner.engine}

    @property
    def average(self) -> None:
        """None is kept."""

    @property
    def values(self) -> dict[str, Stateful]:
        """Nothing else moves."""
        return {}

    def learn(self, step: int, batches: list[Any]) -> dict[str, float]:
        """See `optimizer_step`."""
        self.task.learner.train()
        self.losses.clear()
        return optimizer_step(self.task, batches, self.losses)

    def check(self, step: int, figures: dict[str, float]) -> None:
        """Stops where the loss is lost, or where nothing but overflow is left."""
        stop_if_not_finite(step, figures, lambda: suspects(self.losses, self.decode))

    def evaluate(self) -> Measured:
        """The task's figures on held-out rows."""
        self.task.learner.train(False)
        return Measured(self.task.evaluate())

    def evaluated(self, state: TrainState, evaluation: Evaluation, best: bool) -> None:
        """Nothing is done: steps 1 and 2 keep the last model."""


def finetune(
    task: Task,
    loader: DataLoader,
    cadence: Cadence,
    metrics: MetricsLogger,
    checkpoints: Checkpoints | None = None,
    decode: Decode = str,
) -> dict[str, dict[str, float]]:
    """Trains, see `train`, and returns the evaluation before and after: {"before": {...}, "after": {...}}."""
    state = train(Finetuning(task, decode), loader, cadence, metrics, checkpoints)
    return {"before": state.before, "after": state.after}


def stop_if_not_finite(step: int, figures: dict[str, float], suspects: Callable[[], str] = str) -> None:
    """Ends a training whose loss is lost; for `suspects` every rank is asked then.

    Raises:
        NotFinite: The loss is not finite. The figures are reduced, so every rank raises it together.
    """
    if not math.isfinite(figures["loss"]):
        raise NotFinite(
            f"step {step}: loss is {figures['loss']} (gradient norm {figures['grad_norm']}, learning rate "
            f"{figures['lr']:.2e}). Likely a learning rate that is too high, or fp16 overflow: try --dtype bf16 or a "
            f"tenth of the learning rate. {suspects()}".rstrip(". ")
        )
