"""Models with random weights whose answers are as long as their prompts say, and the prompts.

A token belongs to a class 1..A. The weights are made such that a token of class c is followed by one of class c - 1,
and one of class 1 by the end token, whatever code decodes and wherever its cache is: the last token of a prompt says
how many tokens the answer has, the end token among them. Which tokens of a class come is open, so sampling has a
choice.
"""

from __future__ import annotations

import random
from pathlib import Path

import measuring
import torch
from measuring import SHAPES, config_of
from torch import Tensor, nn

SPECIAL = ("</s>", "<pad>", "<s>", "<unk>")  # ids 0, 1, 2, 3
WORDS = 20_000 + len(SPECIAL)  # that a tokenizer has at most; tokens beyond are never written
QUIET = 0.02  # of what a layer adds, so that a token's class is heard at the end of the deepest model

# Of all ways: with a usual one the first step of Adam, which moves every weight alike, would drown the codes below.
LEARNING_RATE = 1e-9


def classes(vocabulary: int, longest: int) -> Tensor:
    """(V,) how many tokens follow a token in an answer: 0 for the end token, -1 for what is never written."""
    ids = torch.arange(vocabulary)
    found = 1 + (ids - len(SPECIAL)) % longest
    found[: len(SPECIAL)] = found[WORDS:] = -1
    found[0] = 0
    return found


def token(rest: int, longest: int, vocabulary: int, draw: random.Random) -> int:
    """A token of the class."""
    return draw.randrange(len(SPECIAL) - 1 + rest, vocabulary, longest)


def make_tokenizer(vocabulary: int):
    """A character is a token, so that texts and tokens are the same for whoever reads them."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    characters = [chr(0x4E00 + i) for i in range(min(vocabulary, WORDS) - len(SPECIAL))]
    words = {word: i for i, word in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    names = dict(zip(("eos_token", "pad_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def make_models(folder: Path, family: str, shape: str, dtype: str, longest: int, positions: int) -> None:
    """Writes a policy and a reward model of the shape with their tokenizer; answers have at most `longest` tokens."""
    more = {"dropout": 0.0} if family == "opt" else {}
    config = config_of(family, SHAPES[shape], max_position_embeddings=positions, tie_word_embeddings=False, **more)
    torch.manual_seed(0)
    measuring.make_models(
        folder, config, make_tokenizer(config.vocab_size), dtype, lambda policy: count_down(policy, longest)
    )


@torch.no_grad()
def count_down(model: nn.Module, longest: int) -> None:
    """Gives the model the weights by which its answers have the lengths that their prompts say."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    vocabulary, hidden = embedding.shape
    of_class = classes(vocabulary, longest).to(embedding.device)
    codes = torch.randn(longest + 2, hidden, generator=torch.Generator().manual_seed(1)).to(embedding)
    codes -= codes.mean(1, keepdim=True)  # what a layer norm takes away
    codes /= codes.norm(dim=1, keepdim=True)
    known = of_class >= 0
    embedding[known] += 2 * codes[of_class[known]]
    head[known] += (
        64 / hidden**0.5 * codes[of_class[known] + 1]
    )  # the last norm leaves about sqrt(hidden): logits of 64
    head[~known] = 0
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
            weight *= QUIET


def prompt_rows(shape: str, prompts: int, prompt_len: int, longest: int, natural: bool, seed: int) -> list[list[int]]:
    """Rows of `prompt_len` tokens whose answers have `longest` tokens, or lengths that are even on 1..longest."""
    vocabulary, draw = SHAPES[shape][-1], random.Random(seed)
    vocabulary = min(vocabulary, WORDS)
    lengths = [longest] * prompts
    if natural:  # each of `prompts` even parts of the lengths once, in any order
        lengths = [1 + int((i + draw.random()) * longest / prompts) for i in range(prompts)]
        draw.shuffle(lengths)
    rows = [[draw.randrange(len(SPECIAL), vocabulary) for _ in range(prompt_len - 1)] for _ in range(prompts)]
    return [[*row, token(length, longest, vocabulary, draw)] for row, length in zip(rows, lengths, strict=True)]


def answer_length(row: list[int], longest: int) -> int:
    """How many tokens the answer to a prompt of these tokens has."""
    return 1 + (row[-1] - len(SPECIAL)) % longest
