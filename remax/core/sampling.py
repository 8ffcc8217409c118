"""The distribution that answers are drawn from, and its replay on given tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The distribution that answers are drawn from, as in Hugging Face `generate`.

    Attributes:
        temperature: Divides the logits first.
        top_p: Of what `top_k` leaves, as few tokens are kept as have this probability together; 1 for all.
        top_k: How many of the most probable tokens are kept; 0 for all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def truncates(self) -> bool:
        """Whether some tokens have probability zero."""
        return self.top_p < 1.0 or self.top_k > 0

    def without_truncation(self) -> Sampling:
        """The same temperature over the whole vocabulary, for a reference, which needs full support."""
        return Sampling(self.temperature)

    def apply(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(n, V) logits of the model, (n,) drawn tokens -> (n, V) logits of the sampling distribution.

        They are -inf outside the kept set. A drawn token is always kept. Generation and training round differently, so
        a token at the edge of the kept set can fall out of it on replay; it was drawn, so its probability was not zero.
        """
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if not self.truncates:
            return logits
        with torch.no_grad():
            drop = torch.zeros_like(logits, dtype=torch.bool)
            if self.top_k > 0:
                kth = logits.topk(min(self.top_k, logits.shape[-1]), -1).values[:, -1:]
                drop = logits < kth
            if self.top_p < 1.0:
                ascending, order = logits.masked_fill(drop, -torch.inf).sort(-1)
                below = ascending.softmax(-1).cumsum(-1) <= 1.0 - self.top_p
                below[:, -1] = False  # the most probable token stays whatever top_p
                drop = drop | torch.zeros_like(drop).scatter(-1, order, below)
            drop.scatter_(-1, targets[:, None], False)
        return logits.masked_fill(drop, -torch.inf)
