"""The file of --config: a flat mapping from flags to values, or the run.json of an earlier run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.run import UserError


@dataclass(frozen=True)
class Config:
    """What a file says.

    Attributes:
        values: by name of the flag, as the file has them.
        stage: of the run whose run.json it is, else None.
    """

    values: dict[Any, Any]
    stage: str | None = None


def read_config(file: str) -> Config:
    """Reads json where the name ends so, else yaml.

    Raises:
        UserError: no such file, or its content is no mapping.
    """
    where, is_json = f"--config {file}", file.endswith(".json")
    import yaml  # only runs with a file pay for it

    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
        content = json.loads(text) if is_json else yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"{where}: no such file (looked from {Path.cwd()})") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: is no {'json' if is_json else 'yaml'} ({reason})") from None
    if isinstance(content, dict) and isinstance(content.get("arguments"), dict):
        return Config(content["arguments"], str(content.get("stage")))
    if not isinstance(content, dict):
        kind = "empty" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{where}: is {kind}; expected a mapping from flags to values, such as learning_rate: 1e-5")
    return Config(content)
