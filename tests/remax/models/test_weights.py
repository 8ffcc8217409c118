"""Checkpoints that do not hold the weights of their model: lacking, superfluous, of another shape, not numbers, cut."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from remax.models.policy import load_policy
from remax.models.reward_model import load_reward_model
from remax.models.weights import restore_buffers
from utils.run import UserError
from utils.tokenizer import load_tokenizer

FAMILIES = ("gpt2", "opt", "llama", "mistral", "qwen2", "gemma2", "cohere", "granite")
OTHERS = ("gpt_neox", "bloom", "gemma", "phi")


def policy(folder, **options):
    return load_policy(str(folder), "--m", dtype=torch.float32, tokenizer=load_tokenizer(str(folder)), **options)


def scorer(folder, **options):
    return load_reward_model(str(folder), "--m", dtype=torch.float32, tokenizer=load_tokenizer(str(folder)), **options)


def new_scorer(folder):
    return scorer(folder, new_head=True)


def change_weights(source: Path, target: Path, change) -> Path:
    """A copy of the folder after `change` of its weights by name."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def change_config(source: Path, target: Path, **fields) -> Path:
    shutil.copytree(source, target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return target


@pytest.fixture(scope="module")
def family_folder(make_policy, tokenizers, tmp_path_factory):
    """family_folder("bloom") -> a language model of one of FAMILIES or OTHERS."""
    from transformers import BloomConfig, GemmaConfig, GPTNeoXConfig, PhiConfig

    def make(family: str) -> Path:
        if family in FAMILIES:
            return make_policy(family)
        tokenizer = AutoTokenizer.from_pretrained(tokenizers["own"])
        sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0, "pad_token_id": tokenizer.pad_token_id}
        wide = {"intermediate_size": 64}
        config = {
            "gpt_neox": lambda: GPTNeoXConfig(**sizes, **wide),
            "bloom": lambda: BloomConfig(**sizes),
            "gemma": lambda: GemmaConfig(**sizes, **wide, num_key_value_heads=2, head_dim=8),
            "phi": lambda: PhiConfig(**sizes, **wide),
        }[family]()
        folder = tmp_path_factory.mktemp(family)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_whole_models_of_all_families_pass_and_others_do_not(family, family_folder, tmp_path):
    # Tied heads, the head that a new scorer leaves out, and its own new one are no faults.
    folder = family_folder(family)
    hf = policy(folder).hf
    loaders = (policy, new_scorer) if family not in ("cohere", "granite") else (policy,)  # of which there are none
    if new_scorer in loaders:
        new_scorer(folder).hf.save_pretrained(tmp_path / "scorer")
        load_tokenizer(str(folder)).save_pretrained(tmp_path / "scorer")
        assert scorer(tmp_path / "scorer").head.weight.shape == (1, 32 if family != "opt" else 16)
    layer = next(name for name in hf.state_dict() if ".1." in name).partition(".1.")[0] + ".1."
    lost = [name for name in load_file(folder / "model.safetensors") if name.startswith(layer)]
    assert lost

    def without_layer(weights):
        for name in lost:
            del weights[name]

    broken = change_weights(folder, tmp_path / "broken", without_layer)
    for load in loaders:
        with pytest.raises(UserError, match=f"--m: the weights of {broken} are not .* they lack .*and {len(lost) - 3}"):
            load(broken)


def two_more(weights):
    weights |= {"model.norm.bias": torch.ones(32), "value.weight": torch.ones(2)}


def narrow(weights):
    weights["model.norm.weight"] = torch.ones(7)


def poison(weights):
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


def overflow(weights):
    weights["model.norm.weight"][0] = float("inf")


def quantise(weights):
    for kind in ("q_proj", "o_proj"):
        name = f"model.layers.0.self_attn.{kind}.weight"
        weights[name] = (100 * weights[name]).to(torch.int8)


