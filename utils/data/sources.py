"""Where rows come from: a file, a folder, or the Hugging Face hub; the datasets library reads and caches them."""

import codecs
import csv
import functools
import glob
import gzip
import json
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow.parquet
from datasets import Dataset, Features, IterableDataset, List, Value

from utils.data.names import DataName, parse_name
from utils.hub import hub_is_reachable
from utils.present import present
from utils.run import UserError, first_line

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
TRAIN_SPLITS = ("train", "train_prefs", "train_sft")
EVAL_SPLITS = ("test", "eval", "validation", "valid", "dev", "test_prefs", "test_sft")
SHAPES = (
    "prompt/chosen/rejected, chosen/rejected (whole dialogues), prompt/answers (the best first, or with ranks or "
    "scores), prompt/completion, messages, conversations (ShareGPT), instruction/input/output (Alpaca), prompt alone, "
    "or text"
)
# Where the hub's repository or configuration is not simply the name.
HUB_REPOSITORIES = {
    "mkqa-Chinese": ("apple/mkqa", None),
    "mkqa-Japanese": ("apple/mkqa", None),
    "Hello-SimpleAI/HC3-Chinese": ("Hello-SimpleAI/HC3-Chinese", "all"),
}
# What the datasets library raises for a file it cannot read; StopIteration where there is no first row.
UNREADABLE = (OSError, EOFError, zlib.error)
READ_ERRORS = (
    *(*UNREADABLE, ValueError, TypeError, RecursionError, StopIteration),
    datasets.exceptions.DatasetGenerationError,
)


BLOCK = 2**20  # bytes that are looked at together
LONGEST_ROW = 2**26  # bytes
GROWTH = 200  # times its size that a packed file may have: texts pack to a tenth, a trap to a thousandth
DEEP = 10_000  # levels of JSON
NESTING = np.zeros(256, dtype=np.int8)  # by how much a byte of JSON changes the level
NESTING[list(b"[{")], NESTING[list(b"]}")] = 1, -1


@dataclass(frozen=True)
class Shard:
    """The rows of one file or of one split of a data set, as they were read."""

    rows: Dataset | IterableDataset | None  # with streaming None, or for the hub an iterable data set
    place: str  # what messages call it
    file: Path | None = None  # None where the rows are of no single file
    label: str = ""  # precedes the names of its rows, where its split has several files

    @property
    def table(self) -> Dataset:
        """The rows, where they have been read."""
        return present(self.rows, f"the table of {self.place}")


class BadJSON(ValueError):
    """A value cannot be decoded or parsed; the message is place and problem."""


def read_splits(entry: str, cache_dir: str | None, flag: str, streaming: bool = False) -> dict[str, list[Shard]]:
    """{"train": shards} and, where the data set has its own, {"test": shards}.

    Args:
        entry: See `utils.data.names.parse_name`; a weight is ignored.
        cache_dir: Where the Arrow files go; None: the datasets library's own folder.
        flag: Named by the errors of this and all other functions here.
        streaming: Find the files, but read and write nothing; `utils.data.raw` reads the rows.
    """
    chosen = parse_name(entry, flag)
    name = chosen.name
    path = Path(name).expanduser()
    if name == "local/jsonfile" and not path.exists():
        files = find_files(jsonfile_folder(flag), chosen, flag)
    elif path.is_dir():
        path /= chosen.configuration or ""
        if not path.is_dir():
            raise UserError(f"{flag} {entry}: no such folder: {path}")
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return read_saved(path, chosen, flag)
        files = find_files(path, chosen, flag)
    elif path.is_file():
        if chosen.configuration or chosen.split:
            raise UserError(f"{flag} {entry}: a file has no configurations or splits; leave out what follows the #")
        files = {"train": [path]}
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or file_format(path):
        raise UserError(f"{flag}: no such file or folder: {name}")
    else:
        return read_hub(chosen, cache_dir, flag, streaming)
    return {split: [read_file(file, cache_dir, flag, streaming) for file in found] for split, found in files.items()}


