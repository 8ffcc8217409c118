"""Sums of 16-bit products in float32."""

import pytest
import torch
import torch.nn.functional as F

from remax.core.linear import linear_in_float32


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))
@pytest.mark.parametrize("with_bias", (False, True))
def test_sums_are_not_rounded_to_16_bits(dtype, device, with_bias):
    noise = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=noise).to(dtype) for shape in ((2, 3, 64), (50, 64), (50,)))
    bias = bias if with_bias else None
    exact = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    moved = [x if x is None else x.to(device).requires_grad_() for x in (hidden, weight, bias)]
    logits = linear_in_float32(*moved)
    assert logits.dtype == torch.float32 and logits.shape == (2, 3, 50)
    # Logits of up to 30: bfloat16 would be wrong by up to 1/16.
    assert (logits.cpu().double() - exact).abs().max() < 2e-5
    coefficients = torch.randn(2, 3, 50, generator=noise)
    (logits * coefficients.to(device)).sum().backward()
    plain = [x if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    (F.linear(*plain) * coefficients.double()).sum().backward()
    for got, expected in zip(moved, plain, strict=True):
        if got is not None:
            error = (got.grad.cpu().double() - expected.grad).abs().max() / expected.grad.abs().max()
            assert got.grad.dtype == dtype and error < 1e-2  # what is rounded are gradients, as ever


def test_wider_numbers_are_left_alone():
    hidden, weight = torch.randn(3, 4, dtype=torch.double), torch.randn(5, 4, dtype=torch.double, requires_grad=True)
    assert torch.equal(linear_in_float32(hidden, weight), F.linear(hidden, weight))
    assert torch.equal(linear_in_float32(hidden.float(), weight), F.linear(hidden.float().double(), weight))