FAULTS = {
    "integers": (quantise, r"are integers \(I8\): model.layers.0.self_attn.o_proj.weight, .*q_proj.weight; expected"),
    "superfluous": (two_more, "hold without a place in the model .*model.norm.bias, value.weight. Expected"),
    "narrow": (narrow, r"hold in another shape model.norm.weight \(7,\) instead of \(32,\). Expected"),
    "nan": (poison, "are nan or infinite in float32: model.layers.1.mlp.up_proj.weight; take"),
    "inf": (overflow, "are nan or infinite in float32: model.norm.weight; take"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("load", [policy, new_scorer])
def test_faulty_weights_are_named(fault, load, make_policy, tmp_path):
    change, message = FAULTS[fault]
    folder = change_weights(make_policy("llama"), tmp_path / "broken", change)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_numbers_beyond_the_number_format_are_no_weights(make_policy, tmp_path):
    def large(weights):
        weights["model.norm.weight"][0] = 70_000.0  # the largest of fp16 is 65,504

    folder = change_weights(make_policy("llama"), tmp_path / "large", large)
    assert policy(folder)
    with pytest.raises(UserError, match="infinite in float16: model.norm.weight"):
        load_policy(str(folder), "--m", dtype=torch.float16, tokenizer=load_tokenizer(str(folder)))


def test_fewer_layers_than_weights_and_more_of_them(make_policy, tmp_path):
    with pytest.raises(UserError, match=r"they lack model.layers.2.input_layernorm.weight, .* and 15 more\. Expected"):
        policy(change_config(make_policy("llama"), tmp_path / "four", num_hidden_layers=4))
    with pytest.raises(UserError, match=r"without a place .* model.layers.1.input_layernorm.weight, .* and 6 more"):
        policy(change_config(make_policy("llama"), tmp_path / "one", num_hidden_layers=1))


def test_masks_and_frequencies_of_old_checkpoints_are_no_weights(make_policy, tmp_path):
    def old(weights):
        weights |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        weights |= {"model.layers.0.attn.masked_bias": torch.ones(1)}

    assert policy(change_weights(make_policy("llama"), tmp_path / "old", old))


def test_a_scorers_weights_are_no_policys_and_the_reverse(make_policy, make_scorer):
    with pytest.raises(UserError, match="is a LlamaForSequenceClassification; expected a causal language model"):
        policy(make_scorer("llama"))
    with pytest.raises(UserError, match="is a LlamaForCausalLM; expected a reward model"):
        scorer(make_policy("llama"))


def test_what_reads_both_ways_is_no_policy(make_policy, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    shutil.copytree(make_policy("llama"), tmp_path / "bert")
    config = BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="is a BertForMaskedLM; expected a causal language model"):
        policy(tmp_path / "bert")
    change_config(tmp_path / "bert", tmp_path / "lm", architectures=["BertLMHeadModel"])
    with pytest.raises(UserError, match="is a BertLMHeadModel; expected a causal language model"):
        policy(tmp_path / "lm")


@pytest.mark.parametrize("size", [0, 100, -9])
def test_a_cut_file_is_named(size, make_policy, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(make_policy("llama"), folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(UserError, match=r"--m: cannot load .*/cut' \(broken: model.safetensors\): SafetensorError"):
        policy(folder)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "index, message",
    [
        ({"weight_map": {"model.norm.weight": "../llama/model.safetensors"}}, "names ../llama/model.safetensors; expe"),
        ({"weight_map": {"model.norm.weight": "/etc/passwd"}}, "names /etc/passwd; expected files in its own folder"),
        ({"weight_map": {"model.norm.weight": ".."}}, "names ..; expected files in its own folder"),
        ({"weight_map": {"model.norm.weight": "absent.safetensors"}}, "cannot load .* FileNotFoundError"),
        ({}, "index.json is no index of weights"),
    ],
)
def test_an_index_names_files_of_its_own_folder(kind, index, message, make_policy, tmp_path):
    folder = tmp_path / "index"
    shutil.copytree(make_policy("llama"), folder)
    (folder / "model.safetensors").unlink()
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {}} | index))
    with pytest.raises(UserError, match=message):
        policy(folder)


def pickled(payload, file: Path) -> None:
    torch.save(payload, file, _use_new_zipfile_serialization=False)


class Payload:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("write", [lambda payload, file: torch.save({"lm_head.weight": payload}, file), pickled])
def test_code_in_a_file_of_weights_is_never_run(name, write, make_policy, tmp_path):
    folder, trace = tmp_path / "planted", tmp_path / "was_run"
    shutil.copytree(make_policy("llama"), folder)
    (folder / "model.safetensors").unlink()
    write(Payload(trace), folder / name)
    with pytest.raises(UserError, match="cannot load"):
        policy(folder)
    assert not trace.exists()
    torch.load(io.BytesIO((folder / name).read_bytes()), weights_only=False)
    assert trace.exists()  # the file holds what would have been run


def test_buffers_that_zero3_rounded_are_made_anew(make_policy):
    # Rounded to bfloat16 a frequency has three digits: .01 becomes .010009765625.
    whole, rounded = (AutoModelForCausalLM.from_pretrained(make_policy("llama")) for _ in range(2))
    rotary = rounded.model.rotary_emb
    for name in ("inv_freq", "original_inv_freq"):
        rotary._buffers[name] = rotary._buffers[name].bfloat16()
    restore_buffers(rounded, whole, "--model")
    for name, buffer in whole.named_buffers():
        assert torch.equal(rounded.get_buffer(name), buffer) and buffer.dtype == torch.float32
    rotary.inv_freq = rotary.inv_freq.half()
    del rotary.config  # now nothing tells how to build it
    with pytest.raises(UserError, match="--model: ZeRO 3 rounds the buffers model.rotary_emb.inv_freq to 16 bits"):
        restore_buffers(rounded, whole, "--model")
