"""Names of models as flags give them: what can only be a path must be there, with a model in it."""

from pathlib import Path

from utils.adapter_folder import WEIGHTS, base_model, is_adapter
from utils.run import UserError


def looks_local(name: str) -> bool:
    """True for what can only be a path.

    A hub name is `name` or `owner/name`, without a leading dot or a data suffix; and `output/step1` is none where there
    is a folder `output`.
    """
    suffixes = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".gz", "/")
    path = Path(name)
    return (
        name.startswith(("/", ".", "~"))
        or name.endswith(suffixes)
        or name.count("/") > 1
        or path.exists()
        or ("/" in name and path.parent.is_dir())
    )


def check_model(flag_name: str, name: str | None) -> None:
    """A model that is named as a path must be a folder with a config.json, or a PEFT folder on such a model."""
    if name is None:
        return
    flag = f"--{flag_name}"
    if is_adapter(name) and not (Path(name) / WEIGHTS).is_file():
        raise UserError(
            f"{flag} {name}: has no {WEIGHTS}; expected what PEFT writes (a pickle, adapter_model.bin, is never "
            "read: load and save it with a present release of peft)"
        )
    name, flag = base_model(name, flag)
    path, looked = Path(name), f"(looked from {Path.cwd()})"
    if path.is_dir():
        if not (path / "config.json").is_file():
            inside = ", ".join(sorted(p.parent.name for p in path.glob("*/config.json"))[:3])
            raise UserError(
                f"{flag} {name}: the folder has no config.json, so it holds no Hugging Face model"
                + (f"; its subfolder has one: {inside}" if inside else "")
            )
    elif path.exists():
        raise UserError(f"{flag} {name}: is a file; expected the folder of a Hugging Face model, or a hub name")
    elif looks_local(name):
        raise UserError(f"{flag} {name}: no such folder {looked}; train or download the model first")