def jsonfile_folder(flag: str) -> Path:
    """The `data` folder with train.json and eval.json that local/jsonfile means."""
    candidates = [Path.cwd() / "data", Path(__file__).resolve().parents[2] / "data"]
    for folder in candidates:
        if (folder / "train.json").is_file() and (folder / "eval.json").is_file():
            return folder
    places = " or ".join(map(str, dict.fromkeys(candidates)))
    raise UserError(f"{flag} local/jsonfile: expected train.json and eval.json in {places}")


def pick_splits(found: dict[str, Any], chosen: DataName, place: str, flag: str) -> dict[str, Any]:
    """{"train": ..., "test": ...} out of the splits that a data set has, by their usual names or as chosen.

    A chosen split is tested on its counterpart (test_sft for train_sft), else on the usual one.
    """
    names = [chosen.split] if chosen.split else [name for name in TRAIN_SPLITS if name in found]
    if not names or names[0] not in found:
        missing = f"no split {chosen.split}" if chosen.split else "no train split"
        raise UserError(f"{flag}: {place} has {missing}; it has {', '.join(map(str, found))}")
    train = names[0]
    counterpart = [train.replace("train", "test", 1)] if chosen.split else []
    test = next((name for name in (*counterpart, *EVAL_SPLITS) if name in found and name != train), None)
    return {"train": found[train]} if test is None else {"train": found[train], "test": found[test]}


