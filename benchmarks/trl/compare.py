"""Rows per second of this pipeline and of TRL on the same work: same model, rows, batch size, lengths and optimizer.

    pip install trl==1.16.0
    python benchmarks/trl/compare.py --data_path pairs.jsonl.gz --output_dir output/trl

Each measurement is a process of its own: on this side the stage's shipped `main.py`, with the flags a user would give;
on the other TRL's trainer for that stage (`trl_side.py`). They take turns, --rounds times. A step's seconds are those
between the ends of two optimizer steps, so that start-up, tokenization and evaluation do not count. Printed, and
written to results.json: the median over the rounds of rows per second on either side, and the ratio.

Both sides: one rank, float32 on a CPU, AdamW, no gradient checkpointing, no dropout.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from remax.demo.tiny_models import tiny_config, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
MAIN = {
    "sft": "step1_supervised_finetuning",
    "reward": "step2_reward_model_finetuning",
    "dpo": "step2_reward_model_finetuning",
    "rl": "step3_rlhf_finetuning",
}
WARM_UP = 2  # steps that do not count
SAMPLES = 4  # answers per prompt of RLOO


def sides(stage: str) -> dict[str, list[str] | None]:
    """{name: this pipeline's further flags, or None for TRL}."""
    if stage == "rl":
        return {"RLOO": ["--algo", "rloo"], "ReMax": ["--algo", "remax"], "TRL": None}
    return {"padded": [], "packed": ["--packing"], "TRL": None}


def longest(row: dict, tokenizer) -> int:
    """Tokens of the prompt with its longer answer, end token included."""
    return max(len(tokenizer(row["prompt"] + row[name])["input_ids"]) for name in ("chosen", "rejected")) + 1


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Rows, tokenizer, policy and reward model with random weights."""
    with gzip.open(args.data_path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, args.rows)]
    texts = sorted({row[name] for row in rows for name in ("prompt", "chosen", "rejected")})
    tokenizer = train_tokenizer(texts, args.vocab_size)
    # Rows that need no cut: what is too long, TRL drops in one trainer and cuts in another.
    rows = [row for row in rows if longest(row, tokenizer) <= args.max_seq_len]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:-8]), ("test", rows[-8:])):
        lines = (json.dumps({k: row[k] for k in ("prompt", "chosen", "rejected")}) + "\n" for row in part)
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"hidden_size": args.hidden_size, "layers": args.layers, "heads": args.heads, "max_positions": 1024}
    config = tiny_config("llama", len(tokenizer), **sizes, **ids, tie_word_embeddings=True)
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config)
    config.num_labels = 1
    for name, model in (("policy", policy), ("reward", AutoModelForSequenceClassification.from_config(config))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    print(f"{policy.num_parameters():,} parameters, {len(rows)} rows")


def flags_of(stage: str, args: argparse.Namespace, folder: Path) -> list[str]:
    """This pipeline's flags for the work."""
    shared = {
        "--data_path": folder / "data",
        "--max_steps": args.steps,
        "--max_eval_batches": 1,
        "--logging_steps": 1000,
    }
    shared |= {"--data_output_path": folder / "cache", "--lr_scheduler_type": "constant"}
    if stage == "rl":
        own = {
            "--actor_model_name_or_path": folder / "policy",
            "--reward_model_name_or_path": folder / "reward",
            "--data_split": "0,0,10",
            "--actor_learning_rate": 1e-5,
            "--num_warmup_steps": 0,
            "--actor_dtype": "fp32",
            "--reward_dtype": "fp32",
            "--max_prompt_seq_len": args.max_prompt_len,
            "--max_answer_seq_len": args.max_answer_len,
            "--per_device_eval_batch_size": 2,
            "--kl_ctl": 0.05,
        }
        switches = ["--skip_doctor", "--disable_actor_dropout"]
    else:
        own = {
            "--model_name_or_path": folder / "policy",
            "--data_split": "10,0,0" if stage == "sft" else "0,10,0",
            "--learning_rate": 1e-5,
            "--dtype": "fp32",
            "--max_seq_len": args.max_seq_len,
            "--per_device_train_batch_size": args.batch_size,
        }
        switches = ["--disable_dropout"] + (["--loss", "dpo"] if stage == "dpo" else [])
    return [str(word) for pair in (shared | own).items() for word in pair] + switches


def command_of(stage: str, side: str, args: argparse.Namespace, folder: Path, output: Path) -> list[str]:
    """The program of one measurement."""
    extra = sides(stage)[side]
    if extra is None:
        settings = {name: value for name, value in vars(args).items() if name != "data_path"}
        settings |= {"stage": stage, "folder": str(folder), "samples": SAMPLES, "output": str(output)}
        return [args.trl_python, str(Path(__file__).with_name("trl_side.py")), json.dumps(settings)]
    command = [sys.executable, str(ROOT / MAIN[stage] / "main.py")]
    command += ["--output_dir", str(output), "--overwrite_output_dir"]
    command += flags_of(stage, args, folder) + extra
    if stage == "rl":
        # As many generated answers a step: RLOO's are all sampled, of ReMax's every second one is greedy.
        prompts, samples = (args.prompts * SAMPLES // 2, 1) if side == "ReMax" else (args.prompts, SAMPLES)
        command += ["--per_device_generation_batch_size", str(prompts), "--samples_per_prompt", str(samples)]
        command += ["--per_device_training_batch_size", str(prompts * samples)]
    return command


def step_times(output: Path) -> list[float]:
    """The moments, in seconds, at which the optimizer steps of either side ended."""
    if (output / "times.json").is_file():
        return json.loads((output / "times.json").read_text())
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record["time"] for record in records if any(name.startswith("train/") for name in record)]


def rate(times: list[float], rows: int) -> float:
    """Rows a second, `rows` to a step, after the warm-up."""
    counted = times[WARM_UP - 1 :]
    return rows * (len(counted) - 1) / (counted[-1] - counted[0])


def measure(stage: str, side: str, args: argparse.Namespace, folder: Path) -> float:
    """Rows (sft), pairs (reward, dpo) or generated answers (rl) a second."""
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    output = folder / "runs" / f"{stage}_{side}"
    shutil.rmtree(output, ignore_errors=True)
    command = command_of(stage, side, args, folder, output)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{stage}, {side}: status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return rate(step_times(output), args.prompts * SAMPLES if stage == "rl" else args.batch_size)


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    flags.add_argument("--data_path", required=True, help=".jsonl.gz with prompt, chosen, rejected")
    flags.add_argument("--output_dir", default="output/trl")
    flags.add_argument("--trl_python", default=sys.executable, help="the Python that has trl installed")
    flags.add_argument("--stages", nargs="+", default=list(MAIN), choices=list(MAIN))
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument(
        "--steps", type=int, default=14, help="optimizer steps of a measurement; the first two do not count"
    )
    flags.add_argument("--rows", type=int, default=2000)
    flags.add_argument("--batch_size", type=int, default=16)
    flags.add_argument("--prompts", type=int, default=8, help="prompts a step of RLOO, four answers each")
    flags.add_argument("--max_seq_len", type=int, default=512)
    flags.add_argument("--max_prompt_len", type=int, default=64)
    flags.add_argument("--max_answer_len", type=int, default=64)
    flags.add_argument("--vocab_size", type=int, default=4096)
    flags.add_argument("--hidden_size", type=int, default=256)
    flags.add_argument("--layers", type=int, default=6)
    flags.add_argument("--heads", type=int, default=4)
    flags.add_argument("--threads", type=int, default=2)
    return flags


def main() -> None:
    args = parser().parse_args()
    folder = Path(args.output_dir).resolve()
    args.output_dir = str(folder)
    prepare(args, folder)

    rates: dict[str, dict[str, list[float]]] = {stage: {side: [] for side in sides(stage)} for stage in args.stages}
    for round_ in range(args.rounds):
        for stage in args.stages:
            for side in sides(stage):
                rates[stage][side].append(measure(stage, side, args, folder))
                print(f"round {round_ + 1}  {stage:<6}  {side:<6}  {rates[stage][side][-1]:.2f} a second", flush=True)
    table = {}
    for stage, found in rates.items():
        medians = {side: statistics.median(values) for side, values in found.items()}
        ratios = {
            side: statistics.median(a / b for a, b in zip(values, found["TRL"], strict=True))
            for side, values in found.items()
            if side != "TRL"
        }
        table[stage] = {"a second": medians, "times TRL": ratios, "rounds": found}
        shown = ", ".join(f"{side} {value:.1f}" for side, value in medians.items())
        print(f"{stage:<6}  {shown} a second; " + ", ".join(f"{side} {r:.2f} x TRL" for side, r in ratios.items()))
    (folder / "results.json").write_text(json.dumps({"settings": vars(args), "results": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
