"""A PEFT folder from outside: LoRA adapters on a base model that its adapter_config.json names."""

import json
from pathlib import Path
from typing import Any

from utils.files import read_text
from utils.run import UserError

ADAPTER_FOLDER = "adapter"  # beside the merged model
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(name_or_path: str) -> bool:
    """Whether this is a PEFT folder."""
    return (Path(name_or_path) / CONFIG).is_file()


def adapter_config(folder: str, flag: str) -> dict[str, Any]:
    """What its adapter_config.json says.

    Raises:
        UserError: It cannot be read, or describes no LoRA.
    """
    file = Path(folder) / CONFIG
    try:
        config = json.loads(read_text(str(file), flag, "the settings of PEFT adapters"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag}: {file} is no JSON ({type(error).__name__}); save the adapters again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{flag}: {file} has peft_type {kind!r}; expected LORA: merge other adapters into their base")
    return config


def base_of(folder: str, flag: str) -> str:
    """The base model of a PEFT folder: a folder, looked for from here and from the PEFT folder, or a hub name.

    Raises:
        UserError: None is named, or a folder that is not there.
    """
    config = adapter_config(folder, flag)
    name, where = config.get("base_model_name_or_path"), f"{flag}: {Path(folder) / CONFIG}"
    if not isinstance(name, str) or not name:
        raise UserError(f"{where} has base_model_name_or_path {name!r}; expected the base model's folder or hub name")
    if config.get("revision") not in (None, "main"):
        raise UserError(
            f"{where} has revision {config['revision']!r}; expected none: download that revision of {name}, and name "
            "its folder as base_model_name_or_path"
        )
    for path in (Path(name).expanduser(), Path(folder) / name):
        if path.is_dir():
            if is_adapter(str(path)):
                raise UserError(f"{where} has base_model_name_or_path {name!r}, which holds adapters; expected a model")
            return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(
            f"{where} has base_model_name_or_path {name!r}, and there is no such folder (looked from {Path.cwd()} and "
            f"{folder}); write where the base model lies there"
        )
    return name


def base_model(name_or_path: str, flag: str) -> tuple[str, str]:
    """Where the whole model lies, and the flag that errors of it name: a PEFT folder's base, or what is given."""
    if not is_adapter(name_or_path):
        return name_or_path, flag
    return base_of(name_or_path, flag), f"{flag} (base_model_name_or_path of {Path(name_or_path) / CONFIG})"
