"""What was left out and why: counted by reason, with the names of the first rows, for people and for data.json."""

from collections.abc import Iterable

from datasets import Dataset

from utils.distributed import print0

SHOWN_ROWS = 3
Dropped = dict[str, tuple[int, list[str]]]  # {reason: (rows, names of the first few)}


def tally(reasons: Iterable[str | None], rows: Dataset) -> Dropped:
    """The rows that have a reason, by reason, with the names of the first few where `rows` know their origin."""
    found: dict[str, list[int]] = {}
    for i, reason in enumerate(reasons):
        if reason is not None:
            found.setdefault(reason, []).append(i)
    named = "origin" in rows.column_names
    return {
        reason: (len(found[reason]), rows[found[reason][:SHOWN_ROWS]]["origin"] if named else [])
        for reason in sorted(found)
    }


def count_dropped(dropped: Dropped, reason: str, name: str) -> None:
    count, names = dropped.get(reason, (0, []))
    dropped[reason] = (count + 1, [*names, name][:SHOWN_ROWS])


def as_record(dropped: Dropped) -> dict[str, dict]:
    """For data.json."""
    return {reason: {"rows": count, "first": names} for reason, (count, names) in dropped.items()}


def as_words(dropped: Dropped) -> str:
    """For people: "2 with equal answers (line 3, line 8); 1 with an empty prompt (line 5)"."""
    return "; ".join(f"{count} {reason}{listing(count, names)}" for reason, (count, names) in dropped.items())


def listing(count: int, names: list[str]) -> str:
    """Names in brackets after a space, (line 3, line 8, ...), or nothing without names."""
    return f" ({', '.join(names)}{', ...' if count > len(names) else ''})" if names else ""


def report_dropped(what: str, dropped: Dropped, total: int) -> None:
    """One line for all dropped rows; none where nothing was dropped."""
    if dropped:
        print0(f"{what}: {sum(count for count, _ in dropped.values())} of {total} rows dropped: {as_words(dropped)}")


def report_cut(
    limit: str, what: str, prompts: tuple[int, list[str]], answers: tuple[int, list[str]], longest: int, total: int
) -> None:
    """A line for the rows whose prompts were cut, and one for those whose answers were; none where none was.

    `prompts` and `answers` are how many were cut, and the names of the first rows; `limit` is the flag and its value,
    `longest` the tokens of the longest prompt, and `total` the number of rows, cut or not.
    """
    for (count, names), how in (
        (prompts, f"longer prompts, up to {longest} tokens, keep their end"),
        (answers, "longer answers are cut, and without an end token"),
    ):
        if count:
            print0(f"{limit}: {count} of {total} rows of {what} are too long: {how}{listing(count, names)}")


def report_left_out(what: str, answers: int, rows: tuple[int, list[str]]) -> None:
    """One line for the answers that rows with several lack; none where no row lacks one.

    `rows` are how many rows lack some of their answers, and the names of the first.
    """
    count, names = rows
    if count:
        print0(
            f"{what}: {answers} answers of {count} rows left out: empty, or equal to another answer of the "
            f"row{listing(count, names)}"
        )
