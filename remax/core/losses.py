"""Losses on given texts: supervised, ranking of pairs and of several answers, and the direct preference losses.

Sums over the micro-batch divided by a denominator that the caller takes over the whole optimizer step, so cutting
changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def supervised_loss(logprobs: Tensor, mask: Tensor, denominator: float | Tensor) -> Tensor:
    """(B, A) log-probs of the answer tokens, (B, A) mask -> -sum of the answers' log-probs / denominator."""
    return -logprobs.masked_fill(~mask, 0.0).sum() / denominator


def preference_losses(difference: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(B,) by how much the chosen answer is ahead -> (B,) -log sigmoid(d).

    With a share e of preferences that are taken to be wrong: (1 - e) * -log sigmoid(d) + e * -log sigmoid(-d).
    """
    losses = -F.logsigmoid(difference)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-difference)
    return losses


def ranking_losses(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
) -> Tensor:
    """(B,) scores -> (B,) -log sigmoid(d) with d = chosen - rejected - margin.

    This is the negative log-likelihood of the preference in the model of Bradley and Terry.

    Args:
        chosen: (B,) scores of the better answers.
        rejected: (B,) scores of the worse answers.
        margin: (B,) how much better the chosen answer was said to be (Llama 2, arXiv 2307.09288, section 3.2.2).
        label_smoothing: Share of preferences taken to be wrong, see `preference_losses`.
        centring: Weight of (chosen + rejected)^2, which pins the scores' free constant near 0 (arXiv 2312.09244).
    """
    difference = chosen - rejected  # (B,)
    if margin is not None:
        difference = difference - margin
    losses = preference_losses(difference, label_smoothing)
    return losses + centring * (chosen + rejected).square() if centring else losses


def ranking_loss(
    chosen: Tensor,
    rejected: Tensor,
    denominator: float | Tensor | None = None,
    margin: Tensor | None = None,
    **options: float,
) -> Tensor:
    """(B,) scores -> sum of `ranking_losses` / denominator (pairs; by default those given)."""
    losses = ranking_losses(chosen, rejected, margin, **options)
    return losses.sum() / (len(chosen) if denominator is None else denominator)


def ordered_pairs(row: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of answers of one row and unequal rank, as numbers of the answers: (P,) the better, (P,) the worse.

    Args:
        row: (N,) the row of each answer.
        ranks: (N,) its rank within the row: 1 for the best, equal for ties.
    """
    better, worse = ((row[:, None] == row) & (ranks[:, None] < ranks)).nonzero(as_tuple=True)
    return better, worse


def mean_over_pairs(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """(P,) values of pairs, (P,) the row of each -> (rows,) means; 0 for a row without pairs."""
    sums = values.new_zeros(rows).index_add(0, row, values)
    return sums / torch.bincount(row, minlength=rows).clamp(min=1)


def pairwise_losses(
    scores: Tensor, row: Tensor, ranks: Tensor, rows: int, *, label_smoothing: float = 0.0, centring: float = 0.0
) -> Tensor:
    """(N,) scores of all answers of the rows -> (rows,) mean of `ranking_losses` over a row's ordered pairs.

    This is the loss of InstructGPT (Ouyang et al., arXiv 2203.02155, eq. 1), except that tied answers form no pair
    here. With two answers it is the loss of a pair. See `ordered_pairs` for `row` and `ranks`.
    """
    better, worse = ordered_pairs(row, ranks)
    losses = ranking_losses(scores[better], scores[worse], label_smoothing=label_smoothing, centring=centring)
    return mean_over_pairs(losses, row[better], rows)


def plackett_luce_losses(scores: Tensor, row: Tensor, ranks: Tensor, rows: int, *, centring: float = 0.0) -> Tensor:
    """(N,) scores -> (rows,) -log probability of the whole ranking in the model of Plackett and Luce.

    There the best is chosen among all answers, the next among those that are left, and so on:
    -sum_k log( exp r_k / (exp r_k + sum of exp r_j over all j ranked below k) ). It is MLE_K of Zhu et al. (arXiv
    2301.11270, section 3.2), a sum over the places and not their mean. Tied answers are not asked to beat one another:
    each is chosen among itself and those ranked below. With two answers it is the loss of a pair. `centring` acts as in
    `pairwise_losses`.
    """
    beaten = (row[:, None] == row) & (ranks[:, None] < ranks)  # (N, N)
    rivals = beaten | torch.eye(len(row), dtype=torch.bool, device=row.device)
    losses = scores.expand_as(rivals).masked_fill(~rivals, -torch.inf).logsumexp(1) - scores  # (N,)
    result = losses.new_zeros(rows).index_add(0, row, losses)
    if not centring:
        return result
    better, worse = ordered_pairs(row, ranks)
    return result + centring * mean_over_pairs((scores[better] + scores[worse]).square(), row[better], rows)


def dpo_losses(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    *,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """(B,) log-probs of whole answers under policy and reference -> (B,) losses.

    DPO (Rafailov et al., arXiv 2305.18290, eq. 7): -log sigmoid( beta * (log-ratio chosen - log-ratio rejected) ).
    R-DPO (Park et al., arXiv 2403.19159, eq. 9) adds alpha * (|chosen| - |rejected|) inside the sigmoid; alpha = 0 is
    DPO. Lengths: (B,) in tokens, needed for alpha != 0 (ValueError). `label_smoothing` acts as in `ranking_losses`, and
    makes the conservative DPO of Mitchell's note "A note on DPO with noisy preferences and relationship to IPO".
    """
    logits = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))  # (B,)
    if alpha:
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError("the length term of R-DPO needs the lengths of both answers")
        logits = logits + alpha * (chosen_lengths - rejected_lengths).to(logits.dtype)
    return preference_losses(logits, label_smoothing)


def answer_logprob(logprobs: Tensor, mask: Tensor) -> Tensor:
    """(B, A) log-probs of the tokens, (B, A) mask -> (B,) log-prob of the answer."""
    return logprobs.masked_fill(~mask, 0.0).sum(1)
