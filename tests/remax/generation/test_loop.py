"""Our own decode loop against transformers' `generate`: the same answers, from the same random numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig

from remax.core.sampling import Sampling
from remax.core.sequences import Prompts
from remax.generation import loop
from remax.generation.cache import BLOCK, PromptCache
from remax.generation.decoder import GenerationSettings
from remax.generation.hugging_face import HuggingFaceDecoder
from remax.generation.loop import SharedPromptDecoder, fault_of

WORDS, PAD, END = 97, 0, [1, 17, 33, 50, 81]
USUAL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SHARED_HEADS, SLIDING = {"num_key_value_heads": 2}, {"sliding_window": 6}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
SERVED = {
    "opt": {**USUAL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "llama": USUAL,
    "gpt2": GPT,
    "gpt_neox": USUAL,
    "mistral": USUAL | SHARED_HEADS | SLIDING,
    "qwen2": USUAL | SHARED_HEADS,
    "qwen3": USUAL | SHARED_HEADS | {"head_dim": 16},
    "gemma2": USUAL | SHARED_HEADS | SLIDING | {"head_dim": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": USUAL | SHARED_HEADS | SLIDING | {"head_dim": 8},
    "gpt_oss": USUAL | SHARED_HEADS | SLIDING | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi": USUAL,
    "cohere": USUAL,
}
REFUSED = {
    "falcon": ({k: v for k, v in USUAL.items() if k != "intermediate_size"}, "their attention cannot be exchanged"),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, "their attention cannot be exchanged"),
    "deepseek_v3": (
        USUAL
        | dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8)
        | dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16),
        "their attention alters the keys that a cache gives",
    ),
    "llama": (
        USUAL | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "their positions turn on the longest row of a batch (dynamic)",
    ),
}


def make(kind: str, fields: dict, dtype: torch.dtype = torch.float32):
    """A model whose distributions are far from uniform."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](vocab_size=WORDS, bos_token_id=2, eos_token_id=1, pad_token_id=PAD, **fields)
    eager = kind in ("gemma2", "gpt_oss")  # softcapping and sinks
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if eager else None).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = GenerationConfig(eos_token_id=END)
    return model.to(dtype)


def prompts() -> Prompts:
    """Of 1 to 12 tokens; the first has an end token inside."""
    lengths, noise = torch.tensor([9, 1, 4, 12, 7]), torch.Generator().manual_seed(5)
    ids = torch.randint(3, WORDS, (5, 12), generator=noise)
    ids[0, -3] = END[0]
    return Prompts(ids.masked_fill(torch.arange(12) < 12 - lengths[:, None], PAD), lengths)


def decode(decoder, model, settings, **options):
    torch.manual_seed(1)
    options = {"samples": 3, "greedy": True, "logprobs": True} | options
    return decoder(model, prompts().to(model.device), settings, **options)


