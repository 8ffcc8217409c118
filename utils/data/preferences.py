"""Data sets as prompt, chosen, rejected, margin: read, converted, repeated rows dropped, some held out.

The shape is found from the columns (`shapes`); data sets known by name have a function of their own (`adapters`).
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value

from utils.data.adapters import ADAPTERS, fits, known_name
from utils.data.cache import cache_file, cache_folder, content_key, fingerprint_of
from utils.data.chat import write_plain
from utils.data.names import parse_name
from utils.data.report import as_record, as_words, report_dropped, tally
from utils.data.shapes import PLAIN, Conversation, Example, Form, Row, RowRefused, RowSkipped, find_shape, finish
from utils.data.sources import SHAPES, Shard, check_numbers, converted_on_reading, read_splits, row_name, undecodable
from utils.data.splits import prompt_key, prompt_keys
from utils.distributed import print0
from utils.present import present
from utils.run import UserError

HOLD_OUT = 0.05
REPEATS = "that repeat an earlier row"  # why such a row is dropped
HOLD_OUT_SEED = 1234
# answers, ranks: of rows with several ranked answers, see `Example`.
TEXT = Features(
    {name: Value("string") for name in ("prompt", "chosen", "rejected")}
    | {"margin": Value("float64"), "answers": List(Value("string")), "ranks": List(Value("int32"))}
)
# earlier: places of earlier answers in the prompt; origin: what messages call the row.
ABOUT = Features({"earlier": List(List(Value("int32"))), "origin": Value("string")})
NORMALISED = Features({**TEXT, **ABOUT, "key": Value("int64"), "skipped": Value("string")})
KEPT = "column "  # what precedes the names of columns that are kept as they are, each value as JSON
READING_VERSION = 2  # of what these columns hold: to be raised with every change, see tests/utils/data/test_golden.py


def load_data_set(
    name: str,
    *,
    cache_dir: str | None,
    num_proc: int | None = None,
    flag: str = "--data_path",
    announce: bool = True,
    form: Form = PLAIN,
    record: list[dict] | None = None,
) -> tuple[Dataset, Dataset]:
    """One data set as (train, eval), from a file, a folder or the hub, with the columns of TEXT and ABOUT.

    The columns that `form` keeps come with them, see `KEPT`.

    eval is the data set's own test split. A data set without one gives up a seeded 5 % of its rows (at least one),
    where possible whole prompts, so that no held-out prompt is trained on with another answer.

    Args:
        name: A file, a folder or a hub name, see `utils.data.names.parse_name`.
        cache_dir: Where the Arrow files go; None: the datasets library's own folder.
        announce: Print what was found and dropped; False where the same data set was announced before.
        record: Gets an entry for each split: how many rows were read and dropped.

    Raises:
        UserError: Nothing there, an unreadable file, columns of no known shape, a wrong value, a split without rows.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    cache_folder(cache_dir)  # a cache that cannot be written is refused before anything is read
    shards_of = read_splits(name, cache_dir, flag)
    splits = {}
    try:
        shards_of = {split: [rename(s, form.columns, flag) for s in shards] for split, shards in shards_of.items()}
        conversion = choose_conversion(name, shards_of["train"][0], flag, form)
        columns = chain.from_iterable(shard.table.column_names for shards in shards_of.values() for shard in shards)
        conversion = replace(conversion, kept=kept_columns(form, columns))
        for split, shards in shards_of.items():
            labelled = [replace(s, label=f"{s.file.name} " if s.file and len(shards) > 1 else "") for s in shards]
            joined = datasets.concatenate_datasets([normalise(s, conversion, cache_dir, num_proc) for s in labelled])
            splits[split], counts = drop_skipped(joined, name, split, flag, announce)
            if record is not None:
                record.append({"data": f"{flag} {name}", "split": split, "shape": conversion.shape, **counts})
    except UnicodeDecodeError as error:  # Arrow keeps such bytes, and fails when they become text
        raise UserError(f"{flag}: {undecodable(shards_of, name)}") from error
    train, evaluation = (splits["train"], splits["test"]) if "test" in splits else hold_out(splits["train"], name, flag)
    if announce:
        print0(f"{flag} {name}: {conversion.shape}; {len(train)} training rows, {len(evaluation)} to evaluate")
    return train, evaluation


def rename(shard: Shard, columns: Mapping[str, str], flag: str) -> Shard:
    """The shard with the user's columns under the names that shapes are made of."""
    rows = shard.table
    for ours, theirs in columns.items():
        if theirs not in rows.column_names:
            found = ", ".join(rows.column_names)
            raise UserError(f"--{ours}_column {theirs}: {shard.place} ({flag}) has no such column; it has {found}")
    taken = [ours for ours in columns if ours in rows.column_names and ours not in columns.values()]
    rows = rows.remove_columns(taken).rename_columns({theirs: ours for ours, theirs in columns.items()})
    return replace(shard, rows=rows)


