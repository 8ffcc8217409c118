"""One data set whose rows are read when they are needed (--streaming): its shape, its usable rows, their stages.

The rows are converted by the functions of `preferences`. What takes all rows at once there is decided row by row: a
hash of its prompt says which stage a row serves and whether it is held out, whatever the order of the rows, the number
of ranks and the flags of the other stages.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value

from utils.data import preferences
from utils.data.preferences import ABOUT, KEPT, TEXT, Conversion
from utils.data.raw import raw_rows
from utils.data.report import Dropped, count_dropped, report_dropped
from utils.data.shapes import Form, Row
from utils.data.sources import READ_ERRORS, Shard, check_numbers, first_bad_row, read_splits
from utils.distributed import print0
from utils.run import UserError, first_line

TOGETHER = 1000  # rows that are converted or encoded at a time, and from which the shape is found
HELD_OUT_ROWS = 1000  # of each data set, at most
REMEMBERED = 500_000  # earlier rows that a row is compared with, at least


@dataclass
class Counts:
    """What has become of the rows of one data set so far, for the report and data.json."""

    read: int = 0
    kept: int = 0
    encoded: int = 0
    held_out: int = 0
    other_stages: int = 0
    dropped: Dropped = field(default_factory=dict)  # on conversion
    unusable: Dropped = field(default_factory=dict)  # of the rows that serve this stage, on encoding
    cut: Dropped = field(default_factory=dict)  # under the encoder's names "prompt_cut", "cut" and "left_out"
    left_out: int = 0  # answers
    longest: int = 0
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=12))


class Repeats:
    """Remembers the keys of at least the last `size` rows, and at most of twice as many, in about 100 bytes each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.recent: set[int] = set()
        self.older: set[int] = set()

    def has(self, key: int) -> bool:
        """Whether the key came before; from now on it has."""
        if key in self.recent or key in self.older:
            return True
        if len(self.recent) == self.size:
            self.recent, self.older = set(), self.recent
        self.recent.add(key)
        return False


@dataclass(frozen=True)
class StreamedSet:
    """One data set of which only the rows that are needed are read."""

    name: str
    flag: str
    weight: float | None
    shards: dict[str, list[Shard]]  # as of `read_splits`
    columns: list[str]  # those of the first rows, which every row gets
    conversion: Conversion
    whole: bool = False  # all training rows serve stage 0
    held_out: Dataset | None = None  # rows to evaluate, with the columns of TEXT and ABOUT

    def texts(self, split: str, counts: Counts) -> Iterator[Row]:
        """The usable rows of a split in order, with the columns of `normalise_rows`; the others are counted."""
        repeats = Repeats(REMEMBERED)
        for shard in self.shards[split]:
            label = f"{shard.file.name} " if shard.file and len(self.shards["train"]) > 1 else ""
            labelled = replace(shard, rows=None, label=label)
            rows = raw_rows(shard, self.flag)
            while chunk := list(islice(rows, TOGETHER)):
                names, raw = zip(*chunk, strict=True)
                named = (renamed(row, self.conversion.form.columns) for row in raw)
                complete = ({**dict.fromkeys(self.columns), **row} for row in named)
                for row in preferences.normalise_rows(complete, names, self.conversion, labelled):
                    counts.read += 1
                    reason = row["skipped"] or (preferences.REPEATS if repeats.has(row["key"]) else None)
                    if reason:
                        count_dropped(counts.dropped, reason, row["origin"])
                    else:
                        counts.digest.update(row["key"].to_bytes(8, "little", signed=True))
                        yield row

    def training_texts(self, stage: int, shares: Sequence[float], seed: int, counts: Counts) -> Iterator[Row]:
        """The usable training rows of one stage."""
        for row in self.texts("train", counts):
            if "test" not in self.shards and is_held_out(row["asked"]):
                counts.held_out += 1
            elif not self.whole and stage_of(row["asked"], shares, seed) != stage:
                counts.other_stages += 1
            else:
                yield row


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with the user's columns under the names that shapes are made of; see `preferences.rename`."""
    ours = {theirs: name for name, theirs in columns.items()}
    return {ours.get(name, name): value for name, value in row.items() if name in ours or name not in columns}


def stage_of(prompt: int, shares: Sequence[float], seed: int) -> int:
    """The stage that the rows of a prompt serve: where a hash in [0, 1) falls among the shares."""
    place = hashed(prompt, seed) * sum(shares)
    bounds = np.cumsum(shares)
    return min(int(np.searchsorted(bounds, place, side="right")), max(i for i, share in enumerate(shares) if share))


def is_held_out(prompt: int) -> bool:
    """Whether the rows of a prompt are only evaluated, in every stage; for data sets without a test split."""
    return hashed(prompt, "held out", preferences.HOLD_OUT_SEED) < preferences.HOLD_OUT


def hashed(prompt: int, *salt: object) -> float:
    """A number in [0, 1) that depends on the prompt and the salt alone."""
    digest = hashlib.blake2b(repr((prompt, *salt)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little") / 2**56


def open_stream(entry: str, weight: float | None, *, cache_dir: str | None, flag: str, form: Form) -> StreamedSet:
    """Finds the shape of a data set, and the rows to evaluate: the first of the test split, else of the held-out ones.

    Raises:
        UserError: Nothing there, unreadable first rows, columns of no known shape, or no row to evaluate.
    """
    shards = read_splits(entry, cache_dir, flag, streaming=True)
    first = shards["train"][0]
    _, raw = zip(*islice(raw_rows(first, flag), TOGETHER), strict=True)
    try:
        columns = dict.fromkeys(chain.from_iterable(raw))
        sample = Dataset.from_list([{**columns, **row} for row in raw])
    except READ_ERRORS as error:
        check_numbers(first, raw[0], flag)
        problem = first_bad_row(first.file) if first.file else None
        raise UserError(f"{flag}: {first.place}, {problem or first_line(error)}") from error
    shard = preferences.rename(replace(first, rows=sample), form.columns, flag)
    conversion = preferences.choose_conversion(entry, shard, flag, form)
    conversion = replace(conversion, kept=preferences.kept_columns(form, shard.table.column_names))
    stream = StreamedSet(entry, flag, weight, shards, shard.table.column_names, conversion, flag != "--data_path")
    held_out = held_out_rows(stream)
    print0(f"{flag} {entry}: {conversion.shape}; streamed, {len(held_out)} rows to evaluate")
    return replace(stream, held_out=held_out)


def held_out_rows(stream: StreamedSet) -> Dataset:
    """The first rows that nothing is trained on; what was dropped among a test split's is reported."""
    counts, own = Counts(), "test" in stream.shards
    rows = stream.texts("test" if own else "train", counts)
    chosen = list(islice((row for row in rows if own or is_held_out(row["asked"])), HELD_OUT_ROWS))
    where = "its test split has no usable row" if own else f"none of its {counts.read} rows falls to it by chance"
    if not chosen:
        raise UserError(f"{stream.flag}: {stream.name} has no row for evaluation: {where}; give it a test split")
    if own:
        report_dropped(f"{stream.flag} {stream.name} (test)", counts.dropped, counts.read)
    return as_data_set(chosen)


def as_data_set(rows: Sequence[Row]) -> Dataset:
    """Rows in memory, with the columns of TEXT and ABOUT and those that are kept."""
    kept = [name for name in rows[0] if name.startswith(KEPT)]
    features = Features({**TEXT, **ABOUT, **dict.fromkeys(kept, Value("string"))})
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)
