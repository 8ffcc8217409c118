"""Whether a packing model keeps its rows apart."""

from __future__ import annotations

import torch

from remax.core.sequences import Sequences
from remax.engines.base import TrainedEngine
from remax.models.loading import embedded_tokens, evaluating
from remax.models.packing import unpacked
from utils.distributed import device
from utils.run import UserError

RELATIVE_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 3e-2}  # of two ways to compute the same values


@torch.no_grad()
def check_packing(engine: TrainedEngine, max_len: int, **read: bool) -> None:
    """Refuses a packing model that does not keep its rows apart. Every rank must call it: parameters may be spread.

    Four rows, one longer than the sliding window if training has such, are read padded by transformers' own attention
    and packed; what comes out must agree as well as the number format allows. A model that leaks differs by as much as
    its context matters to a token.

    Args:
        max_len: Tokens of the longest row in training.
        **read: What makes the model's forward return a value for every answer token.

    Raises:
        UserError: Names the flag and the model's type.
    """
    model, hf = engine.model, engine.model.hf
    window = getattr(hf.config.get_text_config(), "sliding_window", None) or max_len
    # The last token of a row predicts nothing, and the one before it must lie beyond its window's first.
    longest = window + 2 if window < max_len else min(7, max_len)
    lengths = torch.tensor([longest, 3, 5, 2], device=device()).clamp(max=longest)
    ids = 7919 * torch.arange(4 * longest, device=device()) % embedded_tokens(hf)
    rows = Sequences(ids.view(4, -1), torch.ones_like(lengths), lengths - 1)
    with evaluating(model):
        packed = engine(rows, **read)[rows.answer_mask].float()  # (tokens, ...)
        with unpacked(model):
            padded = engine(rows, **read)[rows.answer_mask].float()
    difference = float((packed - padded).abs().max() / padded.abs().max())
    if not difference <= RELATIVE_TOLERANCE[engine.config.dtype]:
        raise UserError(
            f"--packing: cannot be used with models of the type {hf.config.model_type!r}: packed rows change each "
            f"other's values, by {difference:.1g} of the largest; leave the flag out"
        )