@dataclass(frozen=True)
class Conversion:
    """How the rows of one data set become text."""

    shape: str  # what its rows look like, in words
    convert: Callable[[Row], Example | Conversation]
    form: Form  # without the template where no column holds lists of messages
    flag: str  # the flag that errors name
    kept: Mapping[str, str] = field(default_factory=dict)  # see `kept_columns`


def kept_columns(form: Form, columns: Iterable[str]) -> dict[str, str]:
    """Of these columns those that are kept: the name under which their values are, and their name here.

    They are kept under the names that the data has, also where a flag renames them.
    """
    own = {form.columns.get(name, name): name for name in columns}
    return {KEPT + theirs: ours for theirs, ours in own.items() if {"*", theirs} & form.keep}


def choose_conversion(name: str, shard: Shard, flag: str, form: Form) -> Conversion:
    """The conversion of a data set, found from its first file."""
    lists = ("prompt", "chosen", "rejected", "completion", "messages", "conversations")
    found_lists = {column: kind for column in lists if isinstance(kind := shard.table.features.get(column), List)}
    of_messages = any(kind.feature != Value("string") for kind in found_lists.values())
    answers = shard.table.features.get("answers")
    of_messages |= isinstance(answers, List) and isinstance(answers.feature, List)
    how = f"written by the {'chat template' if form.template else 'Human/Assistant convention'}"
    known = None if form.columns else known_name(parse_name(name, flag).name)
    if known and (parse_name(name, flag).name == known or fits(ADAPTERS[known], shard.table[0])):
        return Conversion(f"{known}, {how}" if of_messages else known, ADAPTERS[known], form, flag)
    shape, convert = find_shape(shard.table.column_names)
    if convert is None:
        found = ", ".join(shard.table.column_names)
        raise UserError(
            f"{flag}: {shard.place} has the columns {found}; expected {SHAPES}: rename the columns, or name them with "
            "--prompt_column, --chosen_column and --rejected_column"
        )
    written = of_messages or shape.startswith("instruction")
    if {"chosen", "rejected"} <= found_lists.keys() and not of_messages:
        shape += ", several of each"
    if of_messages and shape not in ("messages", "conversations"):
        shape += " of messages"
    if shape.startswith("prompt"):
        bare = prompts_are_bare(shard.table)
        convert = partial(convert, bare=bare)
        shape += f", bare prompts {how}" if bare else ""
        written |= bare
    shape += f", {how}" if written and "bare prompts" not in shape else ""
    if not written:
        form = replace(form, template=None)  # nothing for it to write
    if "answers" in shard.table.column_names and "chosen/rejected" in shape:
        shape += "; the column answers is not read (to learn from it, leave out chosen and rejected)"
    return Conversion(shape, convert, form, flag)


def prompts_are_bare(rows: Dataset, first: int = 1000) -> bool:
    """Whether text prompts are plain questions.

    Prompts written in a template all end alike ("Assistant:", "### Response:", "[/INST]"); plain questions do not.
    """
    prompts = [value for value in rows[: min(first, len(rows))]["prompt"] if isinstance(value, str)]
    written = sum(prompt.rstrip().endswith("Assistant:") for prompt in prompts)
    if not prompts or 2 * written >= len(prompts):
        return False
    cue = os.path.commonprefix([prompt[::-1] for prompt in prompts])[::-1].rstrip(" ")
    return len(prompts) == 1 or len(cue) < 2 or cue[-1] not in ":]>|\n"


def normalise(shard: Shard, conversion: Conversion, cache_dir: str | None, num_proc: int | None) -> Dataset:
    """The shard's rows with the columns of NORMALISED and those that are kept; cached."""
    template, kept = conversion.form.template, conversion.kept
    made_by = (READING_VERSION, conversion.shape, template.state() if template else None)
    fingerprint = fingerprint_of(shard.table._fingerprint, *made_by, shard.label, *([dict(kept)] if kept else []))
    return shard.table.map(
        partial(normalise_batch, conversion=conversion, shard=replace(shard, rows=None)),
        batched=True,
        with_indices=True,
        remove_columns=shard.table.column_names,
        features=Features({**NORMALISED, **dict.fromkeys(kept, Value("string"))}),
        num_proc=num_proc if num_proc and len(shard.table) > 10_000 else None,
        new_fingerprint=fingerprint,
        cache_file_name=cache_file(cache_dir, "rows", fingerprint),
        desc="Reading rows",
    )


def normalise_batch(
    batch: dict[str, list], indices: list[int], *, conversion: Conversion, shard: Shard
) -> dict[str, list]:
    """Rows of any shape, at these indices of their shard -> columns of NORMALISED and those that are kept."""
    if conversion.shape.startswith("prompt/answers"):
        check_numbers(shard, batch, conversion.flag)
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    texts = normalise_rows(rows, [row_name(shard.file, i) for i in indices], conversion, shard, indices)
    return {name: [row[name] for row in texts] for name in (*NORMALISED, *conversion.kept)}


