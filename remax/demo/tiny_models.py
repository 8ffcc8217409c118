"""A tokenizer and tiny models for the demo and the tests: random weights, real architectures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

VOCABULARY_SIZE = 600


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = VOCABULARY_SIZE, pad_token: str | None = "<pad>"
) -> PreTrainedTokenizerBase:
    """A byte-level BPE with <s>, </s> and `pad_token` (None: no pad token, as GPT-2 has none).

    Any text can be encoded, since all 256 bytes are in the vocabulary. Encoding adds no special token: whoever encodes
    an answer appends </s> to it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special_tokens = ["<s>", "</s>"] + ([pad_token] if pad_token else [])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": pad_token}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)


ARCHITECTURES = ("gpt2", "opt", "llama", "mistral", "qwen2")


def tiny_config(
    architecture: str,
    vocab_size: int,
    *,
    hidden_size: int = 32,
    layers: int = 2,
    heads: int = 4,
    max_positions: int = 1024,
    **overrides: Any,
) -> PretrainedConfig:
    """A small configuration of one of `ARCHITECTURES`; `overrides` are further fields of it, such as eos_token_id.

    The feed-forward layers are 4 times as wide as the hidden size, or 8/3 times where they are gated.
    """
    from transformers import GPT2Config, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config

    if architecture == "gpt2":
        sizes = dict(n_embd=hidden_size, n_layer=layers, n_head=heads, n_positions=max_positions)
        return GPT2Config(vocab_size=vocab_size, **(sizes | overrides))
    sizes = dict(hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads)
    sizes["max_position_embeddings"] = max_positions
    if architecture == "opt":
        sizes |= dict(ffn_dim=4 * hidden_size, word_embed_proj_dim=hidden_size)
        return OPTConfig(vocab_size=vocab_size, **(sizes | overrides))
    gated = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
    if architecture not in gated:
        raise ValueError(f"no tiny configuration for {architecture!r}; there is one for {', '.join(ARCHITECTURES)}")
    # Mistral and Qwen2.5 share key and value heads between query heads; the stand-ins do so too.
    sizes["num_key_value_heads"] = heads if architecture == "llama" else max(1, heads // 2)
    sizes["intermediate_size"] = 8 * hidden_size // 3
    return gated[architecture](vocab_size=vocab_size, **(sizes | overrides))


SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=32, layers=2, heads=4),
    "small": dict(hidden_size=64, layers=2, heads=4),
    # Initial weights wider than the usual 0.02: so narrow a model then learns several times faster.
    "demo": dict(hidden_size=96, layers=2, heads=4, initializer_range=0.08),
}


def save_tiny_model(
    folder: str | Path, architecture: str, tokenizer: PreTrainedTokenizerBase, size: str = "tiny", seed: int = 0
) -> Path:
    """Writes a Hugging Face folder: a causal language model with random weights, its generation config, the tokenizer.

    `size` is one of `SIZES`. The caller's random state is left as it was.
    """
    import torch
    from transformers import AutoModelForCausalLM

    pad_token_id = tokenizer.pad_token_id
    config = tiny_config(
        architecture,
        # Rows to spare, as Qwen has: transformers reads any tokenizer in such a folder as Qwen's, and adds a token.
        len(tokenizer) + 8 * (architecture == "qwen2"),
        **SIZES[size],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if pad_token_id is None else pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
