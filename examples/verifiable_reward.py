"""A reward that is checked against reference answers, through the library's own loaders and trainer.

Each row of the data has a prompt ("What is 3 + 4?") and its reference answer ("7"). The trainer reads the prompts; the
reward function is given a prompt and an answer as texts, and looks the reference up by the prompt. It sees the prompt
that the policy read: a bare question would arrive as a Human/Assistant dialogue, so the rows are written as one.

The policy is a tiny Llama that learnt from answers of which about half are right. ReMax then raises the share of right
answers from one half to nearly nine in ten. There are 25 sums, which a model of this size learns by heart: the example
shows the plumbing, not arithmetic.

    python examples/verifiable_reward.py         (15 seconds on one CPU core)

In the third stage the same function is `--reward_fn examples/verifiable_reward.py:correct`.
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

ROWS = [{"prompt": as_dialogue(f"What is {a} + {b}?"), "answer": str(a + b)} for a in range(5) for b in range(5)]
REFERENCE = {row["prompt"]: row["answer"] for row in ROWS}
WARM_UP, EPOCHS = 150, 100


def correct(prompt: str, answer: str) -> float:
    """1 where the answer is the prompt's reference answer, else 0."""
    return float(answer.strip() == REFERENCE[prompt])


def fine_tune(folder: Path) -> None:
    """The model of `folder` learns to answer with a number, which is right in about half of the cases."""
    actor, tokenizer = load_actor(folder, optimizer=OptimizerConfig(3e-3, total_steps=WARM_UP))
    for _ in range(WARM_UP):
        answers = [random.choice([row["answer"], str(random.randrange(9))]) for row in ROWS]
        sequences = as_sequences(tokenizer, list(REFERENCE), [f" {answer}" for answer in answers])
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
        texts = [f"{prompt} {answer}" for prompt, answer in REFERENCE.items()]
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
        train, held_out = build_loaders(
            DataConfig(data_path=[str(data)], data_split="0,0,1", cache_dir=str(Path(name) / "cache")),
            stage=2,
            tokenizer=tokenizer,
            max_len=64,
            train_batch_size=len(ROWS),
            eval_batch_size=len(ROWS),
            rank=0,
            world_size=1,
        )
        reward = CompositeReward([Part("correct", FunctionReward(reward_function(correct), tokenizer))])
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
