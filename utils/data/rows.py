"""The rows of a file as they are: every one, in order, with its own columns.

For scoring and asking. The loaders of training drop, shuffle, split and hold out; here nothing gets lost, and what
cannot be used says why.
"""

from dataclasses import dataclass, replace
from typing import Any

from datasets import Value

from utils.data.preferences import TEXT, choose_conversion, normalise
from utils.data.shapes import PLAIN, Example, Form
from utils.data.sources import Part, file_format, json_rows, read_splits, undecodable
from utils.run import UserError


@dataclass(frozen=True)
class TextRow:
    """A row as it was read, and its texts; `skipped` says why it has none (`example` is then empty)."""

    original: dict[str, Any]
    example: Example
    skipped: str | None = None


def read_rows(name: str, *, cache_dir: str | None, flag: str = "--data_path", form: Form = PLAIN) -> list[TextRow]:
    """All rows of a file; of a folder or hub data set those of its test split, or of the training split without one.

    Args:
        name: anything that `utils.data.preferences.load_data_set` reads.
        cache_dir: where the Arrow files go; None: the datasets library's own folder.
        flag: the flag that errors name.
        form: the chat template that writes lists of messages.

    Raises:
        UserError: nothing there, an unreadable file, columns of no known shape, a wrong value.
    """
    splits = read_splits(name, cache_dir, flag)
    rows: list[TextRow] = []
    try:
        parts = [without_labels(part) for part in splits.get("test", splits["train"])]
        shape, convert, form = choose_conversion(name, parts[0], flag, form)
        for part in parts:
            texts = normalise(part, convert, shape, cache_dir, None, flag, form)
            for original, text in zip(original_rows(part), texts, strict=True):
                skipped = text["skipped"]
                if text["prompt"] is None:
                    text["prompt"], skipped = "", "plain text without a prompt"
                rows.append(TextRow(original, Example(**{column: text[column] for column in TEXT}), skipped))
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: {undecodable(splits, name)}") from error
    return rows


def without_labels(part: Part) -> Part:
    """The part without a column `label` of true and false: training leaves out the unwanted answers, this does not."""
    if part.rows.features.get("label") != Value("bool"):
        return part
    return replace(part, rows=part.rows.remove_columns("label"))


def original_rows(part: Part) -> list[dict[str, Any]]:
    """The part's rows with the values that stand in its file.

    Arrow makes dates of texts that look like some and fractions of integers that stand beside one, and gives every row
    the columns of all others. So JSON is read again as it stands, unless its layout is one that only the datasets
    library understands.
    """
    if part.file is not None and file_format(part.file) == "json":
        rows = [row for _, row in json_rows(part.file)]
        if len(rows) == len(part.rows):
            return rows
    return list(part.rows)
