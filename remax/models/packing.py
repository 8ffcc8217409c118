"""The rows of a micro-batch one behind the other: the same numbers without padding.

A padded batch has as many token slots as rows times longest row, and the model computes all of them. Here the rows are
joined to a single one just before the model reads them, and what is needed of its hidden states is looked up at the new
places. Loader, loss and everything between stay as they are, so loss and gradient are those of the padded batch but
for rounding (and for the draws of dropout).

Positions count from zero in every row, and a token attends to its own row alone. With `sdpa` each piece is attended to
by itself (`attend_in_pieces`), so no mask over the whole is needed, causal kernels serve, and no work is done between
rows. With `flash_attention_2` transformers finds the rows from the positions. Not with `eager`: it needs a mask over
the whole, and not every family's masks keep the rows of one apart (OPT's do not).

With `sdpa`, answers to one prompt also share it: [prompt | answer | answer ...]. The prompt's tokens are computed once;
an answer's tokens go on from the prompt's last position and attend to the prompt and to their own answer. What a causal
model makes of the prompt does not depend on what follows, so the numbers are the same again, and gradients add up.
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
from utils.distributed import device
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
    pieces: tuple[tuple[int, ...], ...],
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each of the rows that the only row consists of: an attention of transformers.

    Args:
        query: (1, heads, N, D); key and value are (1, key heads, N, D).
        attention_mask: None; transformers makes no mask for this attention.
        pieces: Tokens of a row; or those of a prompt, then of each of its answers. All together they add up to N.
        sliding_window: How many tokens a token sees, itself included.

    Returns:
        (1, N, heads, D), and no attention weights.
    """
    longest = max(first + max(rest, default=0) for first, *rest in pieces)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask, length, before = None, k.shape[2], k.shape[2] - q.shape[2]
        if before or (sliding_window is not None and length > sliding_window):
            mask = band(longest, sliding_window or longest, q.device)[..., before:length, :length]
        return sdpa_attention_forward(module, q, k, v, mask, **options)[0]

    lengths = [length for prompt, *answers in pieces for length in (prompt + sum(answers[:1]), *answers[1:])]
    split = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    parts = []
    for prompt, *answers in pieces:
        first = next(split)  # the prompt and its first answer, as in a row of their own
        parts.append(attend(*first))
        for _ in answers[1:]:
            q, *own = next(split)
            parts.append(attend(q, *(torch.cat([x[:, :, :prompt], y], 2) for x, y in zip(first[1:], own, strict=True))))
    return torch.cat(parts, 1), None


@functools.lru_cache(maxsize=2)  # one mask for all pieces and layers of a batch, with a window and without
def band(length: int, window: int, device: torch.device) -> Tensor:
    """(1, 1, length, length) bool: True where token i sees token j, i - window < j <= i."""
    column = torch.arange(length, device=device)
    row = column[:, None]
    return ((column <= row) & (column > row - window))[None, None]  # no (length, length) of wider numbers


AttentionInterface.register(IN_PIECES, attend_in_pieces)


def pays(hf: PreTrainedModel) -> bool:
    """Whether packing is likely to be faster: on a GPU a launch for each piece and layer may cost more than padding."""
    return device().type == "cpu" or hf.config._attn_implementation == "flash_attention_2"


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
    if not model.packing:
        yield
        return
    implementation = model.hf.config._attn_implementation
    model.packing = False
    model.hf.set_attn_implementation("sdpa" if implementation == IN_PIECES else implementation)
    try:
        yield
    finally:
        model.packing = True
        model.hf.set_attn_implementation(implementation)


def shares_prompts(model: Reader) -> bool:
    """Whether answers to one prompt that the model reads in one forward have it computed once."""
    return model.packing and model.hf.config._attn_implementation == IN_PIECES


@dataclass(frozen=True)
class Packed:
    """The rows of a batch joined to one, without padding.

    Attributes:
        input_ids: (1, N).
        position_ids: (1, N), from zero in each row.
        prompt_start: (B,) column of each prompt's first token.
        answer_start: (B,) column of each answer's first token.
        prompt_lengths: (B,) tokens of each prompt.
        lengths: (B,) tokens of each row.
        pieces: See `attend_in_pieces`.
    """

    input_ids: Tensor
    position_ids: Tensor
    prompt_start: Tensor
    answer_start: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    pieces: tuple[tuple[int, ...], ...]

    @classmethod
    def join(cls, sequences: Sequences, share: bool = False) -> Packed:
        """The rows in order; with `share` each answer behind those before it that have the same prompt."""
        prompts, answers = sequences.prompt_lengths, sequences.answer_lengths  # (B,)
        own = torch.arange(len(sequences), device=prompts.device)
        first, rows = own, {i: [i] for i in range(len(sequences))}  # rows by the first with their prompt
        if share and len(rows := sequences.rows_of_prompts) < len(sequences):
            first = torch.tensor(sequences.first_rows, device=prompts.device)
        order = first.argsort(stable=True)  # (B,)
        skipped = prompts * (first != own)  # (B,) tokens that are there already
        added = (prompts + answers - skipped)[order]
        counts = list(zip(*sequences.counts, strict=True))
        pieces = tuple(
            (counts[i][0], *(counts[j][1] for j in same if counts[j][1])) if len(same) > 1 else (sum(counts[i]),)
            for i, same in rows.items()
        )
        begin = torch.empty_like(own).scatter_(0, order, added.cumsum(0) - added)
        place, offset = places(added, sum(map(sum, pieces)))  # (N,)
        row = order[place]
        column = offset + skipped[row]
        return cls(
            sequences.input_ids[row, column][None],
            column[None],
            begin[first],
            begin + prompts - skipped,
            prompts,
            sequences.lengths,
            pieces,
        )

    def at(self, values: Tensor, columns: Tensor) -> Tensor:
        """(1, N, ...) values of the tokens -> those at some columns of the rows.

        They are (B, ...) for columns (B,) and (B, A, ...) for columns (B, A). Beyond the end of a row, the values of
        its last token are repeated.
        """
        tail = (slice(None), *[None] * (columns.dim() - 1))
        columns = torch.minimum(columns, self.lengths[tail] - 1)
        before = self.prompt_lengths[tail]
        in_answer = self.answer_start[tail] - before + columns
        return values[0, torch.where(columns < before, self.prompt_start[tail] + columns, in_answer)]


def last_hidden(hf: PreTrainedModel, sequences: Sequences, columns: Tensor, packing: bool) -> Tensor:
    """The backbone's last hidden states at some columns of the rows: (B, H) for columns (B,), (B, A, H) for (B, A)."""
    if not packing:  # no attention mask: see `sequences`
        states = hf.base_model(input_ids=sequences.input_ids, use_cache=False).last_hidden_state  # (B, T, H)
        return sequences.at(states, columns)
    in_pieces = hf.config._attn_implementation == IN_PIECES
    packed = Packed.join(sequences, share=in_pieces)
    options: dict[str, Any] = {"position_ids": packed.position_ids}
    if in_pieces:
        options["pieces"] = packed.pieces
    states = hf.base_model(input_ids=packed.input_ids, use_cache=False, **options).last_hidden_state  # (1, N, H)
    return packed.at(states, columns)


def token_slots(sequences: Sequences, packing: bool) -> int:
    """Token slots of the rows as `last_hidden` has the model compute them, padding included.

    A prompt that rows share counts for each of them.
    """
    return sequences.tokens if packing else sequences.input_ids.numel()
