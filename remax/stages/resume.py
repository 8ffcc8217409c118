"""Going on with a run that was stopped: from which checkpoint, and whether it is still the same training.

What decides which objective is optimised, on which rows and from which weights must be as it was; a difference is
refused by name. What only decides how (number of ranks, ZeRO stage, logging) may differ, and is listed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from remax.checkpoint.checkpoints import (
    MANIFEST,
    Checkpoints,
    Found,
    Saving,
    all_of,
    folder_of,
    newest,
    open_checkpoint,
)
from remax.cli.flags import FinetuneArguments, MemoryFlags, RetiredInStep3, RunFlags, Step3Arguments, WatchFlags
from remax.models.loading import fingerprint
from remax.rewards.sources import reward_sources
from utils.data.cache import fingerprint_of
from utils.distributed import barrier, gather_objects, is_main, print0, world_size
from utils.run import UserError, git_commit, versions

Arguments = FinetuneArguments | Step3Arguments

# Flags that another start of the same run may give otherwise. Paths may, since what lies there is compared itself.
MAY_DIFFER = {field.name for flags in (RunFlags, MemoryFlags, RetiredInStep3, WatchFlags) for field in fields(flags)}
MAY_DIFFER -= {"seed", "log_variance"}
MAY_DIFFER |= {"config", "data_path", "sft_only_data_path", "data_output_path", "preprocessing_num_workers"}
MAY_DIFFER |= {f"{name}model_name_or_path" for name in ("", "actor_", "reward_", "critic_")}
MAY_DIFFER |= {f"{name}zero_stage" for name in ("", "actor_", "reference_", "reward_", "critic_")}
MAY_DIFFER |= {f"offload_{name}" for name in ("reference_model", "reward_model", "critic")}
MAY_DIFFER |= {f"{name}gradient_checkpointing" for name in ("", "actor_", "critic_")}
MAY_DIFFER |= {"packing", "zero3_generation", "cuda_graphs", "reward_fn_timeout", "print_loss", "target_kl"}
MAY_DIFFER |= {"per_device_train_batch_size", "per_device_generation_batch_size", "per_device_training_batch_size"}
MAY_DIFFER |= {"gradient_accumulation_steps", "generation_batches", "per_device_unsupervised_batch_size"}
MAY_DIFFER |= {"lr_scheduler_type", "num_warmup_steps", "gradient_clipping", "save_at_final", "best_by"}
MAY_DIFFER |= {f"{name}{what}" for name in ("", "actor_", "critic_") for what in ("learning_rate", "weight_decay")}
MAY_DIFFER |= {"lora_learning_rate", "actor_lora_learning_rate"}
OF_NO_INTEREST = {"resume", "config", "local_rank", "overwrite_output_dir", "notices"}  # not even listed
OF_A_STREAM = ("data", "split", "shape", "kind", "max_len")  # known before its rows are read


def complete(args: Arguments, output: Path) -> bool:
    """Whether `--resume auto` finds a run in `output` that has come to its end, of the length that is asked for."""
    if args.resume != "auto" or not (output / "results.json").is_file():
        return False
    try:
        before = json.loads((output / "run.json").read_text(encoding="utf-8"))["arguments"]
        return all(before[name] == getattr(args, name) for name in ("max_steps", "num_train_epochs"))
    except (OSError, ValueError, KeyError):
        return False


def find(args: Arguments, output: Path) -> Found | None:
    """The checkpoint that --resume speaks of; None: the run starts afresh. Every rank must call it.

    Raises:
        UserError: --resume names a folder without a complete checkpoint, or auto finds none but damaged ones.
    """
    if args.resume == "never":
        return None
    if args.resume == "auto":
        found = newest(output)
        if found is None:
            if gather_objects(bool(all_of(folder_of(output))))[0]:  # which a fresh start would delete
                raise UserError(
                    f"--resume auto: none of the checkpoints in {output} can be read, as the lines above say; mend "
                    f"that, or remove {folder_of(output)} to start afresh"
                )
            print0(f"--resume auto: no complete checkpoint in {output}, so the run starts afresh")
        return found
    folder = Path(args.resume)
    try:
        is_one = gather_objects((folder / MANIFEST).exists())[0]
        found = open_checkpoint(folder.resolve()) if is_one else newest(folder)
    except UserError as error:
        raise UserError(f"--resume {folder}: {error}") from error
    if found is None:
        raise UserError(f"--resume {folder}: holds no complete checkpoint; expected one, or the folder of a run")
    _bring_metrics(found, output)
    return found


def _bring_metrics(found: Found, output: Path) -> None:
    """A run that goes on in another folder takes its course so far along."""
    before, here = found.folder.parent.parent / "metrics.jsonl", output / "metrics.jsonl"
    if is_main() and before.is_file() and not here.exists():
        here.write_text(before.read_text(encoding="utf-8"), encoding="utf-8")
    barrier()


def checkpoints(args: Arguments, output: Path, found: Found | None, best: Path | None = None) -> Checkpoints:
    """Those of a run whose data.json is written; see `Checkpoints` for `best`.

    Raises:
        UserError: `found` is of another training.
    """
    # By rank 0, which has written data.json: another rank may not see it yet.
    made_of = gather_objects(description(args, output) if is_main() else None)[0]
    if found is not None:
        for notice in differences(found, made_of):
            print0(notice)
    saving = Saving(
        args.save_steps,
        args.save_minutes,
        args.save_total_limit,
        args.max_hours,
        go_back=args.on_nan == "rollback",
    )
    return Checkpoints(output, saving, made_of, found=found, best=best)


def description(args: Arguments, output: Path) -> dict[str, Any]:
    """What decides the course of a run, as json has it."""
    data = json.loads((output / "data.json").read_text(encoding="utf-8"))
    functions = reward_sources([], args.reward_fn)[1] if isinstance(args, Step3Arguments) else []
    described = {
        "stage": args.stage,
        "arguments": {k: v for k, v in vars(args).items() if k not in OF_NO_INTEREST},
        "data": _data(data),
        "models": {flag: [fingerprint(model, flag) for model in models] for flag, models in _models(args)},
        "functions": {source.name: _source(source.name) for source in functions},
        "ranks": world_size(),
        "versions": versions() | {"git commit": git_commit()},
    }
    return json.loads(json.dumps(described))


def _models(args: Arguments) -> Iterable[tuple[str, list[str]]]:
    """The models that a run starts from, by their flags."""
    if isinstance(args, FinetuneArguments):
        return [("--model_name_or_path", [args.model_name_or_path])]
    rewards = [source.name for source in reward_sources(args.reward_model_name_or_path, [])[0]]
    found = [("--actor_model_name_or_path", [args.actor_model_name_or_path]), ("--reward_model_name_or_path", rewards)]
    critic = args.critic_model_name_or_path
    return found + ([("--critic_model_name_or_path", [critic])] if critic else [])


def _source(function: str) -> str | None:
    """A fingerprint of the file of a reward function; None: it is named by its module."""
    file = Path(function.rpartition(":")[0])
    return fingerprint_of(file.read_text(encoding="utf-8")) if file.suffix == ".py" and file.is_file() else None


def _data(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of data.json what two runs on the same rows have in common, wherever those lie."""
    entries = [
        {k: v for k, v in entry.items() if k in OF_A_STREAM}
        if record.get("streaming") and "held_out" in entry
        else entry
        for entry in record["data"]
    ]
    for entry in entries:
        entry.pop("data", None)
    tokenizer = {k: v for k, v in record["tokenizer"].items() if k != "name"}
    return {k: v for k, v in record.items() if k != "first_epoch_complete"} | {"data": entries, "tokenizer": tokenizer}


