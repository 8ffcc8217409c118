"""Seconds and peak memory of a step of ReMax, RLOO and PPO, by the shipped step 3 at a model's true shape.

    python benchmarks/step_cost.py --shape 1.1b --output docs/results/step_cost.md

Actor, reference, reward model and PPO's critic all have the shape; their weights are random, so that answers hardly
ever end and every way generates the same number of tokens. Each way is a process of its own, whose peak memory is
therefore its own: on a GPU what torch allocated, on a CPU the resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAIN = ROOT / "step3_rlhf_finetuning/main.py"
# hidden size, feed-forward, layers, heads, key heads, vocabulary: TinyLlama, Llama 3.2 3B, Llama 2 7B; small for CPUs
SHAPES = {
    "10m": (256, 1024, 6, 8, 8, 8192),
    "134m": (768, 2048, 12, 12, 12, 32000),
    "1.1b": (2048, 5632, 22, 32, 4, 32000),
    "3.2b": (3072, 8192, 28, 24, 8, 128256),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}
WAYS = {
    "remax": ["--algo", "remax"],
    "rloo": ["--algo", "rloo", "--samples_per_prompt", "2"],
    "ppo": ["--algo", "ppo"],
}
PARTS = ("seconds_generation", "seconds_scoring", "seconds_update", "seconds_per_step")


def make_models(folder: Path, shape: str, dtype: str) -> None:
    """A policy and a reward model of the shape, with the tokenizer of the built-in corpus, and its data."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    from remax.demo.corpus import make_corpus, make_rows
    from remax.demo.tiny_models import train_tokenizer

    rows, _ = make_rows(seed=0, train_rows=200, test_rows=1)
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in rows])
    hidden, wide, layers, heads, key_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    place = "cuda" if torch.cuda.is_available() else "cpu"
    for name, kind in (("policy", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        config.num_labels = 1
        with torch.device(place):
            model = kind.from_config(config, dtype=getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[dtype]))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    make_corpus(folder / "data", seed=0, train_rows=2000, test_rows=64)


def one(args: argparse.Namespace) -> None:
    """A few steps of one way in this process; its figures on the last line."""
    import torch

    folder, output = Path(args.folder), Path(args.folder) / args.one
    sys.argv = [str(MAIN), "--data_path", str(folder / "data"), "--data_split", "0,0,1", "--output_dir", str(output)]
    sys.argv += ["--actor_model_name_or_path", str(folder / "policy"), "--reward_model_name_or_path"]
    sys.argv += [str(folder / "reward"), "--actor_dtype", args.dtype, "--reward_dtype", args.dtype]
    rows = args.prompts // (2 if args.one == "rloo" else 1)  # as many answers are generated in every way
    sys.argv += ["--per_device_generation_batch_size", str(rows), "--max_prompt_seq_len", "64"]
    sys.argv += ["--per_device_training_batch_size", str(args.micro_batch), "--max_answer_seq_len", str(args.tokens)]
    sys.argv += ["--actor_zero_stage", "2", "--max_steps", str(args.steps), "--max_eval_batches", "1"]
    sys.argv += ["--per_device_eval_batch_size", "8", "--skip_doctor", "true", "--gamma", "1", "--logging_steps", "1"]
    sys.argv += ["--target_kl", "0", *WAYS[args.one], *args.more.split()]
    runpy.run_path(str(MAIN), run_name="stage")["main"]()
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "train/seconds_per_step" in r][2:]  # the first ones warm up
    figures: dict[str, object] = {part: [r[f"train/{part}"] for r in steps] for part in PARTS}
    figures["tokens"] = statistics.mean(r["train/length"] for r in steps)
    if torch.cuda.is_available():
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    else:
        figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("FIGURES" + json.dumps(figures), flush=True)


def spread(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.3f} [{min(numbers):.3f}, {max(numbers):.3f}]"


def report(args: argparse.Namespace, figures: dict[str, dict]) -> str:
    import deepspeed
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor()}, CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, deepspeed {deepspeed.__version__}"
    lines = [
        f"{device}; {versions}; Llama of {args.shape}, {args.dtype}, ZeRO 2, {args.prompts} prompts, answers of"
        f" {args.tokens} tokens, micro-batches of {args.micro_batch}; median [range] of {args.steps - 2} steps.",
        "",
        "| way | generation s | scoring s | update s | step s | peak GiB | step / ReMax | peak / ReMax |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = figures.get("remax")
    for way, found in figures.items():
        parts = [spread(found[part]) for part in PARTS]
        peak, ratios = f"{found['peak_gib']:.1f}", ["", ""]
        if base is not None:
            step = statistics.median(found[PARTS[-1]]) / statistics.median(base[PARTS[-1]])
            ratios = [f"{step:.2f}", f"{found['peak_gib'] / base['peak_gib']:.2f}"]
        lines.append(f"| {' | '.join([way, *parts, peak, *ratios])} |")
    return "\n".join(lines)


def measured_apart(program: str, ways: Iterable[str], folder: Path) -> Iterator[tuple[str, dict]]:
    """(way, its figures): `program` again in a process for each, with --one WAY and --folder beside its own flags."""
    modules = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    for way in ways:
        command = [sys.executable, program, *sys.argv[1:], "--one", way, "--folder", str(folder)]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": modules}, stdout=subprocess.PIPE, text=True)
        last = next((line for line in done.stdout.splitlines() if line.startswith("FIGURES")), None)
        if last is None:
            sys.exit(f"{way} ended with status {done.returncode}\n{done.stdout[-3000:]}")
        yield way, json.loads(last.removeprefix("FIGURES"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="10m")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--prompts", type=int, default=32, help="answers of a step; RLOO takes half as many prompts")
    parser.add_argument("--micro_batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of every answer")
    parser.add_argument("--steps", type=int, default=8, help="of which the first two are not counted")
    parser.add_argument("--more", default="", help="further flags of step 3, for every way")
    parser.add_argument("--output", help="a Markdown file for the table")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), args.shape, args.dtype)
        figures = dict(measured_apart(__file__, args.ways, Path(folder)))
    table = report(args, figures)
    print(table)
    if args.output:
        command = f"python benchmarks/step_cost.py {' '.join(sys.argv[1:])}"
        Path(args.output).write_text(f"# What a step costs\n\n    {command}\n\n{table}\n")


if __name__ == "__main__":
    main()
