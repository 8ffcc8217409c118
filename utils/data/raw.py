"""The rows of a file or data set as they are, one after the other, for data that fits neither the disk nor memory.

Each kind of file has a reader that goes through it once and keeps a bounded part of it in memory. JSON is read line by
line or, in a list, row by row; csv, parquet and Arrow files are read by the libraries that the datasets library uses.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
from datasets import Dataset, IterableDataset

from utils.data import sources
from utils.data.shapes import Row
from utils.data.sources import BLOCK, LONGEST_ROW, BadJSON, Shard
from utils.run import UserError, first_line

AT_ONCE = 1000  # rows that a library decodes together


def raw_rows(shard: Shard, flag: str) -> Iterator[tuple[str, Row]]:
    """(name, row) of each row; "line 7" of a JSON-lines file, "row 7" elsewhere.

    Raises:
        UserError: There are no rows, or the content does not fit the file's suffix; the message names the faulty row.
    """
    empty = True
    try:
        read = READERS[sources.file_format(shard.file)](shard.file) if shard.file else numbered(iterate(shard.table))
        for name, row in read:
            if not isinstance(row, dict):
                found = type(row).__name__
                raise UserError(f"{flag}: {shard.place}, {name}: found {found}, expected an object of columns")
            empty = False
            yield name, row
    except BadJSON as error:
        raise UserError(f"{flag}: {shard.place}, {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: {shard.place} holds text that is not UTF-8 ({error.reason})") from error
    except sources.READ_ERRORS as error:
        raise UserError(f"{flag}: {shard.place} cannot be read: {first_line(error)}") from error
    if empty:
        raise UserError(f"{flag}: {shard.place} has no rows; expected {sources.SHAPES}")


def numbered(rows: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    """("row 1", the first row), ..."""
    return ((f"row {i}", row) for i, row in enumerate(rows, 1))


def iterate(rows: Dataset | IterableDataset) -> Iterator[Row]:
    """The rows of a data set on the disk, several at a time, or of an iterable one."""
    if not isinstance(rows, Dataset):
        return iter(rows)
    batches = rows.iter(AT_ONCE)
    return (dict(zip(b, values, strict=True)) for b in batches for values in zip(*b.values(), strict=True))


def read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a list, or of a file with one object a line."""
    with sources.open_file(path) as file:
        yield from numbered(json_items(file)) if sources.is_json_list(file) else sources.json_rows(path)


def json_items(file: Any) -> Iterator[Any]:
    """The items of a JSON list, decoded one by one.

    Raises:
        BadJSON: An item cannot be decoded or parsed.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    parser, text, at, count = json.JSONDecoder(), "", 0, 0
    before = re.compile(r"\s*\[\s*")  # what precedes an item: the bracket, then commas
    while True:
        try:
            found = before.match(text, at)
            if not found:
                raise json.JSONDecodeError("expected a list of rows, with commas between them", text, at)
            if text.startswith("]", found.end()):
                return
            item, at = parser.raw_decode(text, found.end())
        except RecursionError:
            raise BadJSON(f"row {count + 1}: nested too deep") from None
        except json.JSONDecodeError as error:  # wrong, or not yet read to its end
            text, at = text[at:], 0
            block = file.read(BLOCK) if len(text) < LONGEST_ROW else b""
            if not block:
                raise BadJSON(f"row {count + 1}: not valid JSON ({error.msg}, column {error.colno})") from None
            try:
                text += decode(block)
            except UnicodeDecodeError as undecodable:
                raise BadJSON(f"row {count + 1} or a later one: not UTF-8 ({undecodable.reason})") from None
            continue
        count += 1
        yield item
        before = re.compile(r"\s*(?:,\s*|(?=\]))")


def read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of texts, since csv has no types: "4" is an answer, and so is "NA"."""
    sources.csv_header(path)  # refuses rows that pandas would shift
    tables = pandas.read_csv(path, dtype=str, keep_default_na=False, chunksize=AT_ONCE, encoding="utf-8-sig")
    with tables:
        yield from numbered(row for table in tables for row in table.to_dict("records"))


def read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a part of a row group at a time. Reading starts at the file's end, so it cannot be inside a .gz."""
    if path.suffix.lower() == ".gz":
        raise ValueError("parquet cannot be streamed out of .gz; unpack it (its columns are compressed as they are)")
    with pyarrow.parquet.ParquetFile(path) as file:
        yield from numbered(row for batch in file.iter_batches(AT_ONCE) for row in batch.to_pylist())


def read_arrow(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of Arrow's file format, or of its stream format, which the datasets library writes."""
    with sources.open_file(path) as file:
        if file.peek(6)[:6] == b"ARROW1":
            table = pyarrow.ipc.open_file(file)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(file)
        slices = (batch.slice(start, AT_ONCE) for batch in batches for start in range(0, batch.num_rows, AT_ONCE))
        yield from numbered(row for rows in slices for row in rows.to_pylist())


READERS: dict[str | None, Callable[[Path], Iterator[tuple[str, Any]]]]
READERS = {"json": read_json, "csv": read_csv, "parquet": read_parquet, "arrow": read_arrow}
