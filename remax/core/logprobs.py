"""Log-probs, entropy and KL of answer tokens, in chunks: the full-vocabulary tensor of a batch never exists.

A batch of B answers of A tokens over V words would make logits of B*A*V numbers, six times over in a naive loss. Here
the head is applied to `chunk` tokens at a time and each chunk is computed again in the backward pass, so the peak is
chunk*V. Where nothing but log-probs carries a gradient, and all words can be drawn, `remax.core.fused` does the same in
fewer passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from remax.core.sampling import Sampling
from utils.present import present

Head = Callable[[Tensor], Tensor]  # (n, H) hidden states -> (n, V) logits


@dataclass(frozen=True)
class PolicyOutput:
    """What the policy says of given answers; each (B, A), 0 in padding columns.

    Attributes:
        logprobs: Log-probs of the given tokens, with gradient.
        entropy: Entropy of the distribution they were evaluated in; None where not asked for.
        full_kl: KL(policy || reference) over the whole vocabulary; None where not asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    full_kl: Tensor | None = None


def chunk_stats(
    logits: Tensor,
    targets: Tensor,
    sampling: Sampling,
    entropy: bool,
    reference_logits: Tensor | None,
    stats_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, V) logits, (n,) targets -> log-prob of the target, entropy, KL to the reference's distribution; each (n,).

    logp = z_y - logsumexp(z);  H = -sum_v p_v log p_v;  KL = sum_v p_v (log p_v - log q_v). In float32 or wider.
    With `stats_grad` entropy and KL carry a gradient too, which keeps (n, V) tensors for the backward pass.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    logits = sampling.apply(logits, targets)
    normaliser = logits.logsumexp(-1)  # (n,)
    logprob = logits.gather(-1, targets[:, None]).squeeze(-1) - normaliser
    zero = torch.zeros_like(logprob)
    if not entropy and reference_logits is None:
        return logprob, zero, zero
    with torch.set_grad_enabled(stats_grad and torch.is_grad_enabled()):
        logp = logits - normaliser[:, None]
        p = logp.exp()
        logp = logp.masked_fill(p == 0, 0.0)  # 0 * log 0 = 0
        h = -(p * logp).sum(-1) if entropy else zero
        if reference_logits is None:
            return logprob, h, zero
        logq = sampling.without_truncation().apply(reference_logits.to(logits.dtype), targets).log_softmax(-1)
        return logprob, h, (p * (logp - logq)).sum(-1)


def in_one_call(
    sampling: Sampling, *, entropy: bool = False, stats_grad: bool = False, reference_hidden: Tensor | None = None
) -> bool:
    """Whether a fused head can say what is wanted: it is asked once, for all pieces. See `token_stats`."""
    return not sampling.truncates and reference_hidden is None and not (entropy and stats_grad)


def token_stats(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    chunks: int = 1,
    sampling: Sampling = Sampling(),
    entropy: bool = False,
    stats_grad: bool = False,
    reference_hidden: Tensor | None = None,
    reference_head: Head | None = None,
    fused: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, H) hidden states and (N,) target ids -> log-probs, entropy, KL, each (N,), computed in `chunks` pieces.

    With more than one piece each is recomputed in the backward pass. The number of pieces is the caller's, because
    under ZeRO-3 each call of `head` gathers its weight over all ranks: every rank must call it equally often. Rows are
    added where N < chunks.

    Args:
        fused: The head as `fused_stats`: hidden states, targets, chunks, scale, entropy -> log-probs and entropy. It is
            asked instead of `head` where it can say what is wanted, see `in_one_call`.
    """
    if fused and in_one_call(sampling, entropy=entropy, stats_grad=stats_grad, reference_hidden=reference_hidden):
        scale = 1 / sampling.temperature
        logprob, h = fused(hidden, targets=targets, chunks=chunks, scale=scale, entropy=entropy)
        return logprob, h, torch.zeros_like(h)

    def piece(h: Tensor, y: Tensor, ref: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            reference_logits = present(reference_head, "reference_head")(ref) if ref is not None else None
        return chunk_stats(head(h), y, sampling, entropy, reference_logits, stats_grad)

    n = len(targets)
    if chunks == 1:
        return piece(hidden, targets, reference_hidden)
    if n < chunks:
        rows = torch.arange(chunks, device=targets.device).clamp(max=n - 1)
        hidden, targets = hidden[rows], targets[rows]
        reference_hidden = reference_hidden[rows] if reference_hidden is not None else None
    references = reference_hidden.tensor_split(chunks) if reference_hidden is not None else [None] * chunks
    parts = [
        checkpoint(piece, h, y, ref, use_reentrant=False, preserve_rng_state=False)
        for h, y, ref in zip(hidden.tensor_split(chunks), targets.tensor_split(chunks), references, strict=True)
    ]
    logprob, h, kl = (torch.cat(column)[:n] for column in zip(*parts, strict=True))
    return logprob, h, kl
