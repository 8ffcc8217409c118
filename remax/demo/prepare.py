"""Makes what the demo reads: corpus, tokenizer and tiny models."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from remax.demo.corpus import make_corpus
from remax.demo.tiny_models import save_tiny_model, train_tokenizer
from utils.run import UserError, run_main


def make_demo(output_dir: str | Path, seed: int = 0, train_rows: int = 8000, test_rows: int = 400) -> Path:
    """Corpus, tokenizer and both models under `output_dir`; returns it."""
    output_dir = Path(output_dir)
    make_corpus(output_dir / "data", seed, train_rows, test_rows)
    with open(output_dir / "data" / "train.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = train_tokenizer(row["prompt"] + row[answer] for row in rows for answer in ("chosen", "rejected"))
    tokenizer.save_pretrained(output_dir / "tokenizer")
    save_tiny_model(output_dir / "models" / "actor", "llama", tokenizer, "demo", seed)
    save_tiny_model(output_dir / "models" / "reward", "llama", tokenizer, "demo", seed + 1)
    return output_dir


def main() -> None:
    """Makes what the flags ask for and says where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m remax.demo.prepare", description="Writes the built-in corpus, its tokenizer and small models."
    )
    parser.add_argument("--output_dir", default="output/demo", help="folder to write to (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus and the weights (default: %(default)s)")
    parser.add_argument("--train_rows", type=int, default=8000, help="preference pairs (default: %(default)s)")
    parser.add_argument("--test_rows", type=int, default=400, help="held-out preference pairs (default: %(default)s)")
    args = parser.parse_args()
    for flag, rows in (("train_rows", args.train_rows), ("test_rows", args.test_rows)):
        if rows < 1:
            raise UserError(f"--{flag}: {rows} rows, expected at least 1")
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output_dir {args.output_dir}: cannot be made ({error.strerror}); name another folder"
        ) from error
    import torch

    if not torch.cuda.is_available():  # DeepSpeed, which transformers imports, would warn of it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging

    logging.disable_progress_bar()  # four bars of a millisecond each
    folder = make_demo(args.output_dir, args.seed, args.train_rows, args.test_rows)
    print(f"{args.train_rows} + {args.test_rows} preference pairs, a tokenizer and two models in {folder}")


if __name__ == "__main__":
    run_main(main)
