"""PEFT folders on their base models: loaded merged and apart, against PEFT itself; exported again; and broken ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from remax.checkpoint.export import export
from remax.models.loading import load_config
from remax.models.lora import adapters_alone, add_lora
from remax.models.policy import PolicyModel, check_policy_config, load_policy
from remax.models.reward_model import RewardModel, check_reward_config, load_reward_model
from remax.models.saved_adapters import add_saved
from utils.adapter_folder import CONFIG, WEIGHTS
from utils.run import UserError
from utils.tokenizer import load_tokenizer

FLAG = "--model_name_or_path"
SETTINGS = {
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "opt": {"target_modules": "all-linear", "use_rslora": True},
    "llama": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 5},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 16},
        "exclude_modules": ["model.layers.0.mlp.down_proj"],
    },
}
IDS = torch.arange(5, 25).reshape(2, 10)


def policy(folder: Path | str, merged: bool = True, dropout: float = 0.0) -> PolicyModel:
    model = load_policy(str(folder), FLAG, dtype=torch.float32, tokenizer=load_tokenizer(str(folder)), merged=merged)
    if not merged:
        add_saved(model.hf, str(folder), FLAG, dropout)
    return model.eval()


def scorer(folder: Path | str, **options) -> RewardModel:
    tokenizer = load_tokenizer(str(folder))
    return load_reward_model(str(folder), FLAG, dtype=torch.float32, tokenizer=tokenizer, **options).eval()


@pytest.mark.parametrize("family", list(SETTINGS))
@torch.no_grad()
def test_a_policy_is_what_peft_says_merged_and_apart_and_exported_again(family, make_policy, save_adapters, tmp_path):
    base = make_policy(family)
    expected = save_adapters(base, tmp_path / "a", **SETTINGS[family])(IDS).logits
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert not torch.allclose(plain(IDS).logits, expected, atol=0.1)

    merged, apart = policy(tmp_path / "a"), policy(tmp_path / "a", merged=False)
    torch.testing.assert_close(merged.hf(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, p in merged.hf.named_parameters() if p.requires_grad] == names
    assert torch.equal(apart.hf(IDS).logits, expected)
    learn = {name for name, p in apart.hf.named_parameters() if p.requires_grad}
    assert learn == {name for name, _ in apart.hf.named_parameters() if "lora_" in name} and adapters_alone(apart.hf)

    for model, alone in [(merged, False), (apart, True)]:
        export(model, load_tokenizer(str(base)), tmp_path / "out", zero3=False)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert (tmp_path / "out" / "adapter").exists() == alone
    config = json.loads((tmp_path / "out" / "adapter" / CONFIG).read_text())
    before = json.loads((tmp_path / "a" / CONFIG).read_text())
    of_training = {"lora_dropout": 0.0, "init_lora_weights": True, "base_model_name_or_path": str(base)}
    assert {name: config[name] for name in before} | {"target_modules": 0, "auto_mapping": 0} == (
        before | of_training | {"target_modules": 0, "auto_mapping": 0}
    )
    written, read = (load_file(tmp_path / place / WEIGHTS) for place in ("out/adapter", "a"))
    assert written.keys() == read.keys() and all(torch.equal(written[name], read[name]) for name in read)
    assert torch.equal(
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter").eval()(IDS).logits, expected
    )
    assert torch.equal(policy(tmp_path / "out" / "adapter", merged=False).hf(IDS).logits, expected)


@torch.no_grad()
def test_a_score_head_comes_and_goes_with_its_adapters(make_policy, save_adapters, tmp_path):
    # Step 2 begins with a language model without a pad token, and adds one.
    base = make_policy("llama", "none")
    save_adapters(base, tmp_path / "lm")
    with pytest.raises(UserError, match="lm is a LlamaForCausalLM; expected a reward model"):
        scorer(tmp_path / "lm")
    of_no_kind = shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"architectures": None, "id2label": {"0": "score"}}
    (of_no_kind / "config.json").write_text(json.dumps(config))
    save_adapters(of_no_kind, tmp_path / "lm of no kind")
    with pytest.raises(UserError, match="no weights for its score head"):
        scorer(tmp_path / "lm of no kind")
    tokenizer = load_tokenizer(str(tmp_path / "lm"))
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    options = {"dtype": torch.float32, "tokenizer": tokenizer, "new_head": True, "merged": False}
    model = load_reward_model(str(tmp_path / "lm"), FLAG, **options)
    add_saved(model.hf, str(tmp_path / "lm"), FLAG)
    assert model.hf.score.weight.requires_grad and adapters_alone(model.hf)
    model.hf.score.weight.normal_()
    expected = model.eval().hf(IDS).logits
    export(model, tokenizer, tmp_path / "out", zero3=False)

    folder = tmp_path / "out" / "adapter"
    assert json.loads((folder / CONFIG).read_text())["modules_to_save"] == ["score"]
    torch.testing.assert_close(scorer(folder).hf(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert load_tokenizer(str(folder)).pad_token == "<|pad|>"
    again = scorer(folder, merged=False)
    add_saved(again.hf, str(folder), FLAG)
    assert torch.equal(again.hf(IDS).logits, expected) and again.hf.score.weight.requires_grad
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    plain.resize_token_embeddings(len(tokenizer))
    plain.config.pad_token_id = tokenizer.pad_token_id
    assert torch.equal(PeftModel.from_pretrained(plain, folder).eval()(IDS).logits, expected)
    config = load_config(str(folder), FLAG)
    check_reward_config(config, "m", FLAG)
    with pytest.raises(UserError, match="m is a LlamaForSequenceClassification; expected a causal language model"):
        check_policy_config(config, "m", FLAG)


@torch.no_grad()
def test_a_reward_model_that_peft_saved(make_policy, save_adapters, tmp_path):
    expected = save_adapters(make_policy("opt"), tmp_path / "a", scorer=True)(IDS).logits
    torch.testing.assert_close(scorer(tmp_path / "a").hf(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert load_config(str(tmp_path / "a"), FLAG).num_labels == 1


@torch.no_grad()
def test_new_adapters_on_merged_ones_have_no_folder_as_their_base(make_policy, save_adapters, tmp_path):
    # As a critic with adapters of its own may have, which begins as a reward model from a PEFT folder.
    save_adapters(make_policy("llama"), tmp_path / "a", scorer=True)
    model = scorer(tmp_path / "a")
    add_lora(model.hf, 2, "all-linear", True, "--lora_module_name")
    expected = model.hf(IDS).logits
    assert not adapters_alone(model.hf)
    export(model, load_tokenizer(str(tmp_path / "a")), tmp_path / "out", zero3=False)
    assert not (tmp_path / "out" / "adapter").exists()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_head_that_peft_saved_whole_learns_on_and_is_written_again(make_policy, save_adapters, tmp_path):
    base = make_policy("llama")
    expected = save_adapters(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])(IDS).logits
    torch.testing.assert_close(policy(tmp_path / "a").hf(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    apart = policy(tmp_path / "a", merged=False)
    assert apart.hf.lm_head.weight.requires_grad and adapters_alone(apart.hf)
    torch.testing.assert_close(apart.hf(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    export(apart, load_tokenizer(str(base)), tmp_path / "out", zero3=False)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_adapters_on_an_output_embedding_of_its_own(make_policy, save_adapters, tmp_path):
    expected = save_adapters(make_policy("llama"), tmp_path / "a", target_modules=["lm_head"])(IDS).logits
    for merged in (True, False):
        model = policy(tmp_path / "a", merged)
        torch.testing.assert_close(model.hf(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        hidden = model.hf.model(IDS).last_hidden_state[0]
        torch.testing.assert_close(model.head(hidden), expected[0], rtol=1e-4, atol=1e-4)
    save_adapters(make_policy("qwen2"), tmp_path / "tied", target_modules=["lm_head"])
    with pytest.raises(UserError, match="tied in its base model; merge"):
        policy(tmp_path / "tied")


def test_dropout_is_that_of_the_present_training(make_policy, save_adapters, tmp_path):
    save_adapters(make_policy("llama"), tmp_path / "a")  # with .5
    for dropout in (0.0, 0.25):
        model = policy(tmp_path / "a", merged=False, dropout=dropout).train()
        assert torch.equal(model.hf(IDS).logits, model.hf(IDS).logits) == (dropout == 0)


def test_the_base_is_found_from_here_and_from_the_folder(make_policy, save_adapters, tmp_path, monkeypatch):
    shutil.copytree(make_policy("llama"), tmp_path / "base")
    save_adapters(tmp_path / "base", tmp_path / "a")
    for name, here in [("base", tmp_path), ("../base", "/"), (str(tmp_path / "base"), "/")]:
        monkeypatch.chdir(here)
        change(tmp_path / "a", base_model_name_or_path=name)
        policy(tmp_path / "a")


def change(folder: Path, **fields) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rewrite(folder: Path, **tensors) -> None:
    """Tensors in the place of those whose names end so; None takes one out."""
    held = load_file(folder / WEIGHTS)
    for end, value in tensors.items():
        (name,) = [name for name in held if name.endswith(end.replace("__", "."))] or [end]
        held = {k: v for k, v in held.items() if k != name} | ({} if value is None else {name: value})
    save_file(held, folder / WEIGHTS)


A, B = "layers__1__self_attn__v_proj__lora_A__weight", "layers__1__self_attn__v_proj__lora_B__weight"
FAULTS = {
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, {}, f"{CONFIG} has peft_type 'PROMPT_TUNING'; expected LORA"),
    "no base": ({"base_model_name_or_path": None}, {}, f"{CONFIG} has base_model_name_or_path None; expected"),
    "base that is nowhere": (
        {"base_model_name_or_path": "./nowhere"},
        {},
        f"{CONFIG} has base_model_name_or_path './nowhere', and there is no such folder",
    ),
    "base of the hub": (
        {"base_model_name_or_path": "me/nowhere"},
        {},
        f"{FLAG} \\(base_model_name_or_path of .*{CONFIG}\\): me/nowhere is neither a folder nor in the cache",
    ),
    "a revision": ({"revision": "v2"}, {}, f"{CONFIG} has revision 'v2'; expected none"),
    "DoRA": ({"use_dora": True}, {}, f"{CONFIG} has use_dora True, which is not done here; merge"),
    "biases": ({"bias": "all"}, {}, f"{CONFIG} has bias 'all', which is not done here; merge"),
    "what is unknown": ({"use_next_year": 1}, {}, f"{CONFIG} has use_next_year 1, which is not done here"),
    "PiSSA": ({"init_lora_weights": "pissa"}, {}, f"{CONFIG} has init_lora_weights 'pissa', which changes the base"),
    "layers of another model": ({"target_modules": ["Wqkv"]}, {}, f"{CONFIG} do not fit their base model: .*Wqkv"),
    "a rank of words": ({"r": "three"}, {}, f"{CONFIG} do not fit their base model"),
    "another rank": ({"r": 4}, {}, r"hold in another shape .*lora_A.default.weight \(3, 32\) instead of \(4, 32\)"),
    "fewer layers": ({"target_modules": ["q_proj"]}, {}, "hold without a place in the model .*mlp.down_proj.lora_A"),
    "a tensor too few": ({}, {A: None}, "they lack .*v_proj.lora_A.default.weight"),
    "nan": ({}, {B: torch.full((32, 3), torch.nan)}, f"weights of .*{WEIGHTS} are nan or infinite: .*v_proj.lora_B"),
    "integers": ({}, {B: torch.ones(32, 3, dtype=torch.int8)}, f"weights of .*{WEIGHTS} are integers: .*v_proj.lora_B"),
    "a score head": ({}, {"base_model.model.score.weight": torch.ones(1, 32)}, "LlamaForSequenceClassification"),
}


@pytest.fixture(scope="module")
def sound(make_policy, save_adapters, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "a"
    save_adapters(make_policy("llama"), folder)
    return folder


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_faulty_folder_is_refused_in_one_line(name, sound, tmp_path):
    fields, tensors, message = FAULTS[name]
    folder = shutil.copytree(sound, tmp_path / "a")
    change(folder, **fields)
    rewrite(folder, **tensors)
    for merged in (True, False):
        with pytest.raises(UserError, match=message) as error:
            policy(folder, merged)
        assert str(error.value).startswith(FLAG) and "\n" not in str(error.value)


def test_weights_that_are_no_safetensors_are_refused(sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "a")
    (folder / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(UserError, match=f"cannot read .*{WEIGHTS}: .*; save the adapters again"):
        load_config(str(folder), FLAG)
    os.rename(folder / WEIGHTS, folder / "adapter_model.bin")
    with pytest.raises(UserError, match=f"{WEIGHTS}: no such file .adapter_model.bin is a pickle, which is never read"):
        load_config(str(folder), FLAG)
    (folder / CONFIG).write_text("{")
    with pytest.raises(UserError, match=f"{CONFIG} is no JSON"):
        load_config(str(folder), FLAG)


def test_adapters_on_adapters_are_refused(sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "a")
    change(folder, base_model_name_or_path=str(sound))
    with pytest.raises(UserError, match="which holds adapters; expected a model"):
        load_config(str(folder), FLAG)
