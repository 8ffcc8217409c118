"""Tokenizer, models from config and training data for a run on real preference pairs.

From a folder with train.jsonl.gz and test.jsonl.gz (columns prompt, chosen, rejected; prompts end with "Assistant:") it
writes into --output_dir:

    tokenizer/       byte-level BPE, trained on the distinct texts of the training rows
    models/policy    a Llama with random weights, for steps 1 and 2
    models/referee   the same with another seed, for the second reward model
    data/            train.jsonl.gz, test.jsonl.gz as the stages read them
    referee_data/    the same, but to train on the pairs of step 1's prompts alone, for the second reward model
    questions.json   the held-out prompts of at most --max_prompt_seq_len tokens, each four times, as AlpacaEval's rows
    prepared.json    what was done: counts, and how often the longer answer wins

In most preference data the longer answer wins, and then a reward model can learn to count. Unless --keep_lengths is
given, training pairs are left out until, among pairs whose lengths differ alike, the longer answer wins as often as
not. A length is what the stages see of it: tokens, after the cut at --max_seq_len. Test rows are never left out.
"""

import argparse
import gzip
import json
import random
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from remax.demo.tiny_models import tiny_config, train_tokenizer
from utils.data.splits import prompt_key, stage_indices
from utils.run import UserError, run_main

COLUMNS = ("prompt", "chosen", "rejected")
ASKED = 4  # times each question
BIN = 8  # tokens: pairs whose length differences fall into one bin count as alike


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl.gz file; UserError when it is missing or lacks a column."""
    if not path.is_file():
        raise UserError(
            f"--data: no file {path}; expected a folder with train.jsonl.gz and test.jsonl.gz, rows {{prompt, chosen, "
            "rejected}"
        )
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if missing := [name for name in COLUMNS if not rows or name not in rows[0]]:
        raise UserError(
            f"--data: {path}, row 1 has no {', '.join(missing)}; expected rows {{prompt, chosen, rejected}}"
        )
    return rows


def rows_of_step_1(rows: list[dict], data_split: str) -> list[dict]:
    """The rows of the prompts that step 1 reads under --data_split, without those that repeat an earlier row."""
    distinct = list({tuple(row[name] for name in COLUMNS): row for row in rows}.values())
    keys = [prompt_key(row["prompt"], row["chosen"]) for row in distinct]
    return [distinct[i] for i in stage_indices(keys, data_split, 0)]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def length_differences(rows: list[dict], tokenizer, max_seq_len: int) -> list[int]:
    """Tokens by which the chosen answer is longer than the rejected one.

    Both have their end token and are cut where prompt and answer fill max_seq_len.
    """

    def lengths(name: str) -> list[int]:
        return [len(ids) for ids in tokenizer([row[name] for row in rows], add_special_tokens=False)["input_ids"]]

    room = [max(max_seq_len - prompt, 0) for prompt in lengths("prompt")]
    chosen, rejected = (
        [min(length + 1, most) for length, most in zip(lengths(name), room, strict=True)]
        for name in ("chosen", "rejected")
    )
    return [a - b for a, b in zip(chosen, rejected, strict=True)]


def balance_lengths(rows: list[dict], differences: list[int], seed: int) -> list[dict]:
    """Rows among which, in each bin of |difference|, as many have the longer answer chosen as the shorter one.

    Ties stay. The order is kept.
    """
    bins: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    kept = [i for i, difference in enumerate(differences) if difference == 0]
    for i, difference in enumerate(differences):
        if difference:
            bins[abs(difference) // BIN][difference > 0].append(i)
    rng = random.Random(seed)
    for _, (shorter, longer) in sorted(bins.items()):
        count = min(len(shorter), len(longer))
        kept += rng.sample(shorter, count) + rng.sample(longer, count)
    return [rows[i] for i in sorted(kept)]


def longer_wins(differences: list[int]) -> float:
    """Accuracy of "the longer answer is the better one"; a tie counts half."""
    return sum(0.5 + 0.5 * ((d > 0) - (d < 0)) for d in differences) / len(differences)


def questions(rows: list[dict], tokenizer, max_prompt_len: int) -> list[dict[str, str]]:
    """The distinct prompts of at most so many tokens, ASKED times each: so many answers are sampled to each."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    short = [prompt for prompt, found in zip(prompts, ids, strict=True) if len(found) <= max_prompt_len]
    return [{"instruction": prompt} for prompt in short for _ in range(ASKED)]


def save_model(folder: Path, tokenizer, hidden_size: int, layers: int, heads: int, positions: int, seed: int) -> int:
    """A Llama with random weights as a Hugging Face folder; its number of parameters."""
    config = tiny_config(
        "llama",
        len(tokenizer),
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        max_positions=positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokenizer, models and data of the run on real preference pairs.")
    parser.add_argument("--data", required=True, help="folder with train.jsonl.gz and test.jsonl.gz")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--hidden_size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--max_seq_len", type=int, default=160, help="tokens of prompt and answer that steps 1, 2 read")
    parser.add_argument("--max_prompt_seq_len", type=int, default=64, help="longest prompt that policies are asked")
    parser.add_argument("--data_split", default="4,4,2", help="of the stages; the referee reads what step 1 reads")
    parser.add_argument("--keep_lengths", action="store_true", help="leave the lengths of the pairs as they are")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    output = Path(args.output_dir)
    train, test = (read_rows(Path(args.data) / f"{name}.jsonl.gz") for name in ("train", "test"))
    tokenizer = train_tokenizer(sorted({row[name] for row in train for name in COLUMNS}), args.vocab_size)
    tokenizer.save_pretrained(output / "tokenizer")
    for name, seed in (("policy", args.seed), ("referee", args.seed + 1)):
        parameters = save_model(
            output / "models" / name, tokenizer, args.hidden_size, args.layers, args.heads, 2 * args.max_seq_len, seed
        )

    differences = length_differences(train, tokenizer, args.max_seq_len)
    kept = train if args.keep_lengths else balance_lengths(train, differences, args.seed)
    write_rows(output / "data" / "train.jsonl.gz", kept)
    write_rows(output / "referee_data" / "train.jsonl.gz", rows_of_step_1(kept, args.data_split))
    for folder in ("data", "referee_data"):
        write_rows(output / folder / "test.jsonl.gz", test)
    asked = questions(test, tokenizer, args.max_prompt_seq_len)
    (output / "questions.json").write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
    facts = {
        "parameters": parameters,
        "rows": len(train),
        "rows_kept": len(kept),
        "test_rows": len(test),
        "prompts": len({row["prompt"] for row in train}),
        "test_prompts": len({row["prompt"] for row in test}),
        "questions": len(asked),
        "longer_wins": longer_wins(differences),
        "longer_wins_kept": longer_wins(length_differences(kept, tokenizer, args.max_seq_len)),
        "longer_wins_test": longer_wins(length_differences(test, tokenizer, args.max_seq_len)),
        "longer_wins_test_uncut": longer_wins(length_differences(test, tokenizer, 10**9)),
        "max_seq_len": args.max_seq_len,
        "keep_lengths": args.keep_lengths,
    }
    (output / "prepared.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    run_main(main)
