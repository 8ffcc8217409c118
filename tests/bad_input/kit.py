"""What the tables of bad input are made of: a case, and the files that it lays out in its folder."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Content of a file: as it stands, a list of rows of JSON lines, another object as JSON, or what writes it.
Maker = Callable[[Path, Mapping[str, str]], None]
Content = str | bytes | list | dict | Maker
DATA = "--max_steps 1 --max_seq_len 64 --per_device_train_batch_size 2 --per_device_eval_batch_size 2"
SOUND = {  # flags with which each program does its work
    "sft": f"--model_name_or_path $POLICY --data_path pairs.jsonl --output_dir out {DATA}",
    "reward": f"--model_name_or_path $POLICY --data_path pairs.jsonl --output_dir out {DATA}",
    "remax": "--actor_model_name_or_path $POLICY --reward_model_name_or_path $SCORER --data_path pairs.jsonl "
    "--output_dir out --max_steps 1 --max_prompt_seq_len 32 --max_answer_seq_len 4 "
    "--per_device_generation_batch_size 2 --per_device_training_batch_size 2 "
    "--per_device_eval_batch_size 2 --num_warmup_steps 0 --skip_doctor",
    "rw_eval": "--model_name_or_path $SCORER --data_path pairs.jsonl --max_seq_len 64",
    "prompt_eval": "--model_name_or_path_baseline $POLICY --model_name_or_path_finetune $POLICY --max_new_tokens 2 "
    "--num_prompts 1",
    "doctor": "--actor_model_name_or_path $POLICY --reward_model_name_or_path $SCORER --max_prompt_seq_len 32 "
    "--max_answer_seq_len 4 --skip_reload",
    "answers": "--model $POLICY --benchmark pairs.jsonl --output out.json --max_new_tokens 2",
}
PROGRAMS = {
    "sft": "step1_supervised_finetuning/main.py",
    "reward": "step2_reward_model_finetuning/main.py",
    "remax": "step3_rlhf_finetuning/main.py",
    "rw_eval": "step2_reward_model_finetuning/rw_eval.py",
    "prompt_eval": "step1_supervised_finetuning/prompt_eval.py",
    "doctor": "remax/doctor.py",
    "answers": "remax/answers.py",
}


@dataclass(frozen=True)
class Case:
    """One bad input: a program's sound flags with `flags` behind them, run in a folder that holds `files`."""

    name: str
    program: str  # of PROGRAMS
    flags: str  # behind the sound ones; $POLICY, $SCORER and $PAIRS are the sound ones
    line: str  # parts of the one line that must come, in their order, with " ... " between them
    files: Mapping[str, Content] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    alone: bool = False  # without the sound flags
    status: int = 2


def lay_out(files: Mapping[str, Content], folder: Path, sound: Mapping[str, str]) -> None:
    """Writes the files of a case."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path, sound)
        else:
            path.write_bytes(as_bytes(content))


def as_bytes(content: Content) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, list):
        return "".join(json.dumps(row) + "\n" for row in content).encode()
    return (content if isinstance(content, str) else json.dumps(content)).encode()


def pairs(count: int) -> list[dict[str, str]]:
    """So many sound rows."""
    return [
        {"prompt": f"\n\nHuman: What is {i}?\n\nAssistant:", "chosen": f" {i}.", "rejected": " No."}
        for i in range(count)
    ]


def packed(content: Content, cut: int | None = None) -> bytes:
    """Gzipped, and cut after some bytes."""
    return gzip.compress(as_bytes(content), mtime=0)[:cut]


def folder(path: Path, sound: Mapping[str, str]) -> None:
    """An empty folder."""
    path.mkdir(parents=True)


def fifo(path: Path, sound: Mapping[str, str]) -> None:
    """A pipe into which nobody writes."""
    os.mkfifo(path)


def link(target: str) -> Maker:
    return lambda path, sound: path.symlink_to(target)


def copy_of(name: str, cut: int | None = None, patch: bytes = b"") -> Maker:
    """A file of tests/data, cut after some bytes, or with its middle overwritten by `patch`."""

    def write(path: Path, sound: Mapping[str, str]) -> None:
        content = (Path(sound["DATA"]) / name).read_bytes()[:cut]
        middle = len(content) // 2
        path.write_bytes(content[:middle] + patch + content[middle + len(patch) :])

    return write


def table(columns: Mapping[str, Iterable[Any]], types: Mapping[str, Any] | None = None) -> Maker:
    """A parquet or Arrow file."""

    def write(path: Path, sound: Mapping[str, str]) -> None:
        import pyarrow
        import pyarrow.parquet

        made = pyarrow.table({name: pyarrow.array(values, (types or {}).get(name)) for name, values in columns.items()})
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(made, path)
        else:
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, made.schema) as writer:
                writer.write_table(made)

    return write


def model(
    kind: str = "POLICY",
    *,
    without: Iterable[str] = (),
    files: Mapping[str, Content | None] | None = None,
    tensors: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    **changes: Mapping[str, Any],
) -> Maker:
    """A copy of a sound model's folder with faults.

    Args:
        without: files that are left out.
        files: files in the place of the sound ones.
        tensors: makes the tensors of model.safetensors from the sound ones.
        changes: fields of `config` (config.json), `tokenizer_config`, `generation_config`; None takes a field out.
    """

    def write(path: Path, sound: Mapping[str, str]) -> None:
        shutil.copytree(sound[kind], path)
        for name in without:
            (path / name).unlink()
        for name, fields in changes.items():
            file = path / f"{name}.json"
            content = json.loads(file.read_text()) | fields
            file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        if tensors is not None:
            from safetensors.torch import load_file, save_file

            save_file(tensors(load_file(path / "model.safetensors")), path / "model.safetensors", {"format": "pt"})
        lay_out(files or {}, path, sound)

    return write
