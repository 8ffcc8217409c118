"""What 16 bits cost: log-probs of rounded and of float32 logits, and packed against padded rows.

    python benchmarks/rounding.py

Runs on the GPU where there is one. Log-probs are compared with float64's from the same hidden states and weights, at a
vocabulary of 32,000 and logits whose largest are near 25. Packing is compared as `remax.checks.packing` compares it.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from remax.core.linear import linear_in_float32
from remax.core.sequences import Sequences
from remax.models.packing import unpacked
from remax.models.policy import PolicyModel
from utils.distributed import device

VOCABULARY, HIDDEN, TOKENS = 32_000, 2048, 512
SHAPES = {
    "2 layers of 96": (96, 256, 2, 4),
    "8 layers of 512": (512, 1376, 8, 8),
    "22 layers of 2048": (2048, 5632, 22, 32),
}


@torch.no_grad()
def logprob_errors(dtype: torch.dtype) -> tuple[float, float]:
    """Mean |log p - exact log p| of drawn tokens, in nats: of logits rounded to `dtype`, and of float32 ones."""
    noise = torch.Generator(device()).manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=noise, device=device()).to(dtype)
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=noise, device=device()) * 6 / HIDDEN**0.5).to(dtype)
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1)
    tokens = torch.multinomial(exact.exp().float(), 1, generator=noise)
    errors = []
    for logits in (F.linear(hidden, weight).float(), linear_in_float32(hidden, weight)):
        errors.append((logits.log_softmax(-1).double() - exact).gather(1, tokens).abs().mean().item())
    return errors[0], errors[1]


@torch.no_grad()
def packing_difference(shape: tuple[int, int, int, int], dtype: torch.dtype) -> float:
    """Largest difference of hidden states, packed and padded, over the largest state."""
    hidden, wide, layers, heads = shape
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads
    )
    torch.manual_seed(0)
    with torch.device(device()):
        model = PolicyModel(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), packing=True)
        lengths = torch.tensor([200, 3, 90, 17])
        ids = torch.randint(4096, (4, 200))
    rows = Sequences(ids, torch.ones_like(lengths), lengths - 1)
    mask = rows.answer_mask
    packed = model.hidden(rows)[mask].float()
    with unpacked(model):
        padded = model.hidden(rows)[mask].float()
    return ((packed - padded).abs().max() / padded.abs().max()).item()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| number format | logits rounded: mean error of log p | logits in float32 |")
    print("|---|---|---|")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        rounded, wide = logprob_errors(dtype)
        print(f"| {name} | {rounded:.2g} | {wide:.2g} |")
    print("\n| packed against padded | fp32 | bf16 | fp16 |\n|---|---|---|---|")
    for name, shape in SHAPES.items():
        if shape[0] > 512 and device().type == "cpu":
            continue  # minutes
        found = [packing_difference(shape, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        print(f"| {name} | {' | '.join(f'{x:.1g}' for x in found)} |")


if __name__ == "__main__":
    main()
