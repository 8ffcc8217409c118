"""LoRA adapters that PEFT saved, on their base model: apart, to learn on, or merged into its weights."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from remax.models.weights import held_part, some, write_part
from utils.adapter_folder import CONFIG, WEIGHTS, adapter_config
from utils.run import UserError, one_line

PREFIX = "base_model.model."  # of PEFT, before a tensor's name in the model
ADAPTER = "default"  # PEFT's name for the only one
READ = {  # fields of adapter_config.json; what others ask for is not done here
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("peft_version", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "use_rslora"),
}
BASE_UNCHANGED = (None, True, False, "gaussian", "orthogonal")  # values of init_lora_weights
MERGE = "merge the adapters into their base model with merge_and_unload, and give the merged model"


def add_saved(hf: PreTrainedModel, folder: str, flag: str, dropout: float = 0.0) -> None:
    """Puts the adapters of a PEFT folder on their base model, where they go on learning, and nothing else.

    Rank, scale and layers are the folder's; what it saved whole (a score head) is the model's from here on and learns.
    Every rank calls it; the base may be spread over the ranks.

    Args:
        dropout: On what the adapters read, in training; the folder's own is that of an earlier training.

    Raises:
        UserError: The folder asks for more than LoRA, or its weights are not those of this model.
    """
    config = _lora_config(folder, flag)
    saved = list(config.modules_to_save or [])
    config.modules_to_save, config.lora_dropout = None, dropout
    tensors = _tensors(folder, flag)
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn here is written over
            hf.add_adapter(config)
    except Exception as error:  # whatever PEFT makes of wrong values
        raise _misfit(folder, flag, error) from error
    whole = _write(hf, tensors, saved, folder, flag)
    config.modules_to_save = sorted({name.rpartition(".")[0] for name in whole}) or None  # as `save_adapter` reads it
    for name, parameter in hf.named_parameters():
        parameter.requires_grad = ".lora_" in name or name in whole or name.startswith("score.")


def merge_saved(hf: PreTrainedModel, folder: str, flag: str) -> None:
    """Folds the adapters of a PEFT folder into their base model, W + scale * B A; arguments as of `add_saved`."""
    from peft import LoraModel

    config = _lora_config(folder, flag)
    saved = list(config.modules_to_save or [])
    config.modules_to_save = None
    tensors = _tensors(folder, flag)
    try:
        with torch.random.fork_rng(devices=[]):
            tuner: Any = LoraModel(hf, config, ADAPTER)
    except Exception as error:
        raise _misfit(folder, flag, error) from error
    _write(hf, tensors, saved, folder, flag)
    for module in hf.modules():
        if ADAPTER in getattr(module, "lora_A", {}):
            layer: Any = module
            a, b = (x[ADAPTER].weight.detach().float() for x in (layer.lora_A, layer.lora_B))  # (r, in), (out, r)
            delta = layer.scaling[ADAPTER] * (b @ a)  # (out, in)
            weight = layer.get_base_layer().weight
            part = held_part(weight)
            write_part(weight, delta.T if layer.fan_in_fan_out else delta, add=part.clone())
    tuner.unload()  # takes the emptied layers of PEFT out again
    vars(hf).pop("peft_config", None)
    hf.name_or_path = ""  # where the base lies is not where these weights do
    hf.requires_grad_(True)


def saved_labels(folder: str, flag: str) -> int:
    """Rows of the score head that a PEFT folder holds, 0 without one."""
    from safetensors import safe_open

    try:
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            name = f"{PREFIX}score.weight"
            return file.get_slice(name).get_shape()[0] if name in file.keys() else 0  # noqa: SIM118
    except Exception as error:
        raise _unreadable(folder, flag, error) from error


def config_with_adapters(config: PreTrainedConfig, folder: str, flag: str) -> PreTrainedConfig:
    """The base model's configuration as that of the model with its adapters: a saved score head makes it a scorer."""
    if labels := saved_labels(folder, flag):
        config.num_labels = labels
        kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)
        config.architectures = [kind] if isinstance(kind, str) else None
    return config


