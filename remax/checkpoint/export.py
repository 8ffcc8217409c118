"""Hugging Face export of a model at any ZeRO stage: a folder that plain transformers loads.

The state dict is gathered parameter by parameter onto rank 0, so that no other rank holds more than one full parameter,
and adapters are merged in that copy: the training model keeps its adapters apart and goes on learning.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from remax.engines.zero import gathered
from remax.models.hydra import HydraModel
from remax.models.loading import count_parameters
from remax.models.lora import adapters_alone, merge_adapters, save_adapter
from remax.models.policy import PolicyModel
from remax.models.reward_model import RewardModel
from utils.adapter_folder import ADAPTER_FOLDER
from utils.distributed import barrier, is_main, print0, shutdown
from utils.files import write_whole
from utils.run import DISK_FULL, STOPPED, UserError

ATTEMPTS, WAIT = 30, 30  # how often a full disk is tried again, and after how many seconds


def full_state_dict(hf: PreTrainedModel, zero3: bool) -> dict[str, Tensor]:
    """Whole tensors in CPU memory on rank 0, an empty dict on the others; every rank must call it.

    Tied tensors appear once.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in hf.named_parameters():  # tied parameters are listed once
        with gathered([parameter], zero3):
            if is_main():
                state[name] = parameter.detach().to("cpu", copy=True)
    if is_main():
        persistent = hf.state_dict().keys()
        state |= {name: b.detach().to("cpu", copy=True) for name, b in hf.named_buffers() if name in persistent}
    return state


def export(
    model: PolicyModel | RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    zero3: bool,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Writes weights (safetensors), config, generation config and tokenizer.

    Adapters are merged; where nothing else was trained, they also lie in a folder of their own, `ADAPTER_FOLDER`. A
    policy that learned them beside a frozen score head is written without: that head scores for the start's weights.
    Every rank must call it; it returns when all is written. `state` replaces the model's own weights (an average of
    them). All files are written to a folder of their own first and then moved into `folder`, which may hold other files
    (the run's logs).
    """
    hf, folder = model.hf, Path(folder)
    state = full_state_dict(hf, zero3) if state is None else state
    if is_main():
        partial = folder / ".partial"
        kind: type[PreTrainedModel] = type(hf)
        if isinstance(model, HydraModel) and adapters_alone(hf) and not model.score_head.weight.requires_grad:
            kind = cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING)[type(hf.config)]
            state = {name: tensor for name, tensor in state.items() if not name.startswith("score.")}
        merged, of_adapters = merge_adapters(state, hf), state

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            _remove(partial)  # of an interrupted export
            _without_adapters(hf, kind).save_pretrained(partial, state_dict=merged)
            if adapters_alone(hf):
                save_adapter(of_adapters, hf, partial / ADAPTER_FOLDER)
                tokenizer.save_pretrained(partial / ADAPTER_FOLDER)  # with the pad token that step 2 may have added
            if isinstance(model, PolicyModel):
                # As it came: save_pretrained of older transformers refuses what the first Llama-2 folders say.
                model.own_generation_config.to_json_file(partial / "generation_config.json")
            tokenizer.save_pretrained(partial)
            _move_files(partial, folder)

        _when_there_is_room(write, partial)
    barrier()


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _when_there_is_room(write: Callable[[], None], partial: Path) -> None:
    """Writes, again and again while the disk is full: a trained model is worth a quarter of an hour.

    Meanwhile the other ranks wait, and an earlier export stays as it is.

    Raises:
        OSError: The disk is full and stays so.
    """
    for attempt in range(ATTEMPTS + 1):
        try:
            return write()
        except (OSError, SafetensorError) as error:
            _remove(partial)
            if not _is_full(error):
                raise
            if attempt == ATTEMPTS:
                raise OSError(errno.ENOSPC, "No space left on device", str(partial.parent)) from error
        if attempt == 0:
            print0(
                f"no space left for the model in {partial.parent}: make room; it is tried again every {WAIT} seconds, "
                f"{ATTEMPTS} times"
            )
        time.sleep(WAIT)


def _is_full(error: Exception) -> bool:
    """Safetensors, which is no Python, tells the number of an error in its text."""
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    return any(f"os error {number}" in str(error) for number in DISK_FULL)


def refuse_without_room(model: PolicyModel | RewardModel, folder: Path) -> None:
    """Before a training whose model is written at its end: is there room for it?

    Raises:
        UserError: On rank 0, there is less free than the model takes.
    """
    needed = count_parameters(model) * model.hf.dtype.itemsize
    free = shutil.disk_usage(folder).free
    if is_main() and free < needed:
        raise UserError(
            f"--output_dir {folder}: {free / 2**30:.2f} GiB are free there, and the trained model takes "
            f"{needed / 2**30:.2f} GiB; make room, or choose another folder"
        )


def _without_adapters(hf: PreTrainedModel, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """An empty model of the same configuration, so that saving neither sees adapters nor moves any weight."""
    with torch.device("meta"):
        plain = kind(hf.config)
        cast(nn.Module, plain).to(hf.dtype)  # the config will name this number format
    if hf.can_generate():
        plain.generation_config = hf.generation_config
    return plain


OF_AN_EXPORT = re.compile(  # what transformers reads from a folder, and what an export may or may not have
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|generation_config\.json"
    rf"|chat_template\.jinja|additional_chat_templates|{ADAPTER_FOLDER}"
)


def _move_files(source: Path, target: Path) -> None:
    """Moves every file and folder of `source` into `target`, in the place of those of the same name.

    What an earlier export wrote and the new one does not have is removed. Files can be read by whom the umask lets:
    weights are written for their owner alone.
    """
    os.umask(mask := os.umask(0))
    new = {path.name for path in source.iterdir()}
    for path in source.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)
    for path in source.iterdir():
        if path.is_dir():  # such as additional_chat_templates/
            _remove(target / path.name)
        path.replace(target / path.name)
    source.rmdir()
    for path in target.iterdir():
        if OF_AN_EXPORT.fullmatch(path.name) and path.name not in new:
            _remove(path)


def export_and_exit(
    stopped: Exception,
    model: PolicyModel | RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    zero3: bool,
) -> NoReturn:
    """The end of a training that stopped: writes the model as it now is, says why, and exits with status STOPPED."""
    export(model, tokenizer, folder, zero3=zero3)
    print0(f"training stopped. {stopped}. The model as it is now: {folder}")
    shutdown()
    sys.exit(STOPPED)


def write_note(folder: str | Path, name: str, values: Mapping[str, Any]) -> None:
    """A small json file beside an export, on rank 0: why it was saved and how good it is."""
    if is_main():
        write_whole(Path(folder) / name, json.dumps(values, indent=2) + "\n")
