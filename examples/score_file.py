"""Scores the answers of a jsonl file with a reward model, and writes the rows again with their scores.

    python examples/score_file.py output/reward my_answers.jsonl scores.jsonl

A row is {"prompt": ..., "answer": ...}, and may hold more; the new one has "score" besides. Texts are scored as the
second stage trains on them: the prompt, the answer, and the end token. Without arguments a tiny reward model with
random weights scores two rows, which shows that everything works and nothing else (5 seconds on one CPU core). For
pairs, rankings and accuracy there is step2_reward_model_finetuning/rw_eval.py.
"""

import json
import sys
import tempfile
from pathlib import Path

from remax import as_sequences, load_reward
from remax.models.loading import quiet_libraries

ROWS = [
    {"prompt": "\n\nHuman: Why does ice float?\n\nAssistant:", "answer": " It is less dense than water."},
    {"prompt": "\n\nHuman: Why does ice float?\n\nAssistant:", "answer": " Because.", "source": "a tired model"},
]
BATCH = 32


def score_file(model: str | Path, source: str | Path, target: str | Path) -> None:
    """Reads the rows of `source` and writes them to `target` with the scores of the reward model in `model`."""
    reward, tokenizer = load_reward(model)
    rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    scores = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        sequences = as_sequences(tokenizer, [row["prompt"] for row in batch], [row["answer"] for row in batch])
        scores += reward.score(sequences).tolist()  # (B,)
    scored = [{**row, "score": score} for row, score in zip(rows, scores, strict=True)]
    Path(target).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored), encoding="utf-8")


def make_reward_model(folder: Path) -> Path:
    """A tiny reward model with random weights and its tokenizer, as the second stage would save them."""
    from transformers import AutoModelForSequenceClassification

    from remax.demo.tiny_models import save_tiny_model, train_tokenizer

    tokenizer = train_tokenizer([row["prompt"] + row["answer"] for row in ROWS], vocab_size=300)
    save_tiny_model(folder, "llama", tokenizer)
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)
    return folder


def main() -> None:
    quiet_libraries()
    if len(sys.argv) == 4:
        return score_file(*sys.argv[1:])
    if len(sys.argv) > 1:
        sys.exit("usage: python examples/score_file.py MODEL ROWS.jsonl SCORES.jsonl")
    with tempfile.TemporaryDirectory() as name:
        rows, scores = Path(name) / "rows.jsonl", Path(name) / "scores.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        score_file(make_reward_model(Path(name) / "reward"), rows, scores)
        print(scores.read_text(), end="")


if __name__ == "__main__":
    main()
