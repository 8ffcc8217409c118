"""Throughput of training steps on real rows: padded to the longest row allowed, padded to the batch's longest, packed.

    python benchmarks/packing.py --data_path my_pairs.jsonl

A small Llama takes whole steps (forward, backward, AdamW) of supervised fine-tuning and of reward modelling. All three
ways take the same rows, one right after the other in one process and in turns first, second and third, so that whatever
else the machine does hits them alike. The tokenizer is trained on the data.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from remax.core.losses import ranking_loss, supervised_loss
from remax.core.sequences import Sequences
from remax.demo.tiny_models import tiny_config, train_tokenizer
from remax.models.packing import token_slots
from remax.models.policy import PolicyModel
from remax.models.reward_model import RewardModel
from utils.data.batches import PairBatch, SupervisedBatch
from utils.data.config import DataConfig
from utils.data.loaders import build_loaders
from utils.data.preferences import load_data_set

WAYS = ("padded to --max_seq_len", "padded to the longest row", "packed")


def supervised(model: PolicyModel, sequences: Sequences) -> Tensor:
    mask = sequences.answer_mask
    return supervised_loss(model(sequences)[0], mask, int(mask.sum()))


def ranking(model: RewardModel, sequences: Sequences) -> Tensor:
    chosen, rejected = model(sequences).chunk(2)
    return ranking_loss(chosen, rejected, len(chosen))


# name: stage of the data, rows of a batch, model, loss
STEPS: dict[str, tuple[int, Callable, type, type, Callable]] = {
    "supervised": (0, Sequences.from_batch, AutoModelForCausalLM, PolicyModel, supervised),
    "reward": (1, Sequences.from_pairs, AutoModelForSequenceClassification, RewardModel, ranking),
}


def widen(sequences: Sequences, width: int) -> Sequences:
    ids = pad(sequences.input_ids, (0, width - sequences.input_ids.shape[1]))
    return Sequences(ids, sequences.prompt_lengths, sequences.answer_lengths)


def training_steps(batches: list[Sequences], config, auto_class, wrapper, loss_of, max_len: int, runs: int) -> list:
    """Times of every run and way: [{way: seconds over all batches}, ...], and token slots by way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = {}
    for packing in (False, True):
        torch.manual_seed(0)
        model = wrapper(auto_class.from_config(copy.deepcopy(config)), packing=packing).to(device).train()
        trained[packing] = model, torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(way: str, sequences: Sequences) -> tuple[float, int]:
        model, optimizer = trained[way == "packed"]
        if way == WAYS[0]:
            sequences = widen(sequences, max_len)
        sequences = sequences.to(device)
        begin = time.perf_counter()
        loss_of(model, sequences).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin, token_slots(sequences, model.packing)

    for way in WAYS:
        step(way, batches[0])  # what a first call prepares is not counted
    results = []
    for run in range(runs):
        seconds, slots = dict.fromkeys(WAYS, 0.0), dict.fromkeys(WAYS, 0)
        for i, sequences in enumerate(batches):
            turn = (run + i) % len(WAYS)
            for way in WAYS[turn:] + WAYS[:turn]:
                took, computed = step(way, sequences)
                seconds[way] += took
                slots[way] += computed
        results.append((seconds, slots))
    return results


def report(name: str, results: list, tokens: int) -> None:
    def median(of: Callable[[dict], float]) -> str:
        values = [of(seconds) for seconds, _ in results]
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    print(f"\n{name}: {tokens} tokens a run, {len(results)} runs")
    print("| way | tokens/s | padding share | times the first | times the second |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for way in WAYS:
        rate = statistics.median(tokens / seconds[way] for seconds, _ in results)
        share = 1 - tokens / results[0][1][way]
        first, second = (median(lambda seconds, way=way, to=to: seconds[to] / seconds[way]) for to in WAYS[:2])
        print(f"| {way} | {rate:.0f} | {share:.3f} | {first} | {second} |", flush=True)


def make_tokenizer(data_path: list[str], vocabulary: int, cache: str, rows: int = 2000) -> PreTrainedTokenizerBase:
    """Trained on the first rows of each data set."""
    sets = [load_data_set(name, cache_dir=cache, announce=False)[0] for name in data_path]
    rows_of = (row for data in sets for row in data.select(range(min(rows, len(data)))))
    return train_tokenizer((row["prompt"] + row["chosen"] for row in rows_of), vocabulary)


def read_batches(
    args: argparse.Namespace, stage: int, tokenizer: PreTrainedTokenizerBase, cache: str
) -> list[SupervisedBatch | PairBatch]:
    rows = args.rows // (1 + stage)  # a pair is two answers
    loader, _ = build_loaders(
        DataConfig(data_path=args.data_path, cache_dir=cache, data_split="1,1,1"),
        stage=stage,
        tokenizer=tokenizer,
        max_len=args.max_seq_len,
        train_batch_size=rows,
        eval_batch_size=rows,
    )
    return list(islice(loader, args.batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data_path", nargs="+", required=True, help="preference data, as for the training scripts")
    parser.add_argument("--max_seq_len", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="answers in a batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=8, help="batches in a run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="runs (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="its layers (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="its attention heads (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="its tokens (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        tokenizer = make_tokenizer(args.data_path, args.vocabulary, cache)
        data = {name: read_batches(args, stage, tokenizer, cache) for name, (stage, *_) in STEPS.items()}
    config = tiny_config(
        "llama",
        len(tokenizer),
        hidden_size=args.hidden,
        layers=args.layers,
        heads=args.heads,
        max_positions=args.max_seq_len,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    for name, (_, rows_of, *parts) in STEPS.items():
        batches = [rows_of(batch) for batch in data[name]]
        results = training_steps(batches, config, *parts, args.max_seq_len, args.runs)
        report(name, results, sum(int(sequences.lengths.sum()) for sequences in batches))


if __name__ == "__main__":
    main()