def differences(found: Found, made_of: Mapping[str, Any]) -> list[str]:
    """What is otherwise than it was, a line each, where that is allowed.

    Raises:
        UserError: The training would be another one.
    """
    before, now = found.manifest["made_of"], made_of
    where = f"--resume: checkpoint {found.folder}"
    if before["stage"] != now["stage"]:
        raise UserError(f"{where} is of {before['stage']}, not of {now['stage']}")
    changed = [
        (name, before["arguments"].get(name), value)
        for name, value in now["arguments"].items()
        if before["arguments"].get(name) != value
    ]
    for name, old, new in changed:
        if name not in MAY_DIFFER:
            raise UserError(f"{where} was made with --{name} {old}, not {new}: that would be another training")
    if before["data"] != now["data"]:
        what = next(key for key in before["data"] | now["data"] if before["data"].get(key) != now["data"].get(key))
        known = {"data": "the rows of --data_path", "tokenizer": "the tokenizer", "code": "the code that reads data"}
        raise UserError(f"{where}: {known.get(what, what)} differs from what it was ({_first(before, now, what)})")
    for flag, fingerprints in now["models"].items():
        if before["models"].get(flag) != fingerprints:
            raise UserError(f"{where}: the weights of {flag} are others than they were")
    notices = [f"goes on with --{name} {new}, was {old}" for name, old, new in changed]
    notices += [
        f"goes on with another reward function {name}" for name in _changed(before["functions"], now["functions"])
    ]
    if before["ranks"] != now["ranks"]:
        notices.append(f"goes on with {now['ranks']} ranks, was {before['ranks']}: answers are drawn otherwise")
    for name in _changed(before["versions"], now["versions"]):
        notices.append(f"goes on with {name} {now['versions'].get(name)}, was {before['versions'].get(name)}")
    return notices


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def _first(before: Mapping[str, Any], now: Mapping[str, Any], key: str) -> str:
    """The first difference in a part of the data's record, in words."""
    old, new = before["data"].get(key), now["data"].get(key)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = next((a, b) for a, b in zip(old, new, strict=True) if a != b)
    if isinstance(old, dict) and isinstance(new, dict):
        name = _changed(old, new)[0]
        return f"{name} was {old.get(name)}, is {new.get(name)}"
    return f"was {old}, is {new}"
