"""What one entry of --data_path says: `name#configuration/split:weight`, all but the name optional.

Other flags that take several weighted names share the weight after the colon.

Without heavy imports: the flags are checked before any library is loaded.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from utils.run import UserError

WEIGHT = re.compile(r"(?P<name>.+):(?P<weight>[+-]?[0-9.]+([eE][+-]?[0-9]+)?)")


@dataclass(frozen=True)
class DataName:
    """A file, folder or hub name, and which part of it is meant."""

    name: str
    configuration: str | None = None  # of a hub data set; a subfolder of a local one
    split: str | None = None  # the one to train on
    weight: float | None = None  # the share in a blend of several data sets; None: all rows


def split_weight(entry: str, flag: str, *, negative: bool = False) -> tuple[str, float | None]:
    """`name:0.5` -> ("name", 0.5), `name` -> ("name", None). What exists on the disk is a name as it stands.

    Raises:
        UserError: The weight is no number, is 0 or infinite, or is below 0 where `negative` does not allow that.
    """
    if exists(entry) or not (found := WEIGHT.fullmatch(entry)):
        return entry, None
    try:
        weight = float(found["weight"])
    except ValueError:
        weight = 0.0
    if weight == 0 or not math.isfinite(weight) or (weight < 0 and not negative):
        expected = "other than 0, such as 0.5 or -1" if negative else "above 0, such as 0.3"
        raise UserError(f"{flag} {entry}: the weight after the colon must be a number {expected}")
    return found["name"], weight


def parse_name(entry: str, flag: str = "--data_path") -> DataName:
    """`my.jsonl`, `my.jsonl:0.3`, `owner/set#split`, `owner/set#configuration/split`, `owner/set#configuration/`.

    What exists on the disk under the whole text is a plain name, whatever signs it holds.

    Raises:
        UserError: No name, or a weight that is not above 0.
    """
    rest, weight = split_weight(entry, flag)
    if exists(rest) or "#" not in rest:
        name, selection = rest, ""
    else:
        name, _, selection = rest.rpartition("#")
        if not selection:
            raise UserError(f"{flag} {entry}: expected a split, or configuration/split, after the #")
    if not name:
        raise UserError(f"{flag} {entry!r}: expected the name of a file, a folder or a hub data set")
    configuration, _, split = selection.rpartition("/")
    return DataName(name, configuration or None, split or None, weight)


def exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, or the home folder of nobody
        return False
