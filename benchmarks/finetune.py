"""Tokens per second of steps 1 and 2, padded and packed, and of TRL's trainers on the same work.

    pip install trl==1.16.0
    python benchmarks/finetune.py --output docs/results/finetune.md

The work is supervised learning, a reward model, and DPO, on the same model, rows in the same order, batch size and
settings of AdamW. Prompts have 16 to 112 tokens and answers 16 to 368, evenly, so nothing is cut; what is counted are
the tokens of the rows, without padding. This side is `Finetuning.learn` with what the stage builds from its flags,
and the collation of the batch. The sides take turns in one process, `--rounds` times `--steps` steps after a first
round that does not count; a ratio is the median of the rounds' ratios. Without trl there is no third side.

Both sides: one rank, fp32, no gradient checkpointing, no dropout. Packing in TRL needs flash attention to keep rows
apart, which a CPU has not.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from measuring import NOW, SHAPES, figures_of, machine, ratios, spread, table, write_results
from turns import SHARED, Turns, trl_is_here

WORK = {
    "supervised": "",
    "reward model": "--loss ranking",
    "DPO": "--loss dpo",
}
SIDES = ("padded", "packed", "TRL")
PROMPT, ANSWER, LONGEST = (16, 112), (16, 368), 512
PACKAGES = ("torch", "transformers", "deepspeed", "trl")


def make_rows(shape: str, count: int, shorter: int) -> list[dict[str, list[int]]]:
    """Prompts with two answers each, as token ids; lengths are those above, divided by `shorter`."""
    draw, vocabulary = random.Random(0), min(SHAPES[shape][-1], 20_000)

    def text(lengths: tuple[int, int]) -> list[int]:
        least, most = (max(length // shorter, 1) for length in lengths)
        return [draw.randrange(4, vocabulary) for _ in range(draw.randint(least, most))]

    return [{"prompt": text(PROMPT), "chosen": text(ANSWER), "rejected": text(ANSWER)} for _ in range(count)]


def tokens_of(work: str, rows: list[dict[str, list[int]]]) -> int:
    """Tokens that are read in a batch, end tokens among them."""
    answers = ["chosen"] if work == "supervised" else ["chosen", "rejected"]
    return sum(len(row["prompt"]) + len(row[name]) + 1 for row in rows for name in answers)


class Ours:
    """The stage's task on its engine, padded or packed."""

    def __init__(self, work: str, side: str, folder: Path, args: argparse.Namespace) -> None:
        from remax.cli.validate import parse_step1, parse_step2
        from remax.models.loading import quiet_libraries
        from remax.models.reward_model import prepare_pad_token
        from remax.stages.finetune import build_task
        from remax.training.finetune import Finetuning
        from utils.distributed import set_seed
        from utils.tokenizer import load_tokenizer

        quiet_libraries()
        line = f"--model_name_or_path {folder / 'policy'} --data_path {folder} --max_seq_len {LONGEST} --dtype fp32"
        line += f" --output_dir {tempfile.mkdtemp(dir=folder)} --per_device_train_batch_size {args.rows}"
        line += f" --learning_rate {SHARED['learning_rate']} --disable_dropout {WORK[work]} {args.more}"
        line += " --packing" * (side == "packed")
        flags = (parse_step1 if work == "supervised" else parse_step2)(line.split())
        set_seed(flags.seed)
        tokenizer = load_tokenizer(flags.model_name_or_path)
        prepare_pad_token(tokenizer)
        self.work, self.pad_id, self.steps = work, tokenizer.pad_token_id, 0
        self.learner = Finetuning(build_task(flags, tokenizer, [], 1000))

    def step(self, rows: list[dict[str, list[int]]]) -> float:
        """One step; its loss."""
        from utils.data.collate import collate_ranking, collate_supervised

        whole = [{name: [*row["prompt"], *row[name], 0] for name in ("chosen", "rejected")} for row in rows]
        if self.work == "supervised":
            batch = [{"input_ids": ids["chosen"]} for ids in whole]
        else:
            batch = [{"chosen_ids": ids["chosen"], "rejected_ids": ids["rejected"]} for ids in whole]
        batch = [ids | {"prompt_length": len(row["prompt"]), "weight": 1} for ids, row in zip(batch, rows, strict=True)]
        collate = collate_supervised if self.work == "supervised" else collate_ranking
        self.steps += 1
        return self.learner.learn(self.steps, [collate(batch, self.pad_id)])["loss"]


