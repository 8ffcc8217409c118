"""The file of --config: a flat mapping from flags to values, or the run.json of an earlier run."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from utils.files import read_text
from utils.run import UserError, one_line


def read_config(file: str) -> tuple[dict[Any, Any], str | None]:
    """Reads json where the name ends so, else yaml.

    Returns:
        The values by name of the flag, as the file has them; the stage of the run whose run.json it is, else None.

    Raises:
        UserError: no such file, its content is no mapping, or a key is there twice.
    """
    where, is_json = f"--config {file}", file.endswith(".json")
    text = read_text(file, "--config", "a yaml or json file of flags")
    import yaml  # only runs with a file pay for it

    def once(keys: Iterable[Any]) -> None:
        for key, count in Counter(map(str, keys)).items():
            if count > 1:
                raise UserError(f"{where}: {key}: is set {count} times; expected once")

    def json_mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        once(key for key, _ in pairs)
        return dict(pairs)

    class YamlLoader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            once(key.value for key, _ in node.value)
            return super().construct_mapping(node, deep)

    try:
        content = json.loads(text, object_pairs_hook=json_mapping) if is_json else yaml.load(text, YamlLoader)
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply; expected a mapping from flags to values") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{where}: is no {'json' if is_json else 'yaml'} ({one_line(error)})") from None
    if isinstance(content, dict) and isinstance(content.get("arguments"), dict):
        return content["arguments"], str(content.get("stage"))
    if not isinstance(content, dict):
        kind = "empty" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{where}: is {kind}; expected a mapping from flags to values, such as learning_rate: 1e-5")
    return content, None
