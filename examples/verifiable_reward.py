"""A reward that is checked against reference answers, through the library's own loaders and trainer.

Each row of the data has a question and its reference answer, in the form of GSM8K: "3 + 4 = 7", and behind it "#### 7".
The trainer reads the questions, and the column `answer` comes with them because the reward function takes it.

The policy is a tiny Llama that learnt from answers of which about half are right. ReMax then raises the share of right
answers from one half to nearly nine in ten. There are 25 sums, which a model of this size learns by heart: the example
shows the plumbing, not arithmetic.

    python examples/verifiable_reward.py         (15 seconds on one CPU core)

In the third stage: `--prompt_column question --reward_fn examples/verifiable_reward.py:correct`.
"""

import json
import random
import tempfile
from pathlib import Path

import torch

from remax import (
    Cadence,
    CompositeReward,
    EngineConfig,
    FunctionReward,
    OptimizerConfig,
    Part,
    ReMax,
    Trainer,
    TrainerSettings,
    as_sequences,
    load_actor,
    load_reference,
    reward_function,
)
from remax.checkpoint.export import export
from remax.core.losses import supervised_loss
from remax.demo.tiny_models import save_tiny_model, train_tokenizer
from remax.evaluation.policy import evaluate_policy
from remax.models.loading import quiet_libraries
from utils.data.config import DataConfig
from utils.data.loaders import build_loaders
from utils.data.shapes import as_dialogue
from utils.metrics import MetricsLogger

ROWS = [
    {"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
    for a in range(5)
    for b in range(5)
]
WARM_UP, EPOCHS = 150, 100


def correct(prompts: list[str], answers: list[str], answer: list[str]) -> list[float]:
    """1 where the policy's answer is the number behind #### of the data's column `answer`, else 0."""
    return [float(given.strip() == result(reference)) for given, reference in zip(answers, answer, strict=True)]


def result(reference: str) -> str:
    """The number behind ####."""
    return reference.rpartition("####")[2].strip()


def fine_tune(folder: Path) -> None:
    """The model of `folder` learns to answer with a number, which is right in about half of the cases."""
    actor, tokenizer = load_actor(folder, optimizer=OptimizerConfig(3e-3, total_steps=WARM_UP))
    prompts = [as_dialogue(row["question"]) for row in ROWS]  # as the loaders write a bare question
    for _ in range(WARM_UP):
        answers = [random.choice([result(row["answer"]), str(random.randrange(9))]) for row in ROWS]
        sequences = as_sequences(tokenizer, prompts, [f" {answer}" for answer in answers])
        logprobs = actor.logprobs(sequences).logprobs  # (B, A)
        actor.backward(supervised_loss(logprobs, sequences.answer_mask, len(sequences)), last=True)
        actor.step()
    export(actor.model, tokenizer, folder, zero3=False)


def main() -> dict[str, dict[str, float]]:
    """Trains, and returns what the evaluations before and after it measured."""
    quiet_libraries()
    random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        model, data = Path(name) / "model", Path(name) / "data"
        texts = [f"{as_dialogue(row['question'])} {result(row['answer'])}" for row in ROWS]
        save_tiny_model(model, "llama", train_tokenizer(texts, vocab_size=300), size="demo")
        fine_tune(model)
        data.mkdir()
        for split in ("train", "test"):
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

        actor, tokenizer = load_actor(
            model,
            max_new_tokens=4,
            engine=EngineConfig(micro_batch_size=len(ROWS)),
            optimizer=OptimizerConfig(1e-3, total_steps=EPOCHS),
        )
        reference, _ = load_reference(model)
        correctness = reward_function(correct)
        train, held_out = build_loaders(
            DataConfig(
                data_path=[str(data)],
                columns={"prompt": "question"},
                keep=correctness.takes,
                data_split="0,0,1",
                cache_dir=str(Path(name) / "cache"),
            ),
            stage=2,
            tokenizer=tokenizer,
            max_len=64,
            train_batch_size=len(ROWS),
            eval_batch_size=len(ROWS),
            rank=0,
            world_size=1,
        )
        reward = CompositeReward([Part("correct", FunctionReward(correctness, tokenizer))])
        trainer = Trainer(
            actor,
            reference,
            reward,
            ReMax(gamma=1.0),
            TrainerSettings(Cadence(epochs=EPOCHS, evaluate_every=EPOCHS // 4), micro_batch_size=len(ROWS)),
            measure=lambda: evaluate_policy(actor, reference, reward, held_out, tokenizer),
            metrics=MetricsLogger(name, console_every=EPOCHS, console=["reward", "kl", "length", "ended"]),
            pad_id=tokenizer.pad_token_id,
        )
        return trainer.train(train).results


if __name__ == "__main__":
    main()