def _lora_config(folder: str, flag: str) -> Any:
    """The folder's LoraConfig.

    Raises:
        UserError: It has settings that mean another computation than W x + scale * B A x.
    """
    from peft import LoraConfig

    raw, file = adapter_config(folder, flag), Path(folder) / CONFIG
    defaults = {f.name: f.default for f in dataclasses.fields(LoraConfig)}
    for name, value in raw.items():
        if name not in READ and value and value != defaults.get(name):
            raise UserError(f"{flag}: {file} has {name} {value!r}, which is not done here; {MERGE}")
    if (start := raw.get("init_lora_weights")) not in BASE_UNCHANGED:
        raise UserError(f"{flag}: {file} has init_lora_weights {start!r}, which changes the base model; {MERGE}")
    known = {name: raw[name] for name in READ & defaults.keys() & raw.keys()}
    try:
        return LoraConfig(**known | {"inference_mode": False, "init_lora_weights": True})
    except Exception as error:
        raise UserError(f"{flag}: {file} is no LoRA configuration: {one_line(error)}") from error


def _tensors(folder: str, flag: str) -> dict[str, Tensor]:
    """Tensors of the folder by their names in the model with adapters."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(Path(folder) / WEIGHTS)
    except Exception as error:
        raise _unreadable(folder, flag, error) from error
    return {
        re.sub(r"\.(lora_[AB])\.weight$", rf".\1.{ADAPTER}.weight", name.removeprefix(PREFIX)): tensor
        for name, tensor in tensors.items()
    }


def _unreadable(folder: str, flag: str, error: Exception) -> UserError:
    file = Path(folder) / WEIGHTS
    reason = one_line(error) if file.is_file() else "no such file"
    pickled = " (adapter_model.bin is a pickle, which is never read)" * file.with_suffix(".bin").is_file()
    return UserError(f"{flag}: cannot read {file}: {reason}{pickled}; save the adapters again with save_pretrained")


def _misfit(folder: str, flag: str, error: Exception) -> UserError:
    return UserError(
        f"{flag}: the adapters of {Path(folder) / CONFIG} do not fit their base model: {one_line(error)[:300]}"
    )


def _write(hf: PreTrainedModel, tensors: dict[str, Tensor], saved: list[str], folder: str, flag: str) -> set[str]:
    """Writes the folder's tensors over those of the model with adapters.

    Returns:
        Names of those that are no adapters: what was saved whole.

    Raises:
        UserError: One is missing, has no place, another shape, or is no number; or is tied to another weight.
    """
    ends = (hf.get_input_embeddings(), hf.get_output_embeddings())
    tied = tuple(f"{name}." for name, module in hf.named_modules() if any(module is end for end in ends))
    if hf.config.tie_word_embeddings and any(name.startswith(tied) for name in tensors):
        raise UserError(f"{flag}: {folder} changes one of two embeddings that are tied in its base model; {MERGE}")
    parameters = dict(hf.named_parameters())
    named = tuple(f".{module}" for module in saved)
    whole = {name for name in parameters if f".{name.rpartition('.')[0]}".endswith(named)}
    missing = {name for name in parameters if ".lora_" in name or name in whole} - tensors.keys()
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    other = {
        f"{name} {tuple(tensor.shape)} instead of {shapes[name]}"
        for name, tensor in tensors.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    }
    faults = {"lack": missing, "hold without a place in the model": tensors.keys() - shapes.keys()}
    found = [f"{what} {some(names)}" for what, names in (faults | {"hold in another shape": other}).items() if names]
    if found:
        raise UserError(
            f"{flag}: the weights of {Path(folder) / WEIGHTS} are not those of its {CONFIG} and base model: they "
            f"{'; they '.join(found)}. Expected what PEFT saved for this base model"
        )
    if bad := {name for name, tensor in tensors.items() if not tensor.is_floating_point()}:
        raise UserError(f"{flag}: weights of {Path(folder) / WEIGHTS} are integers: {some(bad)}; expected fp32 or bf16")
    if bad := {name for name, tensor in tensors.items() if not tensor.to(hf.dtype).isfinite().all()}:
        raise UserError(f"{flag}: weights of {Path(folder) / WEIGHTS} are nan or infinite: {some(bad)}")
    for name, tensor in tensors.items():
        write_part(parameters[name], tensor)
    return {name for name in tensors if ".lora_" not in name}