def read_saved(path: Path, chosen: DataName, flag: str) -> dict[str, list[Shard]]:
    """A folder written by `save_to_disk`."""
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{flag}: cannot read {path} as a saved data set: {first_line(error)}") from error
    found = {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    splits = pick_splits(found, chosen, str(path), flag)
    return {split: [not_empty(Shard(rows, f"{path} ({split})"), flag)] for split, rows in splits.items()}


def find_files(path: Path, chosen: DataName, flag: str) -> dict[str, list[Path]]:
    """A folder's files named after their split: directly in it, in `data/`, or deeper, as in a hub snapshot."""
    for files in (sorted(path.iterdir()), sorted((path / "data").glob("*")), sorted(path.rglob("*"))):
        usable = [file for file in files if file.is_file() and file_format(file) and not file.name.startswith(".")]
        found: dict[str, list[Path]] = {}
        for file in usable:
            parent = "" if file.parent in (path, path / "data") else file.parent.name
            if split := split_of(file.name, chosen.split) or split_of(parent, chosen.split):
                found.setdefault(split, []).append(file)
        if not found and len(usable) == 1 and chosen.name != "local/jsonfile":  # a file without a split's name
            found = {"train": usable}
        if found:
            return pick_splits(found, chosen, str(path), flag)
    kinds = ", ".join(FORMATS)
    raise UserError(f"{flag}: {path} holds no data files; expected train and test files ({kinds}, also .gz)")


def split_of(name: str, chosen: str | None = None) -> str | None:
    """The split that a file or folder is named after, or None; `chosen` is a split of any name that is asked for.

    "train_prefs" of train_prefs-00000-of-00002.parquet, "test" of my.test.jsonl.gz.
    """
    stem = name.lower()
    for suffix in [*FORMATS, ".gz"]:
        stem = stem.replace(suffix, "")
    stem = re.sub(r"-\d+-of-\d+.*$", "", stem)
    if chosen and stem == chosen.lower():
        return chosen
    if stem in TRAIN_SPLITS + EVAL_SPLITS or re.match(r"(train|test)_(sft|gen|prefs)$", stem):
        return stem
    words = re.split(r"[^a-z]+", stem)
    return next((split for split in TRAIN_SPLITS + EVAL_SPLITS if split in words), None)


def file_format(path: Path) -> str | None:
    """The datasets library's reader for this file, by its suffix; None for other files."""
    return FORMATS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def read_file(path: Path, cache_dir: str | None, flag: str, streaming: bool = False) -> Shard:
    """The rows of one file; with streaming the file alone.

    Raises:
        UserError: An unknown suffix, an empty file, or content that is not what the suffix says.
    """
    reader = file_format(path)
    if reader is None:
        raise UserError(f"{flag}: {path} is of no known kind; expected {', '.join(FORMATS)}, also with .gz")
    if path.stat().st_size == 0:
        raise UserError(f"{flag}: {path} is empty; expected rows of {SHAPES}")
    if streaming:
        return Shard(None, str(path), path)
    options: dict[str, Any] = {}
    try:
        if reader == "json" and starts_with_null(path):
            raise ValueError("the first row is null")
        if reader == "csv":  # csv has no types: "4" is an answer, and so is "NA"
            options = {"features": Features({c: Value("string") for c in csv_header(path)}), "keep_default_na": False}
        check_content(path, reader, flag)
        with alone():
            rows = datasets.load_dataset(
                reader, data_files=glob.escape(str(path.resolve())), split="train", cache_dir=cache_dir, **options
            )
        for column in [name for name, kind in rows.features.items() if reader == "json" and is_date(kind)]:
            texts = [row.get(column) for _, row in json_rows(path)]
            feature = List(Value("string")) if isinstance(rows.features[column], List) else Value("string")
            rows = rows.remove_columns(column).add_column(column, texts, feature=feature)
    except READ_ERRORS as error:
        raise UserError(f"{flag}: {path}{why_unreadable(path, reader, error)}") from error
    return not_empty(Shard(rows, str(path), path), flag)


def is_date(kind: Any) -> bool:
    """Whether Arrow made dates of a JSON column of texts, or of lists of texts; JSON itself has no dates."""
    kind = kind.feature if isinstance(kind, List) else kind
    return isinstance(kind, Value) and kind.dtype.startswith(("timestamp", "date", "time"))


@contextmanager
def alone() -> Iterator[None]:
    """Keeps the datasets library from logging an error that is raised as well, and from counting a local file's use.

    For the count it asks a host outside, and waits for it where there is no network.
    """
    level, offline = datasets.logging.get_verbosity(), datasets.config.HF_HUB_OFFLINE
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        datasets.config.HF_HUB_OFFLINE = offline


def check_content(path: Path, reader: str, flag: str) -> None:
    """Refuses content that would fill the memory of the library that reads it, or end its process.

    The file is gone through once, in blocks: a .gz for its size, JSON for its depth. In JSON, brackets in texts count
    as well, so that what seems too deep is parsed.

    Raises:
        UserError: A file that unpacks to far more than data do.
        BadJSON: A row is nested too deep.
    """
    size, packed = path.stat().st_size, path.suffix.lower() == ".gz"
    read, depth = 0, 0
    if reader == "parquet" and not packed:
        about = pyarrow.parquet.read_metadata(path)
        read = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        check_growth(path, read, size, flag)
    if not packed and reader != "json":
        return
    with open_file(path) as file:
        while block := file.read(BLOCK):
            read += len(block)
            if packed:
                check_growth(path, read, size, flag)
            opened, closed = (sum(block.count(b) for b in pair) for pair in (b"[{", b"]}"))
            if reader == "json" and depth + opened <= DEEP:  # `depth` may be too large, but not too small
                depth = max(depth + opened - closed, opened)
            elif reader == "json":
                reached = depth + np.cumsum(NESTING[np.frombuffer(block, np.uint8)], dtype=np.int64)
                lowest = np.minimum(np.minimum.accumulate(reached), 0)
                if (reached - lowest).max() > DEEP:
                    for _ in json_rows(path):
                        pass
                    return
                depth = int(reached[-1] - lowest[-1])


def check_growth(path: Path, unpacked: int, size: int, flag: str) -> None:
    """Refuses a file of this size that unpacks to so many bytes or more."""
    if unpacked > GROWTH * size + LONGEST_ROW:
        raise UserError(
            f"{flag}: {path} unpacks to more than {GROWTH} times its size, and would fill the memory; where that is "
            "meant, give it unpacked"
        )


def not_empty(shard: Shard, flag: str) -> Shard:
    """The shard, when it has rows."""
    if len(shard.table) == 0:
        raise UserError(f"{flag}: {shard.place} has no rows; expected {SHAPES}")
    return shard


def open_file(path: Path) -> Any:
    """The file's bytes, decompressed."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def starts_with_null(path: Path) -> bool:
    """Whether the first row of a JSON file is null, at which the library's reader crashes, and Python with it."""
    with open_file(path) as file:
        return re.match(rb"\s*(\[\s*)?null\b", file.read(4096).removeprefix(codecs.BOM_UTF8)) is not None


def csv_header(path: Path) -> list[str]:
    """The column names in the first line.

    Raises:
        ValueError: The first row has more fields: pandas would take the surplus for an index, and give each column the
            values of its neighbour.
    """
    first = pandas.read_csv(path, dtype=str, nrows=1, encoding="utf-8-sig")
    if len(first) and not isinstance(first.index, pandas.RangeIndex):
        raise ValueError(f"row 1 has more fields than the header names columns ({len(first.columns)})")
    with open_file(path) as file:
        lines = (line.decode("utf-8-sig") for line in file)
        names = next(csv.reader(lines))
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"the header names the column {repeated[0]!r} more than once")
    return names


