"""Log-probs, entropy and gradients of the fused head against log_softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from remax.core.fused import fused_stats
from remax.core.logprobs import token_stats
from remax.core.sampling import Sampling

TOKENS, WIDTH, WORDS = 7, 5, 11


def problem(dtype: torch.dtype, with_bias: bool) -> tuple[list[Tensor | None], Tensor]:
    noise = torch.Generator().manual_seed(0)
    shapes = (TOKENS, WIDTH), (WORDS, WIDTH), (WORDS,)
    inputs = [torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(WORDS, (TOKENS,), generator=noise)
    return inputs if with_bias else [*inputs[:2], None], targets


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """log p_y = log_softmax(c (W h + b))_y;  H = -sum p log p."""
    logits = scale * torch.nn.functional.linear(
        hidden.double(), weight.double(), None if bias is None else bias.double()
    )
    logp = logits.log_softmax(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).nan_to_num().sum(-1)


@pytest.mark.parametrize("with_bias, scale", [(False, 1.0), (True, 1 / 0.7)])
@pytest.mark.parametrize("chunks", [1, 3, TOKENS + 2])
def test_gradients_are_those_of_finite_differences(chunks, with_bias, scale):
    inputs, targets = problem(torch.float64, with_bias)

    def logprobs(*given: Tensor) -> Tensor:
        return fused_stats(
            given[0], given[1], given[2] if with_bias else None, targets=targets, chunks=chunks, scale=scale
        )[0]

    assert torch.autograd.gradcheck(logprobs, [x for x in inputs if x is not None])


@pytest.mark.parametrize("dtype, digits", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("with_bias, scale", [(False, 1.0), (True, 1 / 0.7)])
def test_it_is_log_softmax(dtype, digits, chunks, with_bias, scale):
    inputs, targets = problem(dtype, with_bias)
    given = [x for x in inputs if x is not None]
    got = fused_stats(*inputs, targets=targets, chunks=chunks, scale=scale, entropy=True)
    expected = plain(*inputs, targets, scale)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for x, y in zip(got, expected, strict=True):  # the sums of 16-bit products are float32
        assert x.dtype == exact
        torch.testing.assert_close(x.double(), y, rtol=min(digits, 1e-5), atol=min(digits, 1e-5))
    assert not got[1].requires_grad
    weights = torch.linspace(-1.0, 2.0, TOKENS, dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * x[0]).sum(), given) for x in (got, expected)]
    for x, y in zip(*gradients, strict=True):
        assert x.dtype == dtype
        assert (x - y).abs().max() <= digits * y.abs().max()


@pytest.mark.parametrize("learns", [(), (0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("chunks", [1, 2])
def test_frozen_inputs(chunks, learns):
    inputs, targets = problem(torch.float64, False)
    for i in {0, 1} - {*learns}:
        inputs[i].requires_grad_(False)
    logprobs, entropy = fused_stats(*inputs, targets=targets, chunks=chunks)
    torch.testing.assert_close(logprobs, plain(*inputs, targets, 1.0)[0])
    assert logprobs.requires_grad == bool(learns) and not entropy.any()
    with torch.no_grad():
        assert torch.equal(fused_stats(*inputs, targets=targets, chunks=chunks)[0], logprobs)
    if learns:
        wanted = [inputs[i] for i in learns]
        got, expected = (
            torch.autograd.grad(x.square().sum(), wanted) for x in (logprobs, plain(*inputs, targets, 1.0)[0])
        )
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_a_word_that_is_ruled_out():
    inputs, targets = problem(torch.float32, True)
    with torch.no_grad():
        inputs[2][(targets[0] + 1) % WORDS] = -torch.inf
        hidden, weight, bias = (x.detach() for x in inputs)
    drawable = targets != (targets[0] + 1) % WORDS
    got, expected = (
        fused_stats(hidden, weight, bias, targets=targets, entropy=True),
        plain(hidden, weight, bias, targets, 1),
    )
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x[drawable].double(), y[drawable], rtol=1e-5, atol=1e-5)


def test_who_is_asked():
    """The fused head, but where it lacks what is wanted."""
    inputs, targets = problem(torch.float64, False)
    hidden, weight, _ = inputs
    asked = []

    def fused(h: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        asked.append(options["scale"])
        return fused_stats(h, weight, None, **options)

    def stats(**options: object) -> None:
        found = token_stats(hidden, lambda h: h @ weight.t(), targets, chunks=2, fused=fused, **options)
        expected = token_stats(hidden, lambda h: h @ weight.t(), targets, **options)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)

    stats(entropy=True)
    stats(sampling=Sampling(temperature=0.5))
    stats(stats_grad=True)
    assert asked == [1.0, 2.0, 1.0]
    stats(sampling=Sampling(top_p=0.5))
    stats(sampling=Sampling(top_k=3))
    stats(entropy=True, stats_grad=True)
    stats(reference_hidden=hidden.detach(), reference_head=lambda h: h @ weight.detach().t())
    assert len(asked) == 3