def assert_same(got, expected, tolerance: float = 1e-4) -> None:
    for name in ("sampled", "greedy"):
        rows, wanted = getattr(got, name), getattr(expected, name)
        assert (rows is None) == (wanted is None)
        if rows is not None:
            assert torch.equal(rows.input_ids, wanted.input_ids)
            assert torch.equal(rows.answer_lengths, wanted.answer_lengths)
            assert torch.equal(rows.prompt_lengths, wanted.prompt_lengths)
    for name in ("logprobs", "greedy_logprobs"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("kind", SERVED)
def test_answers_are_those_of_generate(kind):
    # Padding, end tokens in prompts, several of them, a cap, windows that answers outgrow; and neither how many prompts
    # are decoded at once nor when ended rows leave changes anything.
    model = make(kind, SERVED[kind])
    assert fault_of(model) == ""
    before = model.config._attn_implementation
    lengths = set()
    for sampling in (Sampling(), Sampling(0.7, top_p=0.8, top_k=20)):
        settings = GenerationSettings(40, PAD, sampling, max_greedy_tokens=11)
        expected = decode(HuggingFaceDecoder(), model, settings)
        for decoder in (SharedPromptDecoder(), SharedPromptDecoder(cache_bytes=9000, look_every=4)):
            assert_same(decode(decoder, model, settings), expected)
        lengths |= set(expected.sampled.answer_lengths.tolist())
    assert max(lengths) > BLOCK and len(lengths) > 3
    assert model.config._attn_implementation == before


def test_sampled_or_greedy_alone():
    model, settings = make("llama", USUAL), GenerationSettings(20, PAD, max_greedy_tokens=11)
    for options in ({"samples": 0}, {"greedy": False}, {"samples": 1}):
        answers = [
            decode(decoder, model, settings, logprobs=False, **options)
            for decoder in (SharedPromptDecoder(), HuggingFaceDecoder())
        ]
        for name in ("sampled", "greedy"):
            rows = [getattr(found, name) for found in answers]
            assert rows[0] is rows[1] is None or torch.equal(rows[0].input_ids, rows[1].input_ids)
        assert answers[0].logprobs is None and answers[0].greedy_logprobs is None


@pytest.mark.parametrize("kind", REFUSED)
def test_other_models_answer_by_generate_and_it_is_said_once(kind, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(loop, "warn", said.append)
    fields, reason = REFUSED[kind]
    model, decoder, settings = make(kind, fields), SharedPromptDecoder(), GenerationSettings(9, PAD)
    for _ in range(2):
        assert_same(decode(decoder, model, settings), decode(HuggingFaceDecoder(), model, settings))
    assert said == [f"answers of models of the type {kind!r} come from transformers' generate: {reason}"]


def test_a_model_that_a_cache_of_ours_would_not_serve_exactly_is_found(monkeypatch):
    model = make("llama", USUAL)
    hidden = PromptCache.hidden
    monkeypatch.setattr(PromptCache, "hidden", lambda *_: torch.zeros(1, dtype=torch.bool))
    assert fault_of(model) == "their logits by its cache differ from those of a forward"
    monkeypatch.setattr(PromptCache, "hidden", hidden)
    model = make("mistral", SERVED["mistral"])

    class Silent:  # as a family that tells only its masks of the window
        def __getattr__(self, name):
            return None if name == "sliding_window" else getattr(model.config, name)

    for layer in model.model.layers:
        layer.self_attn.config = Silent()
    assert fault_of(model) == "their sliding window is not told to the attention"


def test_the_attention_is_put_back_after_an_error(monkeypatch):
    model, decoder = make("llama", USUAL), SharedPromptDecoder()
    decode(decoder, model, GenerationSettings(2, PAD))
    monkeypatch.setattr(loop, "draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decode(decoder, model, GenerationSettings(2, PAD))
    assert model.config._attn_implementation == "sdpa"


def rows_of_forwards(model, monkeypatch) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes of what is read, and of what is decoded."""
    shapes: tuple[list, list] = ([], [])
    backbone, forward = model.base_model.forward, model.forward
    decoding = []

    def reads(**kwargs):
        if not decoding:
            shapes[0].append(tuple(kwargs["input_ids"].shape))
        return backbone(**kwargs)

    def decodes(**kwargs):
        shapes[1].append(tuple(kwargs["input_ids"].shape))
        decoding.append(True)
        try:
            return forward(**kwargs)
        finally:
            decoding.clear()

    monkeypatch.setattr(model.base_model, "forward", reads)
    monkeypatch.setattr(model, "forward", decodes)
    return shapes


def test_prompts_are_read_once_and_rows_leave(monkeypatch):
    model, decoder, settings = (
        make("llama", USUAL),
        SharedPromptDecoder(),
        GenerationSettings(30, PAD, max_greedy_tokens=5),
    )
    decoder.faults[model] = ""
    read, decoded = rows_of_forwards(model, monkeypatch)
    answers = decode(decoder, model, settings)
    assert read == [(5, 11)]  # all prompts but their last tokens, once for 4 answers each
    rows = [shape[0] for shape in decoded]
    assert rows[0] == 20 and rows == sorted(rows, reverse=True) and {shape[1] for shape in decoded} == {1}
    assert rows[5] <= 15  # the greedy ones have left
    lengths = torch.cat([answers.sampled.answer_lengths, answers.greedy.answer_lengths])
    assert len(rows) == lengths.max()
    alive = [int((lengths > step).sum()) for step in range(len(rows))]
    assert all(a <= r and 8 * a > 7 * r - 8 for a, r in zip(alive, rows, strict=True))  # an eighth may wait
    decoded.clear()
    decode(decoder, model, settings, samples=0)
    assert len(decoded) <= 5


def test_memory_bounds_how_many_prompts_are_decoded_at_once(monkeypatch):
    # Keys and values of a token take 2 * 2 layers * 32 numbers of 4 bytes, 512 in all; a prompt of P tokens with two
    # answers of 6 takes P + 12 tokens, and all of a part count as its longest: 3 of (1, 4, 7) are 57, (9, 12) are 48.
    model, settings = make("llama", USUAL), GenerationSettings(6, PAD)
    decoder = SharedPromptDecoder(cache_bytes=57 * 512)
    decoder.faults[model] = ""
    read, _ = rows_of_forwards(model, monkeypatch)
    decode(decoder, model, settings, samples=1)
    assert read == [(3, 6), (2, 11)]


def test_prompts_are_read_in_parts_of_a_bounded_size(monkeypatch):
    monkeypatch.setattr(loop, "READ_AT_ONCE", 16)
    model, settings = make("llama", USUAL), GenerationSettings(8, PAD)
    read, _ = rows_of_forwards(model, monkeypatch)
    decoder = SharedPromptDecoder()
    decoder.faults[model] = ""
    answers = decode(decoder, model, settings)
    assert read == [(2, 3), (2, 8), (1, 11)]
    monkeypatch.undo()
    assert_same(answers, decode(HuggingFaceDecoder(), model, settings))


def test_a_look_at_the_model_draws_nothing():
    model, settings = make("llama", USUAL), GenerationSettings(8, PAD)
    decoder = SharedPromptDecoder()
    assert_same(decode(decoder, model, settings), decode(decoder, model, settings))


def test_16_bits():
    model, settings = make("llama", USUAL, torch.bfloat16), GenerationSettings(8, PAD, Sampling(top_p=0.9))
    decoder = SharedPromptDecoder()
    answers = decode(decoder, model, settings)
    assert not decoder.faults[model] and answers.logprobs.dtype == torch.float32
    expected = decode(HuggingFaceDecoder(), model, settings)
    first = slice(0, 1)  # of each answer, whose contexts are equal
    same = answers.sampled.answer_ids[:, 0] == expected.sampled.answer_ids[:, 0]
    assert same.float().mean() > 0.7
    torch.testing.assert_close(answers.logprobs[same, first], expected.logprobs[same, first], atol=0.2, rtol=0.1)
