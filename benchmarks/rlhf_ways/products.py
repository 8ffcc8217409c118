"""What the matrix products of a step need at least, in floating-point operations.

A token that passes through the layers costs 2 W operations for their weights W, and 4 L H for each token that it
attends to, itself among them (two products, L layers, H numbers wide). The head costs 2 H V for each token that it
predicts.

    generate   each prompt once, and every generated token but an answer's last; the head for every generated token
    score      each prompt once, and the tokens of all its answers, greedy ones too
    reference  each prompt once, and the tokens of its sampled answers; the head for these
    update     three times that: the forward pass, and the gradients of inputs and weights
    PPO        besides: the critic reads as the reference does, without a head, and its update is three times that
"""

from __future__ import annotations

import torch
from torch import nn

from remax.planning.durations import Size, before


def size_of(config) -> Size:
    """Of a policy with this configuration."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    weights = sum(module.weight.numel() for module in linear)
    return Size(weights, config.num_hidden_layers, config.hidden_size, config.vocab_size)


def products(size: Size, prompt: int, sampled: list[list[int]], greedy: list[int], critic: bool) -> dict[str, int]:
    """Operations of each part of a step.

    Args:
        prompt: Tokens of each prompt.
        sampled: Of each prompt, the lengths of its sampled answers.
        greedy: Of each prompt, the length of its greedy answer; empty where there are none.
    """
    prompts, drawn = len(sampled), [length for lengths in sampled for length in lengths]
    written = drawn + greedy
    ask = size.read(prompts * prompt, prompts * before(prompt, 0))
    generate = ask + size.read(sum(written) - len(written), sum(before(n - 1, prompt) for n in written))
    score = ask + size.read(sum(written), sum(before(n, prompt) for n in written))
    once = ask + size.read(sum(drawn), sum(before(n, prompt) for n in drawn))
    policy = once + size.head(sum(drawn))
    found = {"generate": generate + size.head(sum(written)), "score": score, "reference": policy, "update": 3 * policy}
    if critic:
        found["reference"] += once
        found["update"] += 3 * once
    return found
