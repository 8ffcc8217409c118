"""The rows of a file as they are: every one, in order, with its own columns; for evaluation.

The loaders of training drop, shuffle, split and hold out rows. Here none is lost, and those that cannot be used carry
the reason.
"""

from dataclasses import dataclass, replace
from typing import Any

from datasets import Value

from utils.data.preferences import TEXT, choose_conversion, normalise
from utils.data.shapes import PLAIN, Example, Form
from utils.data.sources import BadJSON, Shard, file_format, json_rows, read_splits, undecodable
from utils.run import UserError


@dataclass(frozen=True)
class TextRow:
    """A row as it was read, and its texts; `skipped` is the reason where it has none (`example` is then empty)."""

    original: dict[str, Any]
    example: Example
    skipped: str | None = None

    @property
    def prompt(self) -> str:
        """Empty for plain text."""
        return self.example.prompt or ""


def read_rows(name: str, *, cache_dir: str | None, flag: str = "--data_path", form: Form = PLAIN) -> list[TextRow]:
    """All rows of a file; of a folder or hub data set those of its test split, else those of its training split.

    Raises:
        UserError: See `utils.data.preferences.load_data_set`, which explains the arguments as well.
    """
    splits = read_splits(name, cache_dir, flag)
    rows: list[TextRow] = []
    try:
        shards = splits.get("test", splits["train"])
        for k, shard in enumerate(shards):  # unlike training, evaluation keeps unwanted answers
            if shard.table.features.get("label") == Value("bool"):
                shards[k] = replace(shard, rows=shard.table.remove_columns("label"))
        conversion = choose_conversion(name, shards[0], flag, form)
        for shard in shards:
            texts = normalise(shard, conversion, cache_dir, None)
            for original, text in zip(original_rows(shard), texts, strict=True):
                if text["prompt"] is None:
                    text |= {"prompt": "", "skipped": "plain text without a prompt"}
                example = Example(**{column: text[column] for column in TEXT})
                rows.append(TextRow(original, example, text["skipped"]))
    except (UnicodeDecodeError, BadJSON) as error:
        raise UserError(f"{flag}: {undecodable(splits, name)}") from error
    return rows


def original_rows(shard: Shard) -> list[dict[str, Any]]:
    """The shard's rows with the values of its file.

    Arrow turns texts that look like dates into dates and, beside a fraction, integers into fractions, and gives every
    row the columns of all others. So JSON is read again, unless only the datasets library understands its layout.
    """
    if shard.file is not None and file_format(shard.file) == "json":
        rows = [row for _, row in json_rows(shard.file)]
        if len(rows) == len(shard.table):
            return rows
    return list(shard.table)