def why_unreadable(path: Path, reader: str, error: Exception) -> str:
    """What follows the file's name in the error: the first bad line where one is found, else the reader's message."""
    try:
        with open_file(path) as file:
            if not any(line.strip() for line in file):
                return f" is empty; expected rows of {SHAPES}"
        problem = first_bad_row(path) if reader == "json" else None
    except UNREADABLE as broken:
        return f" cannot be read: {first_line(broken)}"
    if problem:
        return f", {problem}"
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return f" has no rows; expected {SHAPES}"
    return f" cannot be read as {reader}: {first_line(error.__cause__ or error)}"


def first_bad_row(path: Path) -> str | None:
    """Place and problem of the first row of a JSON file that does not fit the rows before it; None where all fit."""
    kinds: dict[str, tuple[str, str]] = {}
    try:
        for place, row in json_rows(path):
            if not isinstance(row, dict):
                return f"{place}: found {type(row).__name__}, expected an object of columns"
            for column, value in row.items():
                kind = "number" if isinstance(value, (int, float)) else type(value).__name__
                before, where = kinds.setdefault(column, (kind, place)) if value is not None else (kind, place)
                if kind != before:
                    return f"{place}, column {column!r}: found {kind} {str(value)[:40]!r}, but {before} in {where}"
    except BadJSON as error:
        return str(error)
    return None


def converted_on_reading(file: Path | None, index: int, column: str) -> str | None:
    """Place and problem of the row because of which the reader turned the texts of a JSON column into numbers.

    None when the row at `index` itself has no text in `column`.
    """
    if file is None or file_format(file) != "json":
        return None
    row = next((row for i, (_, row) in enumerate(json_rows(file)) if i == index), None)
    return first_bad_row(file) if isinstance(row, dict) and isinstance(row.get(column), str) else None


@functools.lru_cache(maxsize=16)
def text_among_numbers(file: Path, column: str, modified: int) -> str | None:
    """Place and problem of the first text in the lists of a JSON column. Read once per state of the file."""
    try:
        for place, row in json_rows(file):
            values = row.get(column) if isinstance(row, dict) else None
            for value in values if isinstance(values, list) else ():
                if isinstance(value, str):
                    return f"{place}, column {column!r}: found str {value[:40]!r}, expected a number"
    except BadJSON:
        pass  # a layout that only the datasets library understands
    return None


def check_numbers(shard: Shard, columns: Iterable[str], flag: str) -> None:
    """Refuses texts among the scores and ranks of a JSON file, which Arrow turns into numbers beside others."""
    if shard.file is not None and file_format(shard.file) == "json":
        for column in {"scores", "ranks"}.intersection(columns):
            if problem := text_among_numbers(shard.file, column, shard.file.stat().st_mtime_ns):
                raise UserError(f"{flag}: {shard.place}, {problem}")


