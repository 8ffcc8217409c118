"""Shapes by name: the parameters that the models are known to have."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from remax.planning.dry_run import Sketch, sizes
from remax.planning.shapes import SHAPES, config_of
from utils.run import UserError

MILLIONS = {  # as the model cards have them, tied embeddings once
    "facebook/opt-125m": 125.2,
    "facebook/opt-350m": 331.2,
    "facebook/opt-1.3b": 1315.8,
    "facebook/opt-13b": 12853.5,
    "openai-community/gpt2": 124.4,
    "openai-community/gpt2-xl": 1557.6,
    "TinyLlama/TinyLlama-1.1B": 1100.0,
    "meta-llama/Llama-2-7b-hf": 6738.4,
    "meta-llama/Llama-2-13b-hf": 13015.9,
    "meta-llama/Llama-2-70b-hf": 68976.6,
    "meta-llama/Llama-3.1-8B": 8030.3,
    "meta-llama/Llama-3.2-1B": 1235.8,
    "meta-llama/Llama-3.2-3B": 3212.7,
    "mistralai/Mistral-7B-v0.1": 7241.7,
    "Qwen/Qwen2.5-0.5B": 494.0,
    "Qwen/Qwen2.5-1.5B": 1543.7,
    "Qwen/Qwen2.5-3B": 3085.9,
    "Qwen/Qwen2.5-7B": 7615.6,
    "Qwen/Qwen2.5-14B": 14770.0,
    "Qwen/Qwen3-0.6B": 596.0,
    "Qwen/Qwen3-1.7B": 1720.6,
    "Qwen/Qwen3-8B": 8190.7,
}


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_are_those_of_the_model_cards(name):
    found = sizes(Sketch(config_of(name, "--model"), torch.bfloat16))
    assert found.parameters / 1e6 == pytest.approx(MILLIONS[name], abs=0.06)


def test_every_name_is_found_in_short(tmp_path):
    for name in SHAPES:
        assert config_of(name, "--model").to_dict() == config_of(name.split("/")[1].lower(), "--model").to_dict()
    assert config_of("Llama-2-7b-chat-hf", "--model").hidden_size == 4096
    config = config_of("llama:64,128,3,4,2,500", "--model")
    assert (config.num_hidden_layers, config.num_key_value_heads, config.vocab_size) == (3, 2, 500)
    LlamaConfig(hidden_size=64).save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "config.json"):
        assert config_of(str(place), "--model").hidden_size == 64


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Llama-2-8b",
            r"--model Llama-2-8b: is no folder, no name that the planner knows \(did you mean llama-3-8b or llama-2-7b",
        ),
        ("nothing", "--model nothing: is no folder"),
        ("llama:64,128,3", "--model llama:64,128,3: expected llama: and six whole numbers"),
        ("llama:64,128,3,4,2,x", "expected llama: and six whole numbers"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        config_of(name, "--model")
