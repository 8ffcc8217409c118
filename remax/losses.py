"""Losses on given texts: supervised, pairwise ranking, and the direct preference losses.

Sums over the micro-batch divided by a denominator that the caller takes over the whole optimizer step, so cutting
changes nothing.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def supervised_loss(logprobs: Tensor, mask: Tensor, denominator: float | Tensor) -> Tensor:
    """(B, A) log-probs of the answer tokens, (B, A) mask -> -sum of the answers' log-probs / denominator."""
    return -logprobs.masked_fill(~mask, 0.0).sum() / denominator


def ranking_losses(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """(B,) scores -> (B,) -log sigmoid(chosen - rejected - margin), the Bradley-Terry likelihood of the preference.

    margin: (B,) how much better the chosen answer was said to be (Llama 2, arXiv 2307.09288, section 3.2.2).
    """
    difference = chosen - rejected  # (B,)
    return -F.logsigmoid(difference if margin is None else difference - margin)


def ranking_loss(
    chosen: Tensor, rejected: Tensor, denominator: float | Tensor | None = None, margin: Tensor | None = None
) -> Tensor:
    """(B,) scores -> sum of `ranking_losses` / denominator (pairs; by default those given)."""
    return ranking_losses(chosen, rejected, margin).sum() / (len(chosen) if denominator is None else denominator)


def dpo_losses(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    *,
    alpha: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """(B,) log-probs of whole answers under policy and reference -> (B,) losses.

    DPO (Rafailov et al., arXiv 2305.18290, eq. 7): -log sigmoid( beta * (log-ratio chosen - log-ratio rejected) ).
    R-DPO (Park et al., arXiv 2403.19159, eq. 9) adds alpha * (|chosen| - |rejected|) inside the sigmoid; alpha = 0 is
    DPO. Lengths: (B,) in tokens, needed for alpha != 0 (ValueError).
    """
    logits = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))  # (B,)
    if alpha:
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError("the length term of R-DPO needs the lengths of both answers")
        logits = logits + alpha * (chosen_lengths - rejected_lengths).to(logits.dtype)
    return -F.logsigmoid(logits)


def answer_logprob(logprobs: Tensor, mask: Tensor) -> Tensor:
    """(B, A) log-probs of the tokens, (B, A) mask -> (B,) log-prob of the answer."""
    return logprobs.masked_fill(~mask, 0.0).sum(1)