def undecodable(splits: dict[str, list[Shard]], name: str) -> str:
    """The place of text that is not UTF-8."""
    for shard in (shard for shards in splits.values() for shard in shards):
        problem = first_bad_row(shard.file) if shard.file and file_format(shard.file) == "json" else None
        if problem:
            return f"{shard.place}, {problem}"
    return f"{name} holds text that is not UTF-8"


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) for each row of a JSON list or of a file with one object a line.

    Raises:
        BadJSON: A row cannot be decoded or parsed.
    """
    with open_file(path) as file:
        if is_json_list(file):
            yield from ((f"row {i}", row) for i, row in enumerate(decode_json(file.read(), None), 1))
        else:
            for i, line in enumerate(iter(partial(file.readline, LONGEST_ROW + 1), b""), 1):
                if len(line) > LONGEST_ROW:
                    raise BadJSON(f"line {i}: longer than {LONGEST_ROW:,} bytes")
                if line.strip():
                    yield f"line {i}", decode_json(line, f"line {i}")


def json_objects(file: str, flag: str, expected: str) -> list[tuple[str, dict[str, Any]]]:
    """(place, object) for each row of a JSON file, see `json_rows`, which a flag names.

    Raises:
        UserError: No such file, no JSON, or a row that is no object; `expected` says what rows should be.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        reason = "is no regular file" if path.exists() else f"no such file (looked from {Path.cwd()})"
        raise UserError(f"{flag} {file}: {reason}; expected {expected}")
    try:
        rows = list(json_rows(path))
    except (BadJSON, *UNREADABLE) as error:
        raise UserError(f"{flag} {file}: {first_line(error)}; expected {expected}") from error
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{flag} {file}: {place} is no object; expected {expected}")
    return rows


def decode_json(content: bytes, place: str | None) -> Any:
    """Decodes a value; an error tells its `place`: the given one, or the line that the parser names."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        place = place or f"line {error.lineno}"
        raise BadJSON(f"{place}: not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise BadJSON(f"{place or 'a row'}: nested too deep") from None
    except UnicodeDecodeError as error:
        line_number = content[: error.start].count(b"\n") + 1
        raise BadJSON(f"{place or f'line {line_number}'}: not UTF-8 ({error.reason})") from None
    except ValueError as error:  # a number of thousands of digits
        raise BadJSON(f"{place or 'a row'}: {first_line(error)}") from None


def is_json_list(file: Any) -> bool:
    """Whether the file holds one JSON list rather than one object a line."""
    return file.peek(64)[:64].removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def row_name(file: Path | None, index: int) -> str:
    """What messages call a row: "line 7" of a JSON-lines file, "row 7" elsewhere, from 1 and without a csv header."""
    lines = filled_lines(file, file.stat().st_mtime_ns) if file and file_format(file) == "json" else None
    return f"row {index + 1}" if lines is None or index >= len(lines) else f"line {lines[index]}"


@functools.lru_cache(maxsize=1)
def filled_lines(file: Path, modified: int) -> Sequence[int] | None:
    """The numbers of the lines that hold a row; None for a JSON list. Read once per state of the file."""
    with open_file(file) as lines:
        if is_json_list(lines):
            return None
        return array("q", (number for number, line in enumerate(lines, 1) if line.strip()))


def read_hub(chosen: DataName, cache_dir: str | None, flag: str, streaming: bool = False) -> dict[str, list[Shard]]:
    """A data set of the Hugging Face hub, or its copy in the cache when the hub is out of reach."""
    name = chosen.name
    repository, usual = HUB_REPOSITORIES.get(name, (name, None))
    part = chosen.configuration or usual
    load = partial(datasets.load_dataset, repository, part, cache_dir=cache_dir, streaming=streaming)
    online = hub_is_reachable()
    try:
        try:
            loaded = load()
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            loaded = load(revision="refs/convert/parquet")  # the hub's own conversion of such data sets
    except Exception as error:  # also what the HTTP library of the installed version raises
        if online:
            raise UserError(f"{flag}: cannot load {name} from the hub: {first_line(error)}") from error
        raise UserError(
            f"{flag}: {name} is neither a local file or folder nor in the cache, and the Hugging Face hub cannot be "
            "reached; download it on a machine with access and give its folder"
        ) from error
    splits = pick_splits(dict(loaded), chosen, name, flag)
    shards = {split: Shard(rows, f"{name} ({split})") for split, rows in splits.items()}
    return {split: [shard if streaming else not_empty(shard, flag)] for split, shard in shards.items()}
