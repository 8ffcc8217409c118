"""Log-probs, entropy and KL in chunks against the written-out formulas, and the sampling distribution against Hugging
Face's own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from remax.core.fused import fused_stats
from remax.core.logprobs import chunk_stats, token_stats
from remax.core.sampling import Sampling

TOKENS, WIDTH, WORDS = 11, 6, 13
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_k=4),
    Sampling(top_p=0.6),
    Sampling(temperature=1.5, top_p=0.8, top_k=7),
]


@dataclass
class Problem:
    hidden: Tensor  # (N, H), with gradient
    weight: Tensor  # (V, H), with gradient
    targets: Tensor  # (N,)
    reference_hidden: Tensor
    reference_weight: Tensor

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T

    def reference_head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.reference_weight.T


def problem(seed: int = 0, tokens: int = TOKENS) -> Problem:
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    return Problem(
        normal(tokens, WIDTH).requires_grad_(),
        normal(WORDS, WIDTH).requires_grad_(),
        torch.randint(WORDS, (tokens,), generator=noise),
        normal(tokens, WIDTH),
        normal(WORDS, WIDTH),
    )


def kept(logits: Tensor, target: int, sampling: Sampling) -> list[int]:
    """The words of one row that can be drawn, by definition: the k best, then the fewest with mass top_p, and the
    target."""
    order = logits.argsort(descending=True).tolist()[: sampling.top_k or None]
    words, mass = [], 0.0
    for word, p in zip(order, (logits[order] / sampling.temperature).softmax(0).tolist(), strict=True):
        if mass >= sampling.top_p:
            break
        words, mass = [*words, word], mass + p
    return sorted({*words, target})


def plain(p: Problem, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """One token after the other: log softmax over the kept words; H = -sum p log p; KL = sum p (log p - log q)."""
    columns = [], [], []
    for i, target in enumerate(p.targets.tolist()):
        words = kept((p.hidden @ p.weight.T)[i].detach(), target, sampling)
        logp = ((p.hidden[i] @ p.weight[words].T) / sampling.temperature).log_softmax(0)
        logq = ((p.reference_hidden[i] @ p.reference_weight.T) / sampling.temperature).log_softmax(0)[words]
        columns[0].append(logp[words.index(target)])
        columns[1].append(-(logp.exp() * logp).sum())
        columns[2].append((logp.exp() * (logp - logq)).sum())
    return tuple(torch.stack(column) for column in columns)


def gradients(p: Problem, *outputs: Tensor) -> tuple[Tensor, ...]:
    """Of a sum with unequal weights, so that tokens cannot be mixed up."""
    weights = torch.linspace(0.5, 2.0, len(outputs[0]), dtype=torch.float64)
    loss = sum((k + 1) * (weights * x).sum() for k, x in enumerate(outputs))
    return torch.autograd.grad(loss, (p.hidden, p.weight))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("chunks", [1, 2, 3, TOKENS, TOKENS + 5])
def test_chunks_equal_plain_log_softmax(chunks, sampling):
    p = problem()
    got = token_stats(
        p.hidden,
        p.head,
        p.targets,
        chunks=chunks,
        sampling=sampling,
        entropy=True,
        stats_grad=True,
        reference_hidden=p.reference_hidden,
        reference_head=p.reference_head,
    )
    expected = plain(p, sampling)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    for x, y in zip(gradients(p, *got), gradients(p, *expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunks", [1, 4, TOKENS + 5])
def test_statistics_carry_no_gradient_unless_asked(chunks):
    p = problem(1)
    logprobs, entropy, kl = token_stats(
        p.hidden,
        p.head,
        p.targets,
        chunks=chunks,
        entropy=True,
        reference_hidden=p.reference_hidden,
        reference_head=p.reference_head,
    )
    expected = plain(p, Sampling())
    torch.testing.assert_close(torch.stack([logprobs, entropy, kl]), torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert not entropy.requires_grad and not kl.requires_grad
    for x, y in zip(gradients(p, logprobs), gradients(p, expected[0]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_what_is_not_asked_for_is_zero():
    p = problem(2)
    logprobs, entropy, kl = token_stats(p.hidden, p.head, p.targets, chunks=3)
    torch.testing.assert_close(logprobs, plain(p, Sampling())[0])
    assert not entropy.any() and not kl.any()


def test_kl_of_a_policy_to_itself_is_zero():
    p = problem(3)
    *_, kl = token_stats(
        p.hidden, p.head, p.targets, chunks=2, reference_hidden=p.hidden.detach(), reference_head=p.head
    )
    assert kl.abs().max() < 1e-12


def test_half_precision_is_summed_in_float32():
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.tensor([0, 1, 2, 3])
    logprobs, entropy, _ = chunk_stats(logits, targets, Sampling(), True, None)
    expected = logits.float().log_softmax(-1)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected[torch.arange(4), targets])
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_temperature_divides_in_float32(dtype):
    logits = (10 * torch.randn(4, 50, generator=torch.Generator().manual_seed(1))).to(dtype)
    targets = torch.tensor([0, 1, 2, 3])
    logprobs, *_ = chunk_stats(logits, targets, Sampling(temperature=0.7), False, None)
    torch.testing.assert_close(logprobs, (logits.float() / 0.7).log_softmax(-1)[torch.arange(4), targets])


def test_a_word_of_no_probability_leaves_entropy_and_kl_finite():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    logprobs, entropy, kl = chunk_stats(
        logits, torch.tensor([2]), Sampling(), True, torch.zeros(1, 3).double(), stats_grad=True
    )
    p = torch.tensor([0.0, 1.0]).double().softmax(0)  # of the two words that are left
    torch.testing.assert_close(entropy, -(p * p.log()).sum()[None])
    torch.testing.assert_close(kl, (p * (p.log() + torch.log(torch.tensor(3.0)))).sum()[None])
    (logprobs + entropy + kl).sum().backward()
    assert logits.grad.isfinite().all()


# --- sampling


def hugging_face(logits: Tensor, sampling: Sampling) -> Tensor:
    """What `generate` draws from, with its own processors in its own order."""
    processors = LogitsProcessorList()
    if sampling.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors(torch.zeros(len(logits), 1, dtype=torch.long), logits)


@pytest.mark.parametrize("sampling", [*SAMPLINGS, Sampling(top_k=1), Sampling(top_p=1e-4), Sampling(top_k=99)], ids=str)
def test_replay_is_what_generate_draws_from(sampling):
    noise = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(200, WORDS, generator=noise)
    logits[::7] = logits[::7].round()  # ties, also at the edge of the kept set
    expected = hugging_face(logits, sampling)
    drawn = expected.softmax(-1).multinomial(1, generator=noise).squeeze(1)
    assert torch.equal(sampling.apply(logits, drawn), expected)


def test_a_drawn_token_outside_the_kept_set_stays():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.5)):
        replayed = sampling.apply(logits, torch.tensor([3]))  # token 3 is neither among the two best nor in the nucleus
        n = 2 if sampling.top_k else 1
        words = [*range(n), 3]
        expected = logits[0, 3] - logits[0, words].logsumexp(0)
        torch.testing.assert_close(replayed.log_softmax(-1)[0, 3], expected)
        assert replayed[0, n:3].eq(-torch.inf).all()


def test_the_reference_is_tempered_but_not_truncated():
    assert Sampling(0.7, 0.9, 50).without_truncation() == Sampling(0.7)
    assert not Sampling(0.7).truncates and Sampling(top_p=0.9).truncates and Sampling(top_k=1).truncates


class LargestTensor(TorchDispatchMode):
    """Notes the most rows that any (rows, WORDS) tensor has, forward and backward."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == WORDS and x.numel() > WORDS * WIDTH:
                self.rows = max(self.rows, x.shape[0])
        return result


@pytest.mark.parametrize("chunks, rows", [(1, 96), (3, 32), (8, 12)])
def test_no_tensor_over_the_vocabulary_is_larger_than_a_chunk(chunks, rows):
    p = problem(4, tokens=96)
    with LargestTensor() as largest:
        stats = token_stats(
            p.hidden,
            p.head,
            p.targets,
            chunks=chunks,
            sampling=Sampling(0.7, 0.9),
            entropy=True,
            stats_grad=True,
            reference_hidden=p.reference_hidden,
            reference_head=p.reference_head,
        )
        gradients(p, *stats)
    assert largest.rows == rows
    with LargestTensor() as largest:
        logprobs, _ = fused_stats(p.hidden, p.weight, None, targets=p.targets, chunks=chunks, entropy=True)
        gradients(p, logprobs)
    assert largest.rows == rows