def normalise_rows(
    rows: Iterable[Row], names: Sequence[str], conversion: Conversion, shard: Shard, stored_at: Sequence[int] = ()
) -> list[Row]:
    """Rows of any shape with the columns of NORMALISED, those that are kept, and `asked`.

    `asked` is a number that rows of the same prompt share, whatever the chat template.

    Args:
        names: What messages call each row.
        stored_at: The rows' indices in the shard, where its reader may have changed values.
    """
    flag = conversion.flag
    found: list[Row] = []
    for k, row in enumerate(rows):
        reason = None
        try:
            converted = conversion.convert(row)
            example = finish(converted, conversion.form.template)
            # Before any template, since the models of the stages may have different ones.
            prompt = write_plain(converted.messages)[0] if isinstance(converted, Conversation) else converted.prompt
            asked = prompt_key(prompt, converted.chosen)
        except RowSkipped as skipped:
            example, asked, reason = Example("", None, None), 0, str(skipped)
        except RowRefused as refused:
            column, problem = refused.args
            where = converted_on_reading(shard.file, stored_at[k], column) if stored_at else None
            where = where or f"{names[k]}, column {column!r}: {problem}"
            raise UserError(f"{flag}: {shard.place}, {where}") from None
        except KeyError as missing:
            raise UserError(f"{flag}: {shard.place} has no column {missing}; it has {', '.join(row)}") from None
        except (TypeError, ValueError, AttributeError, IndexError) as error:  # an adapter relies on its data set
            what = f"is not like the rows of this data set ({type(error).__name__}: {error})"
            raise UserError(f"{flag}: {shard.place}, {names[k]} {what}") from error
        earlier = None if example.earlier is None else [list(span) for span in example.earlier]
        kept = {name: json.dumps(row.get(ours), default=str) for name, ours in conversion.kept.items()}
        about = {"earlier": earlier, "origin": shard.label + names[k], "key": row_key(example, kept.values())}
        texts = {name: getattr(example, name) for name in TEXT}
        found.append({**texts, **about, "skipped": reason, "asked": asked, **kept})
    return found


def row_key(example: Example, kept: Iterable[str] = ()) -> int:
    """A number that rows of equal texts share, with all their ranked answers; the order of ties does not matter.

    Of rows with further columns that are kept, only those with equal values there share it.
    """
    if example.answers is None:
        return content_key(example.prompt, example.chosen, example.rejected, *kept)
    ranking = sorted(zip(present(example.ranks, "the ranks of several answers"), example.answers, strict=True))
    return content_key(example.prompt, *(text for rank, answer in ranking for text in (str(rank), answer)), *kept)


def drop_skipped(rows: Dataset, name: str, split: str, flag: str, announce: bool) -> tuple[Dataset, dict[str, Any]]:
    """Leaves out the rows that carry a reason and those that repeat an earlier one, and reports them.

    Returns:
        The rows that are kept, and the counts for data.json.
    """
    table = rows.with_format("arrow")
    reasons = table["skipped"][:].to_pylist()
    keys = np.asarray(table["key"][:])
    _, first = np.unique(keys, return_index=True)
    for i in np.setdiff1d(np.arange(len(rows)), first):
        reasons[i] = reasons[i] or REPEATS
    kept = np.flatnonzero([reason is None for reason in reasons])
    dropped = tally(reasons, rows)
    if announce:
        report_dropped(f"{flag} {name} ({split})", dropped, len(rows))
    if not len(kept):
        raise UserError(f"{flag}: the {split} split of {name} has no usable row: {as_words(dropped)}")
    counts = {"fingerprint": fingerprint_of(keys[kept].tobytes()), "rows": len(rows), "kept": len(kept)}
    used = rows if len(kept) == len(rows) else rows.select(kept)
    return used.remove_columns(["key", "skipped"]), {**counts, "dropped": as_record(dropped)}


def hold_out(rows: Dataset, name: str, flag: str) -> tuple[Dataset, Dataset]:
    """(train, eval): a seeded 5 % of the rows, at least one, is held out; by whole prompts where that is possible."""
    n = len(rows)
    if n < 2:
        raise UserError(f"{flag}: {name} has one row; expected at least two, since one is held out for evaluation")
    target = max(1, round(HOLD_OUT * n))
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompt_keys(rows)):
        groups.setdefault(prompt, []).append(i)
    order = np.random.RandomState(HOLD_OUT_SEED)  # the same stream in every numpy version
    held: list[int] = []
    prompts = list(groups.values())
    for k in order.permutation(len(prompts)):
        if len(held) + len(prompts[k]) <= target:
            held += prompts[k]
    if not held:  # every prompt has more than 5 % of the rows
        held = order.permutation(n)[:target].tolist()
    return rows.select(np.setdiff1d(np.arange(n), held)), rows.select(np.sort(held))
