"""Models that run without numbers: by hand, and beside the same model that runs with numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

from remax.core.sampling import Sampling
from remax.models.loading import prepare_training
from remax.models.policy import PolicyModel
from remax.planning.dry_run import Sketch, Storages, _stats, decoding, learning, reading, sizes

WIDE, LAYERS, WORDS = 64, 5, 300
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
LLAMA = LlamaConfig(
    hidden_size=WIDE,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=WORDS,
)
FAMILIES = {
    "llama": LLAMA,
    "opt": OPTConfig(
        dropout=0.0, hidden_size=WIDE, ffn_dim=256, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=WORDS
    ),
    "gpt2": GPT2Config(n_embd=WIDE, n_layer=LAYERS, n_head=4, vocab_size=WORDS, **NO_DROPOUT),
    "qwen2": Qwen2Config(**{**LLAMA.to_dict(), "model_type": "qwen2", "tie_word_embeddings": True}),
}
ROWS, TOKENS, ANSWER = 3, 32, 16


def test_storages_are_counted_from_their_birth_to_their_end():
    weight = torch.ones(10)
    with Storages([weight]) as storages:
        a = weight * 2  # 40 bytes
        view = a[:5].view(5, 1)  # none
        assert storages.live == 40
        b = torch.cat([a, weight.t()])  # 80
        del a
        assert storages.live == 120  # the view keeps it
        del view
        assert (storages.live, storages.peak) == (80, 120)
        del b
    assert storages.live == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_without_numbers_holds_what_one_with_numbers_does(family, checkpointing):
    # Of 1 and 2 layers the planner makes 5; here all 5 run, on the CPU.
    config = FAMILIES[family]
    sketch = Sketch(config, torch.float32, checkpointing=checkpointing, cuda=False)
    hf = AutoModelForCausalLM.from_config(config).train()
    prepare_training(hf, checkpointing)
    model = PolicyModel(hf)
    assert sizes(sketch).parameters == sum(p.numel() for p in model.parameters())
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Storages([*model.parameters(), *model.buffers()]) as storages:
        ids = torch.zeros(ROWS, TOKENS, dtype=torch.long)
        states = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
        kept = storages.live
        _stats(model, states, ANSWER, 1024, Sampling()).sum().backward()  # in one
        del states
    held = learning(sketch, ROWS, TOKENS, ANSWER, chunk=1024)
    assert held.kept == pytest.approx(kept, rel=0.02)
    assert held.peak == pytest.approx(storages.peak, rel=0.03)


def test_what_checkpointing_keeps_by_hand():
    held = learning(Sketch(LLAMA, torch.bfloat16, checkpointing=True), ROWS, TOKENS, ANSWER, chunk=1024)
    more = learning(
        Sketch(LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": LAYERS + 1}), torch.bfloat16, checkpointing=True),
        *(ROWS, TOKENS, ANSWER),
        chunk=1024,
    )
    assert more.kept - held.kept == ROWS * TOKENS * WIDE * 2  # a layer's input, of 2 bytes
    full = learning(Sketch(LLAMA, torch.bfloat16), ROWS, TOKENS, ANSWER, chunk=1024)
    assert full.kept > 4 * held.kept


def test_logits_are_those_of_a_chunk():
    many = 100_000  # words, so that logits are what is held
    wide = Sketch(LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": many}), torch.bfloat16)
    of_chunk = {chunk: learning(wide, 64, TOKENS, ANSWER, chunk=chunk).head for chunk in (128, 256)}
    # from logits of 128 tokens to those of 256, in fp32: a few tensors of that size
    assert 3 <= (of_chunk[256] - of_chunk[128]) / (128 * many * 4) <= 6
    assert learning(wide, 32, TOKENS, ANSWER, chunk=128).head == pytest.approx(of_chunk[128], rel=0.05)


def test_the_cache_by_hand():
    # Keys and values of 2 heads of 16, of 2 bytes: 9 of each prompt's 10 tokens, and 64 places for 40 of an answer.
    found = decoding(Sketch(LLAMA, torch.bfloat16), 3, 2, 10, 40, Sampling(top_p=0.9))
    assert found.cache == pytest.approx(2 * LAYERS * (2 * 16) * 2 * 3 * (9 + 2 * 64), rel=0.02)
    assert found.beside > 0


def test_a_forward_without_gradient_keeps_no_layers():
    sketch = Sketch(LLAMA, torch.bfloat16)
    deep = Sketch(LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 50}), torch.bfloat16)
    assert reading(sketch, ROWS, TOKENS, ANSWER, chunk=1024) == reading(deep, ROWS, TOKENS, ANSWER, chunk=1024)
    scores = replace(sketch, scores=True)
    assert reading(scores, 2 * ROWS, TOKENS, ANSWER, chunk=1024) == pytest.approx(
        2 * reading(scores, ROWS, TOKENS, ANSWER, chunk=1024), rel=0.02
    )


def test_adapters_alone_learn():
    found = sizes(Sketch(LLAMA, torch.bfloat16, lora=(4, "q_proj", True)))
    assert found.trained == LAYERS * 4 * (WIDE + WIDE)  # A and B of each query projection
