"""One of TRL's trainers, a step at a time: it trains in a thread of its own, which waits for its turn."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from typing import Any

import torch


def trl_is_here() -> bool:
    """Whether trl can be imported."""
    return importlib.util.find_spec("trl") is not None


class Turns:
    """A trainer of transformers that takes a step when it is told to; as many as its `max_steps`, all of them."""

    def __init__(self, trainer: Any, after_step: Callable[[], None] = lambda: None) -> None:
        """Starts the training, up to its first step.

        Args:
            after_step: Called at the end of each step.
        """
        from transformers.trainer_callback import PrinterCallback, TrainerCallback

        mine, self.over, self.failure = threading.Semaphore(0), threading.Semaphore(0), None
        self.mine, self.trainer = mine, trainer

        class Hold(TrainerCallback):
            """What lies between the beginnings of two steps, the next batch among it, belongs to the first of them."""

            def on_step_begin(hold, *args: Any, **options: Any) -> None:
                self.over.release()
                mine.acquire()

            def on_step_end(hold, *args: Any, **options: Any) -> None:
                after_step()

            def on_train_end(hold, *args: Any, **options: Any) -> None:
                self.over.release()

        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Hold())
        threading.Thread(target=self._train, daemon=True).start()
        self._wait()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as failure:  # raised again where the step was asked for
            self.failure = failure
            self.over.release()

    def _wait(self) -> None:
        self.over.acquire()
        if self.failure is not None:
            raise self.failure

    def step(self) -> None:
        """Takes one step."""
        self.mine.release()
        self._wait()


SHARED = {  # settings of TRL's trainers, so that they do this project's work
    "learning_rate": 9.65e-6,
    "adam_beta2": 0.95,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": not torch.cuda.is_available(),
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}
