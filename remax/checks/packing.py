"""Whether a packing model keeps its rows apart, and which models of a run pack."""

from __future__ import annotations

import torch

from remax.core.sequences import Sequences
from remax.engines.roles import Role
from remax.models.loading import embedded_tokens, evaluating
from remax.models.packing import pays, prepare_packing, unpacked
from utils.distributed import device
from utils.run import UserError

RELATIVE_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 3e-2}  # of two ways to compute the same values


@torch.no_grad()
def check_packing(role: Role, max_len: int, **read: bool) -> None:
    """Refuses a packing model that does not keep its rows apart. Every rank must call it: parameters may be spread.

    Four rows, one longer than the sliding window if training has such, are read padded by transformers' own attention
    and packed; what comes out must agree as well as the number format allows. A model that leaks differs by as much as
    its context matters to a token. Two of the rows have one prompt, which they share where the attention allows it.

    Args:
        max_len: Tokens of the longest row in training.
        **read: What makes the model's forward return a value for every answer token.

    Raises:
        UserError: Names the flag and the model's type.
    """
    model, hf = role.model, role.model.hf
    window = getattr(hf.config.get_text_config(), "sliding_window", None) or max_len
    # The last token of a row predicts nothing, and the one before it must lie beyond its window's first.
    longest = window + 2 if window < max_len else min(7, max_len)
    lengths = torch.tensor([longest, 3, 5, 2], device=device()).clamp(max=longest)
    prompts = (lengths - 1).clamp(max=2)
    ids = (7919 * torch.arange(4 * longest, device=device()) % embedded_tokens(hf)).view(4, -1)
    ids[2, :2] = ids[0, :2]
    rows = Sequences(ids, prompts, lengths - prompts)
    with evaluating(model):
        packed = role.ask(rows, **read)[rows.answer_mask].float()  # (tokens, ...)
        with unpacked(model):
            padded = role.ask(rows, **read)[rows.answer_mask].float()
    difference = float((packed - padded).abs().max() / padded.abs().max())
    if not difference <= RELATIVE_TOLERANCE[role.engine.config.dtype]:
        raise UserError(
            f"--packing: cannot be used with models of the type {hf.config.model_type!r}: packed rows change each "
            f"other's values, by {difference:.1g} of the largest; leave the flag out"
        )


def start_packing(role: Role, max_len: int, wanted: bool | None, **read: bool) -> str:
    """Has a model read its rows packed from now on. Every rank must call it.

    Args:
        wanted: Whether to, or None: where it is likely to be faster and gives the same numbers.
        max_len: See `check_packing`, and so for `read`.

    Returns:
        Why it reads them padded though nobody said so; empty where it packs, or was not to.

    Raises:
        UserError: It was to, and cannot.
    """
    model = role.model
    if wanted is False:
        return ""
    if wanted is None and not pays(model.hf):
        return "one attention call for each row costs more than padding on a GPU; flash_attention_2 makes a single one"
    attention = model.hf.config._attn_implementation
    try:
        prepare_packing(model.hf)
        model.packing = True
        check_packing(role, max_len, **read)
    except UserError as error:
        model.packing = False
        model.hf.set_attn_implementation(attention)
        if wanted:
            raise
        return "packing" + str(error).removeprefix("--packing:").partition("; leave")[0]
    return ""
