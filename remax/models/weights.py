"""The weights of a checkpoint, before anything is learned from them: each is there, of the right shape, and a number.

transformers fills what a checkpoint lacks with random numbers and drops what the model has no place for; its loading
report says so, and is read here.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import deepspeed

from utils.distributed import gather_objects, rank
from utils.run import UserError

SHOWN = 3  # names in a message; the others are counted
# The file that transformers takes, of those that are there.
READ_FIRST = [f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
# What old checkpoints hold beside their parameters: causal masks and rotary frequencies, which models make themselves.
OLD_BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")
OUTPUT_HEAD = re.compile(r"(lm_head|embed_out)\.")


@contextlib.contextmanager
def unpartitioned() -> Iterator[None]:
    """Inside, transformers loads models whole, also where ZeRO-3 is switched on: only so is its report complete."""
    held = deepspeed._hf_deepspeed_config_weak_ref and deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if held is not None:
            deepspeed.set_hf_deepspeed_config(held)


def some(names: Iterable[str]) -> str:
    """The first few names in alphabetical order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more


def check_report(
    report: dict[str, Any], name_or_path: str, flag: str, *, new_head: bool = False, spare_head: bool = False
) -> None:
    """Refuses a checkpoint that does not hold exactly the weights of its model.

    Args:
        report: As `from_pretrained(..., output_loading_info=True)` gives it.
        new_head: A score head may be missing, and the output embedding of a language model is left out.
        spare_head: The checkpoint holds a score head too, for which this model has no place.

    Raises:
        UserError: Weights are missing, have no place in the model, or another shape than its configuration says.
    """
    missing = {name for name in report["missing_keys"] if not (new_head and name.startswith("score."))}
    unexpected = {
        name
        for name in report["unexpected_keys"]
        if not OLD_BUFFERS.search(name)
        and not (new_head and OUTPUT_HEAD.match(name))
        and not (spare_head and name.startswith("score."))
    }
    shapes = {f"{name} {tuple(held)} instead of {tuple(asked)}" for name, held, asked in report["mismatched_keys"]}
    faults = {"lack": missing, "hold without a place in the model": unexpected, "hold in another shape": shapes}
    found = [f"{what} {some(names)}" for what, names in faults.items() if names]
    if found:
        raise UserError(
            f"{flag}: the weights of {name_or_path} are not those of its config.json: they {'; they '.join(found)}. "
            "Expected each weight of the model once: correct config.json, or save the model again with save_pretrained"
        )


def check_number_formats(model: nn.Module, folder: Path, flag: str) -> None:
    """Refuses a folder whose weights are integers, which would be taken for real numbers.

    Args:
        model: Whose parameters the weights are.

    Raises:
        UserError: Names them.
    """
    from safetensors import safe_open

    parameters = {name for name, _ in model.named_parameters()}
    strange: dict[str, str] = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            formats = {name: file.get_slice(name).get_dtype() for name in parameters & set(file.keys())}
        strange |= {name: kind for name, kind in formats.items() if kind == "BOOL" or kind[0] in "IU"}
    if strange:
        raise UserError(
            f"{flag}: weights of {folder} are integers ({min(strange.values())}): {some(strange)}; expected fp32, bf16 "
            "or fp16: save the model as it was before it was quantised"
        )


def held_part(parameter: Any) -> Tensor:
    """What this process holds of a parameter: all of it, or under ZeRO-3 its part without what fills that up."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    part = parameter.ds_tensor.detach().flatten()
    return part[: max(parameter.ds_numel - rank() * part.numel(), 0)]


@torch.no_grad()
def write_part(parameter: Any, whole: Tensor, *, add: Tensor | float = 0.0) -> None:
    """Writes what this process holds of `whole` (+ `add`, of that part) over the parameter; see `held_part`."""
    part = held_part(parameter)
    if hasattr(parameter, "ds_tensor"):
        start = rank() * parameter.ds_tensor.numel()
        whole = whole.flatten()[start : start + part.numel()]
    part.copy_(whole.to(part.device) + add)


def check_finite(model: nn.Module, name_or_path: str, flag: str) -> None:
    """Refuses weights that are not numbers; under ZeRO-3 every rank must call it, and all refuse together.

    Raises:
        UserError: A weight is nan or infinite in the number format that it was loaded in.
    """
    bad = {}
    for name, parameter in model.named_parameters():
        part = held_part(parameter)
        if part.numel() and not torch.stack(torch.aminmax(part)).isfinite().all():
            bad[name] = str(part.dtype).removeprefix("torch.")
    if deepspeed.is_deepspeed_zero3_enabled():
        bad = {name: dtype for of_rank in gather_objects(bad) for name, dtype in of_rank.items()}
    if bad:
        raise UserError(
            f"{flag}: weights of {name_or_path} are nan or infinite in {min(bad.values())}: {some(bad)}; take a model "
            "that was saved before its training was lost, or bf16 where fp16 is too narrow"
        )


def restore_buffers(model: nn.Module, whole: nn.Module, flag: str) -> None:
    """Makes buffers anew that ZeRO-3 rounded to 16 bits as the model was built.

    DeepSpeed casts what `torch.arange` gives meanwhile, and with some releases of transformers rotary frequencies come
    of it: the angle at position 1000 is then off by a radian.

    Args:
        whole: The same model as it is without ZeRO-3; the number formats of its buffers are right.

    Raises:
        UserError: A module cannot be built a second time from its config alone.
    """
    right = dict(whole.named_buffers())
    for prefix, module in model.named_modules():
        own = ((name, f"{prefix}.{name}") for name, buffer in module.named_buffers(recurse=False))
        rounded = [name for name, full in own if full in right and module._buffers[name].dtype != right[full].dtype]
        if not rounded:
            continue
        try:
            again = type(module)(module.config)
        except (AttributeError, TypeError) as error:
            raise UserError(
                f"{flag}: ZeRO 3 rounds the buffers {some(f'{prefix}.{name}' for name in rounded)} to 16 bits with "
                "this release of transformers; install the one of constraints.txt, or use ZeRO 2 or fp32"
            ) from error
        for name in rounded:
            module._buffers[name] = again._buffers[name].to(module._buffers[name].device)


def check_files(folder: Path, flag: str) -> None:
    """Refuses an index of weights that names files outside its folder.

    Raises:
        UserError: The index cannot be read, or names such a file.
    """
    file = next((folder / name for name in READ_FIRST if (folder / name).is_file()), folder)
    if file.suffix != ".json":
        return
    try:
        files = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        strange = [name for name in files if Path(name).name != name or name == ".."]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{flag}: {file} is no index of weights ({type(error).__name__}); expected a weight_map of names to files"
        ) from error
    if strange:
        raise UserError(f"{flag}: {file} names {some(strange)}; expected files in its own folder")


def broken_files(folder: Path) -> list[str]:
    """Weight files of the folder that are cut, empty or no safetensors at all."""
    from safetensors import SafetensorError, safe_open

    broken = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError):
            broken.append(file.name)
    return broken
