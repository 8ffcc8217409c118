"""Configurations of models by name, so that a plan needs neither weights nor the hub.

The sizes are those of the models' public config.json.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from remax.models.loading import load_config
from utils.run import UserError


def _opt(hidden: int, layers: int, heads: int, **more: Any) -> PreTrainedConfig:
    names = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * hidden}
    return OPTConfig(**{"word_embed_proj_dim": hidden} | names | more)


def _gpt2(width: int, layers: int, heads: int) -> PreTrainedConfig:
    return GPT2Config(n_embd=width, n_layer=layers, n_head=heads)


def llama_like(
    kind: Any,
    hidden: int,
    wide: int,
    layers: int,
    heads: int,
    key_heads: int,
    words: int,
    **more: Any,
) -> PreTrainedConfig:
    """A configuration of Llama's build: hidden and feed-forward size, layers, heads, key heads, vocabulary."""
    return kind(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=words,
        **{"max_position_embeddings": 32768} | more,
    )


def _llama(*sizes: int, **more: Any) -> PreTrainedConfig:
    return llama_like(LlamaConfig, *sizes, **more)


def _qwen2(*sizes: int, **more: Any) -> PreTrainedConfig:
    return llama_like(Qwen2Config, *sizes, **more)


def _qwen3(*sizes: int, **more: Any) -> PreTrainedConfig:
    return llama_like(Qwen3Config, *sizes, head_dim=128, **more)


TIED = {"tie_word_embeddings": True}
SHAPES: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "facebook/opt-125m": (_opt, (768, 12, 12), {}),
    "facebook/opt-350m": (_opt, (1024, 24, 16), {"word_embed_proj_dim": 512, "do_layer_norm_before": False}),
    "facebook/opt-1.3b": (_opt, (2048, 24, 32), {}),
    "facebook/opt-2.7b": (_opt, (2560, 32, 32), {}),
    "facebook/opt-6.7b": (_opt, (4096, 32, 32), {}),
    "facebook/opt-13b": (_opt, (5120, 40, 40), {}),
    "facebook/opt-30b": (_opt, (7168, 48, 56), {}),
    "openai-community/gpt2": (_gpt2, (768, 12, 12), {}),
    "openai-community/gpt2-medium": (_gpt2, (1024, 24, 16), {}),
    "openai-community/gpt2-large": (_gpt2, (1280, 36, 20), {}),
    "openai-community/gpt2-xl": (_gpt2, (1600, 48, 25), {}),
    "TinyLlama/TinyLlama-1.1B": (_llama, (2048, 5632, 22, 32, 4, 32000), {"max_position_embeddings": 2048}),
    "meta-llama/Llama-2-7b-hf": (_llama, (4096, 11008, 32, 32, 32, 32000), {"max_position_embeddings": 4096}),
    "meta-llama/Llama-2-13b-hf": (_llama, (5120, 13824, 40, 40, 40, 32000), {"max_position_embeddings": 4096}),
    "meta-llama/Llama-2-70b-hf": (_llama, (8192, 28672, 80, 64, 8, 32000), {"max_position_embeddings": 4096}),
    "meta-llama/Meta-Llama-3-8B": (_llama, (4096, 14336, 32, 32, 8, 128256), {"max_position_embeddings": 8192}),
    "meta-llama/Llama-3.1-8B": (_llama, (4096, 14336, 32, 32, 8, 128256), {"max_position_embeddings": 131072}),
    "meta-llama/Llama-3.2-1B": (
        *(_llama, (2048, 8192, 16, 32, 8, 128256)),
        {"head_dim": 64, "max_position_embeddings": 131072} | TIED,
    ),
    "meta-llama/Llama-3.2-3B": (
        *(_llama, (3072, 8192, 28, 24, 8, 128256)),
        {"head_dim": 128, "max_position_embeddings": 131072} | TIED,
    ),
    "mistralai/Mistral-7B-v0.1": (
        *(lambda *sizes, **more: llama_like(MistralConfig, *sizes, **more), (4096, 14336, 32, 32, 8, 32000)),
        {"sliding_window": 4096},
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": (
        *(lambda *sizes, **more: llama_like(MistralConfig, *sizes, **more), (4096, 14336, 32, 32, 8, 32000)),
        {"sliding_window": None},
    ),
    "Qwen/Qwen2.5-0.5B": (_qwen2, (896, 4864, 24, 14, 2, 151936), TIED),
    "Qwen/Qwen2.5-1.5B": (_qwen2, (1536, 8960, 28, 12, 2, 151936), TIED),
    "Qwen/Qwen2.5-3B": (_qwen2, (2048, 11008, 36, 16, 2, 151936), TIED),
    "Qwen/Qwen2.5-7B": (_qwen2, (3584, 18944, 28, 28, 4, 152064), {}),
    "Qwen/Qwen2.5-14B": (_qwen2, (5120, 13824, 48, 40, 8, 152064), {}),
    "Qwen/Qwen3-0.6B": (_qwen3, (1024, 3072, 28, 16, 8, 151936), TIED),
    "Qwen/Qwen3-1.7B": (_qwen3, (2048, 6144, 28, 16, 8, 151936), TIED),
    "Qwen/Qwen3-4B": (_qwen3, (2560, 9728, 36, 32, 8, 151936), TIED),
    "Qwen/Qwen3-8B": (_qwen3, (4096, 12288, 36, 32, 8, 151936), {}),
}
SAME_SHAPE = ("-hf", "-chat", "-instruct", "-base")  # endings of names that say nothing of the size


def _short(name: str) -> str:
    short = name.rpartition("/")[2].lower().removeprefix("meta-")
    for ending in SAME_SHAPE:
        short = short.replace(ending, "")
    return short


def config_of(name: str, flag: str) -> PreTrainedConfig:
    """The configuration of a folder, of a model by its name, or of a shape.

    Args:
        name: A Hugging Face folder or its config.json; a name out of `SHAPES`, with or without its owner; a shape as
            llama:2048,5632,22,32,4,32000 (hidden and feed-forward size, layers, heads, key heads, vocabulary); or any
            other model that the hub knows.

    Raises:
        UserError: None of these.
    """
    path = Path(name)
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if path.is_dir():
        return load_config(str(path), flag)
    by_short = {_short(full): full for full in SHAPES}
    if name.startswith("llama:"):
        sizes = name.removeprefix("llama:").split(",")
        if len(sizes) != 6 or not all(size.isdigit() and int(size) for size in sizes):
            raise UserError(
                f"{flag} {name}: expected llama: and six whole numbers: hidden and feed-forward size, layers, heads, "
                "key heads, vocabulary, such as llama:2048,5632,22,32,4,32000"
            )
        config = _llama(*map(int, sizes))
    elif _short(name) in by_short:
        kind, numbers, more = SHAPES[by_short[_short(name)]]
        config = kind(*numbers, **more)
    elif "/" in name:
        return load_config(name, flag)
    else:
        close = difflib.get_close_matches(_short(name), by_short, n=3)
        known = f"did you mean {' or '.join(close)}?" if close else f"it knows {', '.join(by_short)}"
        raise UserError(
            f"{flag} {name}: is no folder, no name that the planner knows ({known}) and no shape such as "
            "llama:2048,5632,22,32,4,32000"
        )
    config.use_cache = True
    return config
