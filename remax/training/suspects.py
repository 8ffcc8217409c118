"""Which rows a step that is no longer finite has them from: named by rank, number and first words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from remax.core.sequences import Sequences
from remax.rewards.composite import beginning
from utils.distributed import gather_objects

NAMED = 3  # rows, at most, of each rank, and ranks
Decode = Callable[[list[int]], str | list[str]]  # of a tokenizer
Part = tuple[Sequences, Mapping[str, Tensor | None]]


def suspects(parts: Sequence[Part], decode: Decode) -> str:
    """Words for what is not finite among the values of a step's rows. Every rank must call it.

    Args:
        parts: Rows with their values by name: (B,) or (B, A), of each row, or (), of all of them together.
        decode: Token ids as text.

    Returns:
        "" where every value of every rank is finite.
    """
    here = list(_named(parts, decode))
    found = [(number, words) for number, words in enumerate(gather_objects(here[:NAMED])) if words]
    more = sum(gather_objects(len(here))) - sum(len(words) for _, words in found[:NAMED])
    shown = [f"on rank {number} {' and '.join(words)}" for number, words in found[:NAMED]]
    return f"Not finite: {'; '.join(shown)}{f', and {more} more' if more else ''}" if shown else ""


def _named(parts: Sequence[Part], decode: Decode) -> Iterator[str]:
    for sequences, values in parts:
        for name, value in values.items():
            if value is None or (finite := value.isfinite()).all():
                continue
            if value.dim():
                for row in (~finite.flatten(1).all(1) if value.dim() > 1 else ~finite).nonzero().flatten().tolist():
                    yield f"the {name} of row {row + 1}, {_begin(sequences, row, decode)}"
            else:
                rows = "a row," if len(sequences) == 1 else f"{len(sequences)} rows, the first of which is"
                yield f"the {name} of {rows} {_begin(sequences, 0, decode)}"


def _begin(sequences: Sequences, row: int, decode: Decode) -> str:
    return beginning(str(decode(sequences.input_ids[row, : sequences.prompt_lengths[row]].tolist())))