class Theirs:
    """TRL's trainer for the work."""

    def __init__(self, work: str, folder: Path, args: argparse.Namespace, rows: list[dict[str, list[int]]]) -> None:
        import trl
        from datasets import Dataset
        from torch.utils.data import SequentialSampler
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
        name = {"supervised": "SFT", "reward model": "Reward", "DPO": "DPO"}[work]
        config = getattr(trl, f"{name}Config")(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=args.rows,
            max_steps=len(rows) // args.rows,
            max_length=LONGEST,
            **SHARED,
        )
        texts = {name: [tokenizer.decode(row[name]) for row in rows] for name in rows[0]}
        if work == "supervised":
            texts = {"prompt": texts["prompt"], "completion": texts["chosen"]}
        if work == "reward model":
            model = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder / "policy")
        data = Dataset.from_dict(texts)
        trainer = getattr(trl, f"{name}Trainer")(model, args=config, train_dataset=data, processing_class=tokenizer)
        trainer._get_train_sampler = lambda *ignored: SequentialSampler(
            trainer.train_dataset
        )  # the order of both sides
        self.turns = Turns(trainer)

    def step(self, rows: list[dict[str, list[int]]]) -> float:
        """The next step; its loss."""
        self.turns.step()
        return [record["loss"] for record in self.turns.trainer.state.log_history if "loss" in record][-1]


def one(work: str, args: argparse.Namespace, folder: Path) -> dict:
    """Rounds of all sides in this process: tokens a second."""
    from utils.distributed import init_distributed

    size = args.rows * args.steps
    rows = make_rows(args.shape, size * (args.rounds + 1), args.shorter)
    sides: dict = {}
    if trl_is_here():  # it comes first: it would take part in the process group
        sides["TRL"] = Theirs(work, folder, args, rows)
    init_distributed()
    for side in SIDES[:2]:
        sides[side] = Ours(work, side, folder, args)
    found: dict = {"rates": {side: [] for side in sides}, "losses": {side: [] for side in sides}}
    for i in range(args.rounds + 1):
        of_round = rows[i * size : (i + 1) * size]
        batches = [of_round[j : j + args.rows] for j in range(0, size, args.rows)]
        for side in sides if i % 2 else reversed(sides):
            begin = NOW[args.seconds]()
            losses = [sides[side].step(batch) for batch in batches]
            rate = sum(tokens_of(work, batch) for batch in batches) / (NOW[args.seconds]() - begin)
            if i:
                found["rates"][side].append(rate)
            found["losses"][side] += losses
    return found


def report(results: dict[str, dict], versions: str, args: argparse.Namespace) -> str:
    """The table of all work."""

    def rows() -> Iterator[Sequence[str]]:
        for work, found in results.items():
            rates = found["rates"]
            for side in SIDES:
                if side in rates:
                    beside = side != "TRL" and "TRL" in rates
                    ratio = spread(ratios(rates[side], rates["TRL"]), 2) if beside else ""
                    packed = spread(ratios(rates["packed"], rates["padded"]), 2) if side == "packed" else ""
                    yield [work, side, spread(rates[side], 0), ratio, packed]

    unit = "rows" if set(results) == {"supervised"} else "rows or pairs"
    lines = [
        f"{versions}. {args.family} of {args.shape}, {args.rows} {unit} a step; medians [least, greatest] of "
        f"{args.rounds} rounds of {args.steps} step{'s' * (args.steps > 1)}.",
        "",
    ]
    head = ("work", "side", "tokens/s", "times TRL's", "times padded")
    return "\n".join(lines + table(head, rows())).rstrip()


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--shape", choices=SHAPES, default="10m")
    flags.add_argument("--family", choices=("llama", "opt"), default="llama")
    flags.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    flags.add_argument("--rows", type=int, default=8, help="or pairs, of a step")
    flags.add_argument("--steps", type=int, default=2, help="of a round")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--shorter", type=int, default=1, help="divides all lengths")
    flags.add_argument("--more", default="", help="further flags of steps 1 and 2")
    flags.add_argument(
        "--seconds", choices=NOW, default="wall", help="of the clock, or on a core: where others work too"
    )
    flags.add_argument("--output", help="a Markdown file for the table; all figures go into a .json beside it")
    flags.add_argument("--one", choices=WORK, help=argparse.SUPPRESS)
    flags.add_argument("--folder", help=argparse.SUPPRESS)
    return flags


def main() -> None:
    args = parser().parse_args()
    if args.one:
        print("FIGURES" + json.dumps(one(args.one, args, Path(args.folder))), flush=True)
        return
    from rlhf_ways.models import make_models

    versions, results = machine(*PACKAGES), {}
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), args.family, args.shape, "fp32", longest=LONGEST, positions=LONGEST)
        for work in args.work:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", work, "--folder", folder]
            results[work] = figures_of(work, command)
            print(report({work: results[work]}, versions, args), flush=True)
    if args.output:
        figures = {"machine": versions, "work": results}
        write_results(args.output, "Steps 1 and 2 beside TRL", "finetune", report(results, versions, args), figures)


if __name__ == "__main__":
    main()
