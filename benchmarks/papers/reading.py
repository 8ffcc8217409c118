"""What other benchmarks have left in docs/results, read from their documents."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from measuring import ROOT

Table = list[list[str]]  # the head, then the rows


@cache
def tables(document: str) -> list[Table]:
    """Of a Markdown file, by its path in the repository."""
    found: list[Table] = []
    before = ""
    for line in Path(ROOT / document).read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and not re.fullmatch(r"[|:\- ]+", line):
            if not before.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
        before = line
    return found


def cell(document: str, column: str, **where: str) -> str:
    """Of the first table that has the column, in the row whose cells in the columns `where` are as given.

    Args:
        where: Columns by name, with underscores for blanks.

    Raises:
        LookupError: There is none: the document has changed, and what reads it has to follow.
    """
    wanted = {name.replace("_", " "): value for name, value in where.items()}
    for head, *rows in tables(document):
        if column in head and wanted.keys() <= set(head):
            for row in rows:
                if all(row[head.index(name)] == value for name, value in wanted.items()):
                    return row[head.index(column)]
    raise LookupError(f"{document}: no table has a column {column!r} and a row with {wanted}")


def told(document: str, column: str, **where: str) -> str:
    """As `cell`, but empty where there is none: what is not measured yet."""
    try:
        return cell(document, column, **where)
    except LookupError:
        return ""


def number(text: str) -> float:
    """The first number in a cell."""
    found = re.search(r"-?\d[\d,]*\.?\d*", text)
    if found is None:
        raise LookupError(f"no number in {text!r}")
    return float(found[0].replace(",", ""))


def command(document: str, holds: str = "") -> str:
    """The first command in a document, or the first that holds a text."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for line in text.splitlines():
        if re.match(r" {4}\S", line) and holds in line and re.match(r" +(taskset -c 0 )?(python|make) ", line):
            return line.strip().removesuffix("(in an earlier form)").strip()
    raise LookupError(f"{document}: holds no command with {holds!r}")
