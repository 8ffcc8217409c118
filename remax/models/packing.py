"""The rows of a micro-batch one behind the other: the same numbers without padding.

A padded batch has as many token slots as rows times longest row, and the model computes all of them. Here the rows are
joined to a single one just before the model reads them, and what is needed of its hidden states is looked up at the new
places. Loader, loss and everything between stay as they are, so loss and gradient are those of the padded batch but
for rounding (and for the draws of dropout).

Positions count from zero in every piece, and a token attends to its own piece alone. With `sdpa` each piece is
attended to by itself (`attend_in_pieces`), so no mask is needed, causal kernels serve, and no work is done between
pieces. With `flash_attention_2` transformers finds the pieces from the positions. Not with `eager`: it needs a mask
over the whole row, and not every family's masks keep the pieces of one apart (OPT's do not).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from remax.core.sequences import Sequences, places
from utils.run import UserError

IN_PIECES = "sdpa_in_pieces"  # transformers makes no mask for an attention that it has no mask function for
LAYERS = {"full_attention", "sliding_attention"}


class Reader(Protocol):
    """`PolicyModel` or `RewardModel`."""

    hf: PreTrainedModel
    packing: bool


def attend_in_pieces(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    piece_lengths: tuple[int, ...],
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each of the pieces that the only row consists of: an attention of transformers.

    Args:
        query: (1, heads, N, D); key and value are (1, key heads, N, D).
        attention_mask: None; transformers makes no mask for this attention.
        piece_lengths: Tokens of each piece; they add up to N.
        sliding_window: How many tokens a token sees, itself included.

    Returns:
        (1, N, heads, D), and no attention weights.
    """
    parts, longest = [], max(piece_lengths)
    for q, k, v in zip(*(x.split(piece_lengths, dim=2) for x in (query, key, value)), strict=True):
        mask, length = None, q.shape[2]
        if sliding_window is not None and length > sliding_window:
            mask = band(longest, sliding_window, q.device)[..., :length, :length]
        parts.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(parts, 1), None


@functools.lru_cache(maxsize=1)  # one mask for all pieces and layers of a batch: each would keep its own for backward
def band(length: int, window: int, device: torch.device) -> Tensor:
    """(1, 1, length, length) bool: True where token i sees token j, i - window < j <= i."""
    column = torch.arange(length, device=device)
    row = column[:, None]
    return ((column <= row) & (column > row - window))[None, None]  # no (length, length) of wider numbers


AttentionInterface.register(IN_PIECES, attend_in_pieces)


def prepare_packing(hf: PreTrainedModel) -> None:
    """Gives the model an attention that keeps pieces apart.

    Raises:
        UserError: It can have none, as far as its type tells; `remax.checks.packing` proves it on its numbers.
    """
    config, forward = hf.config, inspect.signature(hf.base_model.forward).parameters
    refusal = f"--packing: cannot be used with models of the type {config.model_type!r}"
    if (attention := config._attn_implementation) not in ("sdpa", "flash_attention_2"):
        raise UserError(f"{refusal} and {attention} attention; leave the flag out, or set --attn_implementation sdpa")
    if "position_ids" not in forward or not any(p.kind is p.VAR_KEYWORD for p in forward.values()):
        raise UserError(f"{refusal}, which take no positions; leave the flag out")
    if not set(getattr(config.get_text_config(), "layer_types", None) or ()) <= LAYERS:
        raise UserError(f"{refusal}, which have layers without attention over all of a row; leave the flag out")
    if attention == "sdpa":
        hf.set_attn_implementation(IN_PIECES)
        if config._attn_implementation != IN_PIECES:
            raise UserError(f"{refusal}, whose attention cannot be exchanged; leave the flag out")


@contextlib.contextmanager
def unpacked(model: Reader) -> Iterator[None]:
    """Inside, a packing model reads padded batches with the attention that transformers gave it."""
    implementation = model.hf.config._attn_implementation
    model.packing = False
    model.hf.set_attn_implementation("sdpa" if implementation == IN_PIECES else implementation)
    try:
        yield
    finally:
        model.packing = True
        model.hf.set_attn_implementation(implementation)


@dataclass(frozen=True)
class Packed:
    """The rows of a batch joined to one, without padding."""

    input_ids: Tensor  # (1, N)
    position_ids: Tensor  # (1, N), from zero in each piece
    start: Tensor  # (B,) column of each piece's first token
    lengths: Tensor  # (B,) tokens of each piece, N in all

    @classmethod
    def join(cls, sequences: Sequences) -> Packed:
        lengths = sequences.lengths
        rows, positions = places(lengths, sequences.tokens)  # (N,)
        ids = sequences.input_ids[rows, positions]
        return cls(ids[None], positions[None], lengths.cumsum(0) - lengths, lengths)

    def at(self, values: Tensor, columns: Tensor) -> Tensor:
        """(1, N, ...) values of the tokens -> those at some columns of the pieces.

        They are (B, ...) for columns (B,) and (B, A, ...) for columns (B, A). Beyond the end of a piece, the values of
        its last token are repeated.
        """
        tail = (slice(None), *[None] * (columns.dim() - 1))
        return values[0, self.start[tail] + torch.minimum(columns, self.lengths[tail] - 1)]


def last_hidden(hf: PreTrainedModel, sequences: Sequences, columns: Tensor, packing: bool) -> Tensor:
    """The backbone's last hidden states at some columns of the rows: (B, H) for columns (B,), (B, A, H) for (B, A)."""
    if not packing:  # no attention mask: see `sequences`
        states = hf.base_model(input_ids=sequences.input_ids, use_cache=False).last_hidden_state  # (B, T, H)
        return sequences.at(states, columns)
    packed = Packed.join(sequences)
    pieces: dict[str, Any] = {"position_ids": packed.position_ids}
    if hf.config._attn_implementation == IN_PIECES:
        pieces["piece_lengths"] = tuple(map(sum, zip(*sequences.counts, strict=True)))
    states = hf.base_model(input_ids=packed.input_ids, use_cache=False, **pieces).last_hidden_state  # (1, N, H)
    return packed.at(states, columns)


def token_slots(sequences: Sequences, packing: bool) -> int:
    """Tokens that `last_hidden` has the model compute, padding included."""
    return sequences.tokens if packing else sequences.input_ids.numel()
