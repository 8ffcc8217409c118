"""A step of TRL's trainers of reinforcement learning."""

from __future__ import annotations

from pathlib import Path

from rlhf_ways.clock import Clock
from rlhf_ways.models import LEARNING_RATE
from turns import SHARED, Turns

WAYS = {"TRL RLOO k=2": "RLOO", "TRL GRPO k=2": "GRPO"}
SAMPLES = 2
# Methods of TRL 1.16's trainers, by the part of a step that they are.
WATCHED = {
    "_generate": "generate",
    "_calculate_rewards": "score",
    "_generate_and_score_completions": "reference",
    "training_step": "update",
}


class Theirs:
    """One of `WAYS`."""

    def __init__(self, way: str, folder: Path, cell, steps: list[list[list[int]]]) -> None:
        """Makes the trainer.

        Args:
            steps: The prompts of each step to come: TRL wants a data set beforehand.
        """
        import trl
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
        config = getattr(trl, f"{WAYS[way]}Config")(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=cell.prompts * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=cell.answer,
            top_p=cell.top_p,
            top_k=0,
            temperature=1.0,
            beta=0.05,
            max_steps=len(steps),
            shuffle_dataset=False,
            **SHARED | {"learning_rate": LEARNING_RATE},
        )
        self.trainer = getattr(trl, f"{WAYS[way]}Trainer")(
            AutoModelForCausalLM.from_pretrained(folder / "policy"),
            reward_funcs=AutoModelForSequenceClassification.from_pretrained(folder / "reward"),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [tokenizer.decode(row) for rows in steps for row in rows]}),
            processing_class=tokenizer,
            reward_processing_classes=AutoTokenizer.from_pretrained(folder / "reward"),
        )
        self.clock, self.length = Clock(cell.seconds), 0.0
        for name, part in WATCHED.items():
            self.clock.watch(self.trainer, name, part)
        self.turns = Turns(self.trainer, self._look)

    def _look(self) -> None:
        self.length = self.trainer._metrics["train"]["completions/mean_length"][-1]

    def step(self, rows: list[list[int]]) -> dict[str, float]:
        """The next step: seconds of its parts."""
        with self.clock.step() as found:
            self.turns.step()
        return found | {"length": self.length}
