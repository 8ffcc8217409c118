"""Draws tokens: from the logits of a step and one uniform number per row to a token and its log-prob.

The token is where the cumulated probabilities pass the number (inversion). So a row's draws hang on its own numbers
alone, whatever else is in the batch, and no row needs V random numbers. Sums are float64: in float32 a word of 1e-8
behind a sum near 1 would never be drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from remax.core.sampling import Sampling

CANDIDATES = 128  # words among which top_p is looked for before all are sorted


def uniform_numbers(rows: int, steps: int, device: torch.device) -> Tensor:
    """(rows, steps) float64 in [0, 1): a number for each token that may be drawn, from torch's random state."""
    return torch.rand(rows, steps, dtype=torch.float64, device=device)


def mend(logits: Tensor) -> Tensor:
    """(rows, V) logits -> float32 ones, in place where they are.

    A policy whose logits are not numbers answers at random instead of ending the process. Its log-probs are no numbers
    either, which the training sees and reports with a cause and a remedy.
    """
    logits = logits.float()
    if logits.is_cpu and logits.amax(-1).isfinite().all():  # seldom otherwise; not a number is the largest
        return logits
    return logits.nan_to_num_(nan=0.0, posinf=torch.finfo(logits.dtype).max, neginf=-torch.inf)


def most_probable(logits: Tensor) -> Tensor:
    """(rows, V) -> (rows,) ids."""
    if not logits.is_cpu:
        return logits.argmax(-1)
    words = torch.arange(logits.shape[-1], dtype=torch.int32)  # on a CPU argmax takes four times as long as this
    best = torch.where(logits == logits.amax(-1, keepdim=True), words, logits.shape[-1])
    return best.amin(-1).long()


def logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """(rows, V) logits, (rows,) ids -> (rows,) log-probs."""
    return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row by the law of `Sampling.apply`.

    Args:
        logits: (rows, V) float32.
        uniform: (rows,) float64 in [0, 1).

    Returns:
        (rows,) ids, and (rows,) float32 log-probs in the distribution that they were drawn from.
    """
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1.0:
        # A sort on a GPU costs less than waiting for it to say whether the candidates are enough.
        return _draw_of_nucleus(logits, sampling.top_p, uniform, CANDIDATES if logits.is_cpu else logits.shape[-1])
    return _invert(logits, uniform)


def _invert(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A column of each row with probability softmax(logits), and its log-prob."""
    largest = logits.amax(-1, keepdim=True)
    sums = (logits - largest).exp_().cumsum(-1, dtype=torch.float64)  # (rows, V)
    total = sums[:, -1:]
    # Below the total also where the product is rounded up to it. The first sum above the mark is at a column that adds
    # something to it: one of probability zero is never drawn.
    mark = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    columns = torch.searchsorted(sums, mark, right=True)  # (rows, 1)
    logprobs = (logits.gather(-1, columns) - largest).double() - total.log()
    return columns.squeeze(-1), logprobs.squeeze(-1).float()


def _draw_of_nucleus(logits: Tensor, top_p: float, uniform: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """As `_invert`, among the fewest words that have probability `top_p` together."""
    words = logits.shape[-1]
    some = min(candidates, words)
    values, order = logits.topk(some, -1)  # (rows, some), descending
    p = (values - logits.logsumexp(-1, keepdim=True)).double().exp()
    through = p.cumsum(-1)
    drop = through - p >= top_p  # what stands above has it already
    drop[:, 0] = False
    columns, logprobs = _invert(values.masked_fill(drop, -torch.inf), uniform)
    ids = order.gather(-1, columns[:, None]).squeeze(-1)
    if some < words:
        rows = (through[:, -1] < top_p).nonzero().squeeze(-1)
        if len(rows):
            ids[rows], logprobs[rows] = _draw_of_nucleus(logits[rows], top_p, uniform[rows], words)
    return ids, logprobs
