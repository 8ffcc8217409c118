"""The reward model is Hugging Face's own sequence classifier: the same score for the same text, alone or in a padded
batch, whatever the pad token."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from remax.checkpoint.export import export
from remax.core.sequences import Sequences
from remax.models.reward_model import (
    PAD_TOKEN,
    RewardModel,
    load_reward_model,
    prepare_pad_token,
    store_score_statistics,
)
from utils.run import UserError
from utils.tokenizer import load_tokenizer

FAMILIES = ("gpt2", "opt", "llama", "mistral", "qwen2")
TEXTS = [("\n\nHuman: Name two birds.\n\nAssistant:", " An owl and a swan."), ("\n\nHuman: Hi", " a"), ("x", " y z")]


def encode(tokenizer, prompt: str, answer: str) -> tuple[list[int], int]:
    """Ids of prompt, answer and EOS, and the prompt's length."""
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return start + tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id], len(start)


def as_sequences(tokenizer) -> Sequences:
    rows = [encode(tokenizer, *text) for text in TEXTS]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row, _ in rows])
    prompt_lengths = torch.tensor([n for _, n in rows])
    return Sequences(ids, prompt_lengths, torch.tensor([len(row) for row, _ in rows]) - prompt_lengths)


def load(folder, *, new_head: bool = False, own_pad: bool = False):
    """The reward model; `own_pad` as step 2 starts, which gives the tokenizer a pad token of its own."""
    tokenizer = load_tokenizer(str(folder))
    if own_pad:
        prepare_pad_token(tokenizer)
    return load_reward_model(
        str(folder), "--rm", dtype=torch.float32, tokenizer=tokenizer, new_head=new_head
    ), tokenizer


@pytest.mark.parametrize("pad", ["own", "eos", "none"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_saved_model_gives_the_same_scores_in_plain_transformers(family, pad, make_policy, tmp_path):
    # As step 2: a language model becomes a reward model; then its export is read by transformers alone.
    torch.manual_seed(0)
    model, tokenizer = load(make_policy(family, pad), new_head=True, own_pad=True)
    model.hf.score.weight.mul_(20)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    if pad != "own" and family != "qwen2":  # transformers gives a Qwen tokenizer the pad token it lacks
        assert tokenizer.pad_token == PAD_TOKEN
        assert model.hf.get_input_embeddings().num_embeddings >= len(tokenizer)
    scores = model.eval()(as_sequences(tokenizer))
    assert scores.std() > 0.1
    export(model, tokenizer, tmp_path, zero3=False)

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    plain_tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side="right")
    texts = [prompt + answer + tokenizer.eos_token for prompt, answer in TEXTS]
    batch = plain_tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    assert (batch["attention_mask"] == 0).any()
    torch.testing.assert_close(plain(**batch).logits.squeeze(1), scores, rtol=1e-5, atol=1e-5)
    for text, score in zip(texts, scores, strict=True):
        alone = plain_tokenizer(text, return_tensors="pt", add_special_tokens=False)
        torch.testing.assert_close(plain(**alone).logits[0, 0], score, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_values_of_every_token_against_a_loop(family, make_scorer):
    model, tokenizer = load(make_scorer(family))
    model.eval()
    sequences = as_sequences(tokenizer)
    values = model(sequences, every_token=True)  # (B, A)
    for i in range(len(sequences)):
        start, n = int(sequences.prompt_lengths[i]), int(sequences.answer_lengths[i])
        for j in range(n):  # V before answer token j reads the tokens before it
            states = model.hf.base_model(sequences.input_ids[i : i + 1, : start + j]).last_hidden_state
            torch.testing.assert_close(values[i, j], model.hf.score(states[0, -1])[0], rtol=1e-4, atol=1e-4)
        assert not values[i, n:].any()


@torch.no_grad()
def test_what_stands_behind_the_end_does_not_matter(make_scorer):
    model, tokenizer = load(make_scorer("opt"))
    model.eval()
    sequences = as_sequences(tokenizer)
    noise = torch.randint(len(tokenizer), sequences.input_ids.shape)
    noisy = Sequences(
        torch.where(sequences.mask, sequences.input_ids, noise), sequences.prompt_lengths, sequences.answer_lengths
    )
    torch.testing.assert_close(model(noisy), model(sequences))


@torch.no_grad()
def test_a_bf16_model_scores_in_float32_with_the_bias_of_its_head(make_scorer):
    # Some families' heads have a bias. In bf16 a score near 40 has steps of 1/4.
    hf = AutoModelForSequenceClassification.from_pretrained(make_scorer("llama"), dtype=torch.bfloat16)
    torch.manual_seed(0)
    hf.score = torch.nn.Linear(hf.config.hidden_size, 1, dtype=torch.bfloat16)
    hf.score.bias.fill_(40.0)
    model, sequences = RewardModel(hf).eval(), as_sequences(load_tokenizer(str(make_scorer("llama"))))
    states = hf.base_model(sequences.input_ids).last_hidden_state
    by_hand = states.double() @ hf.score.weight[0].double() + 40.0  # (B, T)
    scores, values = model(sequences), model(sequences, every_token=True)
    assert scores.dtype == values.dtype == torch.float32
    torch.testing.assert_close(scores.double(), sequences.at(by_hand, sequences.end_index), rtol=1e-6, atol=1e-5)
    before = sequences.at(by_hand, sequences.predictor_columns) * sequences.answer_mask
    torch.testing.assert_close(values.double(), before, rtol=1e-6, atol=1e-5)


def test_a_pad_token_is_added_once(tokenizers):
    tokenizer = load_tokenizer(str(tokenizers["none"]))
    size = len(tokenizer)
    assert prepare_pad_token(tokenizer) and len(tokenizer) == size + 1
    assert not prepare_pad_token(tokenizer) and len(tokenizer) == size + 1
    own = load_tokenizer(str(tokenizers["own"]))
    assert not prepare_pad_token(own) and own.pad_token == "<pad>"


def test_a_language_model_is_no_reward_model(make_policy):
    with pytest.raises(UserError, match="--rm: .* is a LlamaForCausalLM; expected a reward model"):
        load(make_policy("llama"))


def test_a_reward_model_whose_head_was_lost_is_refused(make_scorer, tmp_path):
    shutil.copytree(make_scorer("llama"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "score.weight"}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match="no weights for its score head"):
        load(tmp_path / "model")
    load(tmp_path / "model", new_head=True)


def test_a_classifier_of_several_labels_is_refused(make_policy, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(make_policy("llama"), num_labels=3)
    model.save_pretrained(tmp_path)
    load_tokenizer(str(make_policy("llama"))).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has 3 labels; expected a reward model with one score"):
        load(tmp_path)


def test_score_statistics_survive_the_export(make_scorer, tmp_path):
    model, tokenizer = load(make_scorer("gpt2"))
    store_score_statistics(model, {"score_mean": 1.5, "score_std": 0.25, "accuracy": 0.7})
    export(model, tokenizer, tmp_path, zero3=False)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path).config
    assert (config.score_mean, config.score_std) == (1.5, 0.25)
