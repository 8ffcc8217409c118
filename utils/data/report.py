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


def report_encoding(
    what: str, limit: str, cut: Dropped, answers_left_out: int, longest_prompt: int, total: int
) -> None:
    """Lines for the used rows that lost something, of `total` rows: a cut prompt or answer, or some of their answers.

    `cut` counts such rows under the encoder's names "prompt_cut", "cut" and "left_out"; `limit` is the flag of the
    length and its value.
    """
    for fate, how in (
        ("prompt_cut", f"longer prompts, up to {longest_prompt} tokens, keep their end"),
        ("cut", "longer answers are cut, and without an end token"),
    ):
        count, names = cut.get(fate, (0, []))
        if count:
            print0(f"{limit}: {count} of {total} rows of {what} are too long: {how}{listing(count, names)}")
    count, names = cut.get("left_out", (0, []))
    if count:
        why = f"empty, or equal to another answer of the row{listing(count, names)}"
        print0(f"{what}: {answers_left_out} answers of {count} rows left out: {why}")


def cut_record(kind: str, cut: Dropped, answers_left_out: int) -> dict[str, int]:
    """Of the same rows, for data.json."""
    counts = {
        f"cut_{what}": cut.get(fate, (0, []))[0] for what, fate in (("prompts", "prompt_cut"), ("answers", "cut"))
    }
    return counts | ({"answers_left_out": answers_left_out} if kind == "ranked" else {})
