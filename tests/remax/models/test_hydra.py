"""A policy and a reward model in one set of weights: what is written is either for plain transformers, and one forward
says what the two would."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from remax.checkpoint.export import export
from remax.core.sequences import Sequences
from remax.models import hydra
from remax.models.hydra import HydraModel, load_hydra
from remax.models.lora import add_lora
from remax.models.policy import load_policy
from remax.models.reward_model import load_reward_model, prepare_pad_token
from utils.run import UserError
from utils.tokenizer import load_tokenizer

FAMILIES = ("gpt2", "opt", "llama", "mistral", "qwen2", "gemma2")
AUTO = {"lm_head.weight": AutoModelForCausalLM, "score.weight": AutoModelForSequenceClassification}


def load(folder, **options) -> tuple[HydraModel, object]:
    tokenizer = load_tokenizer(str(folder))
    prepare_pad_token(tokenizer)
    torch.manual_seed(0)
    options = {"dtype": torch.float32, "tokenizer": tokenizer, "new_head": True} | options
    return load_hydra(str(folder), "--model", **options).eval(), tokenizer


@pytest.fixture(scope="module")
def make_hydra(make_policy, tmp_path_factory):
    """make_hydra("opt") -> folder of a model with both heads, made of a language model."""
    base = tmp_path_factory.mktemp("hydras")

    def make(family: str, pad: str = "own"):
        folder = base / f"{family}-{pad}"
        if not folder.is_dir():
            model, tokenizer = load(make_policy(family, pad))
            with torch.no_grad():
                model.score_head.weight.mul_(20)  # so that scores differ
            export(model, tokenizer, folder, zero3=False)
        return folder

    return make


@pytest.mark.parametrize(("family", "pad"), [(f, "own") for f in FAMILIES] + [("gpt2", "none"), ("llama", "eos")])
def test_plain_transformers_reads_either_model_from_the_folder(family, pad, make_policy, make_hydra):
    folder = make_hydra(family, pad)
    model, tokenizer = load(folder, new_head=False)
    state = load_file(folder / "model.safetensors")
    assert "score.weight" in state
    for head, auto in AUTO.items():
        plain, report = auto.from_pretrained(folder, output_loading_info=True)
        other = {"lm_head.weight", "score.weight"} - {head}
        assert not report["missing_keys"] and not report["mismatched_keys"] and set(report["unexpected_keys"]) <= other
        tied = model.hf.config.tie_word_embeddings
        assert set(plain.state_dict()) - set(state) <= ({"lm_head.weight"} if tied else set())
        for name, tensor in plain.state_dict().items():
            assert name not in state or torch.equal(tensor, state[name]), name
        assert plain.config.num_labels == 1 and plain.config.pad_token_id == tokenizer.pad_token_id
        assert plain.config.pad_token_id != tokenizer.eos_token_id
    # The weights of the start, and what a pad token adds to them.
    before = AutoModelForCausalLM.from_pretrained(make_policy(family, pad)).state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(after[name][: len(tensor)], tensor) for name, tensor in before.items())


def test_shards_are_read_as_well(make_hydra, tmp_path):
    model, tokenizer = load(make_hydra("llama"), new_head=False)
    model.hf.save_pretrained(tmp_path, max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    policy = load_policy(str(tmp_path), "--model", dtype=torch.float32, tokenizer=tokenizer)
    scorer = load_reward_model(str(tmp_path), "--model", dtype=torch.float32, tokenizer=tokenizer)
    assert torch.equal(policy.hf.lm_head.weight, model.hf.lm_head.weight)
    assert torch.equal(scorer.hf.score.weight, model.hf.score.weight)


@pytest.mark.parametrize(
    ("family", "packing"), [(f, False) for f in FAMILIES] + [(f, True) for f in FAMILIES if f != "gemma2"]
)
@torch.no_grad()
def test_one_forward_says_what_the_two_models_say(family, packing, make_hydra, sequences_of):
    folder = make_hydra(family)
    model, tokenizer = load(folder, new_head=False, packing=packing)
    options = {"dtype": torch.float32, "tokenizer": tokenizer}
    policy = load_policy(str(folder), "--model", **options).eval()
    scorer = load_reward_model(str(folder), "--model", **options).eval()
    rows = sequences_of(3, 6, 300)
    rows = Sequences(rows.input_ids.flip(0), rows.prompt_lengths.flip(0), rows.answer_lengths.flip(0))  # longest last
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(model(rows)[0], policy(rows)[0], **close)
    scores = scorer(rows)
    assert scores.std() > 0.1
    torch.testing.assert_close(model(rows, head="score"), scores, **close)
    for first in (6, 4):
        some = rows.select(slice(0, first))
        for chunks in (1, 3):
            logprobs, of_all = model(rows, head="both", rows=first, chunks=chunks)
            torch.testing.assert_close(logprobs, policy(some)[0], **close)
            torch.testing.assert_close(of_all, scores, **close)


@torch.no_grad()
def test_a_new_token_is_improbable_everywhere(make_policy, sequences_of, tmp_path):
    # Its logit is the mean of the others', so by Jensen's inequality no more than 1 / 300 of their sum. The logits of
    # all tokens are lowered by 32 * 3 here, as GPT-2's are: one of 0 would be all but certain.
    start = make_policy("gpt2", "none")
    hf = AutoModelForCausalLM.from_pretrained(start)
    hf.transformer.ln_f.bias += 3.0
    hf.transformer.wte.weight -= 1.0
    hf.save_pretrained(tmp_path)
    load_tokenizer(str(start)).save_pretrained(tmp_path)
    for folder in (tmp_path, make_policy("llama", "none")):
        model, tokenizer = load(folder)
        rows = sequences_of(5, 4, 300)
        logits = model.head(model.hidden(rows)[rows.answer_mask])
        assert logits.shape[1] == 301 == len(tokenizer) and logits.std() > 0.5
        assert logits.softmax(1)[:, 300].max() <= 1 / 300
        assert torch.allclose(logits[:, 300], logits[:, :300].mean(1), atol=1e-4)


def test_adapters_are_merged_and_the_score_head_learns(make_policy, sequences_of, tmp_path):
    model, tokenizer = load(make_policy("llama"))
    add_lora(model.hf, 3, "self_attn", True, "--lora_module_name")
    rows = sequences_of(2, 4, 300)
    logprobs, scores = model(rows, head="both")
    (logprobs.sum() + scores.sum()).backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == ("lora_" in name or "score" in name), name
            if parameter.grad is not None:
                parameter += 0.1 * torch.randn(parameter.shape)
        expected = model(rows, head="both")
    export(model, tokenizer, tmp_path, zero3=False)
    again, _ = load(tmp_path, new_head=False)
    torch.testing.assert_close(again(rows, head="both"), expected, rtol=1e-4, atol=1e-4)


def refusal(folder, **options) -> str:
    with pytest.raises(UserError) as refused:
        load(folder, **options)
    return str(refused.value)


def test_what_has_no_two_heads_is_refused(make_policy, make_scorer, make_hydra, tmp_path):
    assert "is a LlamaForCausalLM; expected a language model with a score head in one folder" in refusal(
        make_policy("llama"), new_head=False
    )
    assert "expected a causal language model" in refusal(make_scorer("llama"))
    assert "models of the type 'cohere' have no score head" in refusal(make_policy("cohere"))
    broken = tmp_path / "broken"
    shutil.copytree(make_hydra("llama"), broken)
    state = load_file(broken / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "score.weight"}, broken / "model.safetensors", {"format": "pt"})
    assert "they lack score.weight" in refusal(broken, new_head=False)


def test_a_classifier_with_other_names_is_refused(make_policy, monkeypatch):
    class Renamed(LlamaForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.backbone = self.model
            del self.model

    monkeypatch.setattr(hydra, "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", {LlamaConfig: Renamed})
    assert "models of the type 'llama' have no score head beside" in refusal(make_policy("llama"))


def test_a_spare_head_needs_its_name_in_the_configuration(make_hydra, tmp_path):
    folder = tmp_path / "unnamed"
    shutil.copytree(make_hydra("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UserError, match="they hold without a place in the model score.weight"):
        load_policy(str(folder), "--model", dtype=torch.float32, tokenizer=load_tokenizer(str(folder)))
