"""A step of TRL's trainers, one at a time: each trains in a thread of its own, which waits for its turn."""

from __future__ import annotations

import threading
from pathlib import Path

from rlhf_ways.clock import Clock

WAYS = {"TRL RLOO k=2": "RLOO", "TRL GRPO k=2": "GRPO"}
SAMPLES = 2
# Methods of TRL 1.16's trainers, by the part of a step that they are.
WATCHED = {
    "_generate": "generate",
    "_calculate_rewards": "score",
    "_generate_and_score_completions": "reference",
    "compute_loss": "update",
    "training_step": "update",
}


class Theirs:
    """One of `WAYS`."""

    def __init__(self, way: str, folder: Path, cell, rounds: list[list[list[int]]]) -> None:
        """Makes the trainer.

        Args:
            rounds: The prompts of each step to come: TRL wants a data set beforehand.
        """
        import trl
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
        from transformers.trainer_callback import PrinterCallback, TrainerCallback

        tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
        kind, theirs = WAYS[way], self

        class Turns(TrainerCallback):
            def on_step_begin(self, *args, **options):
                theirs.turn.acquire()

            def on_step_end(self, *args, **options):
                theirs.length = theirs.trainer._metrics["train"]["completions/mean_length"][-1]
                theirs.over.release()

        config = getattr(trl, f"{kind}Config")(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=cell.prompts * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=cell.answer,
            top_p=cell.top_p,
            top_k=0,
            temperature=1.0,
            beta=0.05,
            max_steps=len(rounds),
            learning_rate=9.65e-6,
            shuffle_dataset=False,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            adam_beta2=0.95,
        )
        prompts = [tokenizer.decode(row) for rows in rounds for row in rows]
        model = AutoModelForCausalLM.from_pretrained(folder / "policy")
        model.generation_config.max_length = None
        self.trainer = getattr(trl, f"{kind}Trainer")(
            model,
            reward_funcs=AutoModelForSequenceClassification.from_pretrained(folder / "reward"),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            reward_processing_classes=AutoTokenizer.from_pretrained(folder / "reward"),
            callbacks=[Turns()],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.clock = Clock(cell.seconds)
        for name, part in WATCHED.items():
            self.clock.watch(self.trainer, name, part)
        self.turn, self.over = threading.Semaphore(0), threading.Semaphore(0)
        self.failure: BaseException | None = None
        self.length = 0.0  # mean, of the last step's answers
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as failure:  # noqa: BLE001, to be raised in the thread that measures
            self.failure = failure
            self.over.release()

    def step(self, rows: list[list[int]]) -> dict[str, float]:
        """The next step: seconds of its parts."""
        with self.clock.step() as found:
            self.turn.release()
            self.over.acquire()
        if self.failure is not None:
            raise self.failure
        return found | {"length": self.length}
