"""Exports at every ZeRO stage, read again by plain transformers: every tensor, the logits and the scores."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from remax.checkpoint.export import export, full_state_dict, refuse_without_room, write_note
from remax.core.sequences import Sequences
from remax.models.lora import add_lora, merge_adapters
from remax.models.policy import load_policy
from utils.run import UserError
from utils.tokenizer import load_tokenizer

ROWS = 4
POLICIES = {"gpt2": 300, "opt": 300, "llama": 300, "qwen2": 300}
STAGES = range(4)
TEXTS = [["\n\nHuman: Name two birds.\n\nAssistant:", " An owl and a swan."], ["\n\nHuman: Hi", " a"], ["x", " y z"]]
WIDE = {"llama": {"intermediate_size": 400}}  # some weights above the size up to which ZeRO-3 keeps them whole
FILE = "model.safetensors"
NAN = torch.zeros(32, 32).index_fill(0, torch.tensor([31]), math.nan)  # in the part of rank 1
REFUSED = {"more": ("value.weight", torch.ones(2)), "nan": ("model.layers.1.self_attn.o_proj.weight", NAN)}
SCORERS = [("llama", "own", 3), ("opt", "eos", 3), ("gpt2", "none", 3), ("llama", "none", 3), ("gpt2", "none", 2)]


@pytest.fixture(scope="module")
def exports(make_policy, save_adapters, save_rows, run_ranks, tmp_path_factory):
    """Every kind of model exported by two ranks, in one launch; and what they say of models that cannot be loaded."""
    rows = save_rows(7, ROWS, 300)
    policies = {family: str(make_policy(family, **WIDE.get(family, {}))) for family in POLICIES}
    checks = [
        {"check": "export_policy", "name": f"{family}-{stage}", "model": policies[family], "zero_stage": stage}
        for family in POLICIES
        for stage in STAGES
        if family == "llama" or stage in (2, 3)
    ]
    for stage in (2, 3):
        extra = {"name": f"lora-{stage}", "lora": "attn.c_", "model": str(make_policy("gpt2"))}
        checks.append({"check": "export_policy", "zero_stage": stage} | extra)
        extra = {"name": f"ema-{stage}", "average": True, "model": policies["llama"]}
        checks.append({"check": "export_policy", "zero_stage": stage} | extra)
    checks = [check | {"rows": rows, "micro_batch": 1} for check in checks]
    extra = {"name": "bf16", "model": str(make_policy("llama")), "rows": rows, "dtype": "bf16", "zero_stage": 3}
    checks.append({"check": "export_policy"} | extra)
    save_adapters(policies["llama"], adapters := tmp_path_factory.mktemp("adapters") / "policy")
    save_adapters(policies["llama"], score_head := adapters.with_name("scorer"), scorer=True)
    for stage in (2, 3):
        kept = {"model": str(adapters), "rows": rows, "micro_batch": 1, "zero_stage": stage}
        checks.append({"check": "export_policy", "name": f"saved-{stage}", "lora": "its own"} | kept)
        checks.append({"check": "export_policy", "name": f"merged-{stage}"} | kept)
        of_scorer = {"model": str(score_head), "zero_stage": stage, "texts": TEXTS}
        checks.append({"check": "export_reward", "name": f"saved-reward-{stage}"} | of_scorer)
    for family, pad, stage in SCORERS:
        check = {"check": "export_reward", "name": f"reward-{family}-{pad}-{stage}", "new_head": True, "new_pad": True}
        checks.append(check | {"model": str(make_policy(family, pad)), "zero_stage": stage, "texts": TEXTS})
    for name, (tensor, value) in REFUSED.items():
        folder = tmp_path_factory.mktemp("refused") / name
        shutil.copytree(make_policy("llama"), folder)
        save_file(load_file(folder / FILE) | {tensor: value}, folder / FILE, metadata={"format": "pt"})
        checks.append({"check": "refused", "name": name, "model": str(folder), "zero_stage": 3, "new_head": True})
    results, folder = run_ranks(checks, 2)
    return results, folder, Sequences(**torch.load(rows))


def answer_logprobs(hf, sequences: Sequences) -> list[torch.Tensor]:
    found = []
    for i in range(len(sequences)):
        start, length = int(sequences.prompt_lengths[i]), int(sequences.lengths[i])
        ids = sequences.input_ids[i, :length]
        logp = hf(ids[None]).logits[0].float().log_softmax(-1)
        found.append(logp[torch.arange(start - 1, length - 1), ids[start:]])
    return found


def assert_logprobs(folder, sequences: Sequences, expected: list, tolerance: float = 1e-4) -> None:
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    for i, logprobs in enumerate(answer_logprobs(hf, sequences)):
        torch.testing.assert_close(logprobs, torch.tensor(expected[i])[: len(logprobs)], rtol=tolerance, atol=tolerance)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "name", [f"{family}-{stage}" for family in POLICIES for stage in STAGES if family == "llama" or stage in (2, 3)]
)
@torch.no_grad()
def test_a_policy_is_whole_at_every_stage(name, exports, make_policy):
    results, folder, sequences = exports
    family = name.split("-")[0]
    trained, source = torch.load(folder / f"{name}.pt"), make_policy(family, **WIDE.get(family, {}))
    hf, report = AutoModelForCausalLM.from_pretrained(folder / name, output_loading_info=True)
    assert not any(report.values())  # nothing missing, unexpected or of another shape
    before = AutoModelForCausalLM.from_pretrained(source)
    assert [(k, v.shape, v.dtype) for k, v in hf.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in before.state_dict().items()
    ]
    loaded = dict(hf.named_parameters())
    assert loaded.keys() == trained.keys()
    for key, weight in trained.items():
        assert torch.equal(loaded[key], weight), key
    assert any(not torch.equal(weight, dict(before.named_parameters())[key]) for key, weight in trained.items())
    if hf.config.tie_word_embeddings:
        assert hf.get_input_embeddings().weight is hf.get_output_embeddings().weight
    assert_logprobs(folder / name, sequences, results[name]["logprobs"])
    assert AutoTokenizer.from_pretrained(folder / name)("Name two birds")["input_ids"]
    assert (folder / name / "generation_config.json").is_file()
    assert results[name]["losses"] == pytest.approx(results[f"{family}-2"]["losses"], rel=1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [2, 3])
@torch.no_grad()
def test_adapters_are_merged_in_the_copy_only(stage, exports):
    results, folder, sequences = exports
    name = f"lora-{stage}"
    files = load_file(folder / name / "model.safetensors")
    assert not [key for key in files if "lora" in key or "base_layer" in key]
    adapters = {key: x for key, x in torch.load(folder / f"{name}.pt").items() if "lora_" in key}
    assert all(x.any() for x in adapters.values())  # kept apart in the training model, and no longer zero
    alone = load_file(folder / name / "adapter" / "adapter_model.safetensors")
    assert alone.keys() == {f"base_model.model.{key.replace('.default', '')}" for key in adapters} and alone
    for key, x in adapters.items():
        assert torch.equal(alone[f"base_model.model.{key.replace('.default', '')}"], x)
    assert_logprobs(folder / name, sequences, results[name]["logprobs"])
    assert results["lora-2"]["losses"] == pytest.approx(results["lora-3"]["losses"], rel=1e-5)


@pytest.mark.ranks
@torch.no_grad()
def test_a_peft_folder_goes_on_at_every_stage_and_comes_out_again(exports, make_policy):
    # Parameters that ZeRO-3 spreads take their part of what is written into them.
    results, folder, sequences = exports
    for name in ("saved-2", "saved-3", "merged-2", "merged-3"):
        assert_logprobs(folder / name, sequences, results[name]["logprobs"])
        assert results[name]["losses"][0] == pytest.approx(results["saved-2"]["losses"][0], rel=1e-5)
    assert results["saved-3"]["losses"] == pytest.approx(results["saved-2"]["losses"], rel=1e-5)
    assert results["saved-2"]["losses"][0] != pytest.approx(results["llama-2"]["losses"][0], rel=1e-2)
    for name in ("saved-2", "saved-3"):  # whose base has not moved
        adapted = AutoPeftModelForCausalLM.from_pretrained(folder / name / "adapter").eval()
        assert adapted.peft_config["default"].base_model_name_or_path == str(make_policy("llama", **WIDE["llama"]))
        for i, logprobs in enumerate(answer_logprobs(adapted, sequences)):
            expected = torch.tensor(results[name]["logprobs"][i])[: len(logprobs)]
            torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)
    assert results["saved-reward-3"]["scores"] == pytest.approx(results["saved-reward-2"]["scores"], abs=1e-4)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [2, 3])
def test_the_moving_average(stage, exports):
    # Two updates with decay d: d^2 w0 + d (1 - d) w1 + (1 - d) w2, and w1 = w0, as warm-up begins at rate 0.
    results, folder, _ = exports
    start, end = (torch.load(folder / f"ema-{stage}{suffix}.pt") for suffix in ("-start", ""))
    average = load_file(folder / f"ema-{stage}-average" / "model.safetensors")
    last = load_file(folder / f"ema-{stage}" / "model.safetensors")
    assert average.keys() == last.keys()
    for name, weight in average.items():
        assert torch.equal(last[name], end[name]) and not torch.equal(end[name], start[name])
        torch.testing.assert_close(weight, 0.75 * start[name] + 0.25 * end[name], rtol=1e-5, atol=1e-6)
    assert results[f"ema-{stage}"]["losses"] == pytest.approx(results[f"llama-{stage}"]["losses"], rel=1e-5)


@pytest.mark.ranks
@torch.no_grad()
def test_bf16_stays_bf16(exports):
    results, folder, sequences = exports
    weights = load_file(folder / "bf16" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert json.loads((folder / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(folder / "bf16").dtype == torch.bfloat16
    assert_logprobs(folder / "bf16", sequences, results["bf16"]["logprobs"], tolerance=0.1)


@pytest.mark.ranks
@pytest.mark.parametrize("family, pad, stage", SCORERS)
@torch.no_grad()
def test_a_reward_model_scores_the_same_in_plain_transformers(family, pad, stage, exports):
    # With pad "none" and "eos" the tokenizer got a pad token, so the embedding grew, under ZeRO-3 too.
    results, folder, _ = exports
    name = f"reward-{family}-{pad}-{stage}"
    model, report = AutoModelForSequenceClassification.from_pretrained(folder / name, output_loading_info=True)
    assert not any(report.values())
    trained, loaded = torch.load(folder / f"{name}.pt"), dict(model.named_parameters())
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[key], weight) for key, weight in trained.items())
    tokenizer = AutoTokenizer.from_pretrained(folder / name, padding_side="right")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.config.pad_token_id == tokenizer.pad_token_id < model.get_input_embeddings().num_embeddings
    texts = [prompt + answer + tokenizer.eos_token for prompt, answer in TEXTS]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    assert (batch["attention_mask"] == 0).any()
    scores = results[name]["scores"]
    assert len(set(scores)) == len(scores)
    assert model.eval()(**batch).logits.squeeze(1).tolist() == pytest.approx(scores, abs=1e-4)
    for text, score in zip(texts, scores, strict=True):
        alone = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        assert model(**alone).logits.item() == pytest.approx(score, abs=1e-4)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "name, message",
    [
        ("more", "hold without a place in the model value.weight. Expected"),
        ("nan", f"in float32: {REFUSED['nan'][0]};"),
    ],
)
def test_all_ranks_refuse_weights_that_are_not_the_models_at_zero3(name, message, exports):
    # transformers' own report of a load at ZeRO-3 knows of missing weights only; and of a nan one rank alone.
    errors = exports[0][name]["errors"]
    assert len(errors) == 2 and errors[0] == errors[1]
    assert errors[0].keys() == {"policy", "scorer"}
    assert all(message in error for error in errors[0].values())


# --- in one process


def load(folder):
    tokenizer = load_tokenizer(str(folder))
    return load_policy(str(folder), "--model", dtype=torch.float32, tokenizer=tokenizer), tokenizer


def test_an_export_replaces_an_older_one_and_nothing_else(make_policy, tmp_path):
    model, tokenizer = load(make_policy("llama"))
    (tmp_path / "model-00001-of-00002.safetensors").write_text("of an older, larger model")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("of an older tokenizer")
    (tmp_path / "adapter").mkdir()
    theirs = {"metrics.jsonl", "adapter_model.safetensors", "model-of-mine.safetensors", "mine.safetensors.index.json"}
    for name in theirs:
        (tmp_path / name).write_text("kept")
    export(model, tokenizer, tmp_path, zero3=False)
    export(model, tokenizer, tmp_path, zero3=False)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert theirs | {"model.safetensors"} <= set(names)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert [name for name in names if "0000" in name or name.startswith(("model.safetensors.", "."))] == []
    assert not {"chat_template.jinja", "adapter"} & set(names)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), model.hf.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_export_left_half_done_does_not_stop_the_next(kind, make_policy, tmp_path):
    model, tokenizer = load(make_policy("llama"))
    if kind == "file":
        (tmp_path / ".partial").write_text("torn")
    else:
        (tmp_path / ".partial").mkdir()
        (tmp_path / ".partial" / "model-00001-of-00009.safetensors").write_text("torn")
        (tmp_path / ".partial" / "added_tokens.json").write_text("{}")
    export(model, tokenizer, tmp_path, zero3=False)
    assert (tmp_path / "model.safetensors").is_file() and not (tmp_path / "added_tokens.json").exists()
    assert [path.name for path in tmp_path.iterdir() if "0000" in path.name or path.name == ".partial"] == []


FULL = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")]


@pytest.mark.parametrize("error", FULL, ids=["python", "safetensors"])
def test_a_full_disk_is_waited_for(error, make_policy, tmp_path, monkeypatch, capsys):
    model, tokenizer = load(make_policy("llama"))
    export(model, tokenizer, tmp_path, zero3=False)
    before = (tmp_path / "model.safetensors").read_bytes()
    slept, save = [], type(model.hf).save_pretrained

    def full(self, folder, **options):
        (folder / "half").mkdir(parents=True)
        if len(slept) < 2:
            raise error
        save(self, folder, **options)

    monkeypatch.setattr(type(model.hf), "save_pretrained", full)
    monkeypatch.setattr("remax.checkpoint.export.time.sleep", slept.append)
    torch.nn.init.ones_(model.hf.get_input_embeddings().weight)
    export(model, tokenizer, tmp_path, zero3=False)
    assert slept == [30, 30] and (tmp_path / "model.safetensors").read_bytes() != before
    assert capsys.readouterr().out.count(f"no space left for the model in {tmp_path}: make room") == 1
    before = (tmp_path / "model.safetensors").read_bytes()
    slept.clear()
    monkeypatch.setattr(type(model.hf), "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match="No space left") as stop:
        export(model, tokenizer, tmp_path, zero3=False)
    assert stop.value.errno == errno.ENOSPC and len(slept) == 30
    assert (tmp_path / "model.safetensors").read_bytes() == before and not (tmp_path / ".partial").exists()


def test_a_model_without_room_is_refused_before_the_training(make_policy, tmp_path, monkeypatch):
    model, _ = load(make_policy("llama"))
    size = 4 * sum(p.numel() for p in model.hf.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))
    refuse_without_room(model, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1))
    with pytest.raises(UserError, match="--output_dir .* GiB are free there, and the trained model takes"):
        refuse_without_room(model, tmp_path)


def test_all_files_of_an_export_follow_the_umask(make_policy, tmp_path):
    model, tokenizer = load(make_policy("llama"))
    add_lora(model.hf, 2, "all-linear", True, "--lora_module_name")
    before = os.umask(0o027)
    try:
        export(model, tokenizer, tmp_path / "run", zero3=False)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"model.safetensors", "adapter_model.safetensors", "tokenizer.json"} <= modes.keys()
    assert set(modes.values()) == {0o640}


def test_a_model_without_adapters_is_merged_into_itself(make_policy):
    model, _ = load(make_policy("llama"))
    state = dict(model.hf.named_parameters())
    merged = merge_adapters(state, model.hf)
    assert merged.keys() == state.keys() and all(merged[name] is state[name] for name in state)


def test_buffers_that_a_checkpoint_holds_are_exported(make_policy):
    model, _ = load(make_policy("llama"))
    model.hf.register_buffer("kept", torch.ones(2))
    model.hf.register_buffer("made_anew", torch.ones(2), persistent=False)
    state = full_state_dict(model.hf, zero3=False)
    assert state["kept"].tolist() == [1.0, 1.0] and "made_anew" not in state
    assert state.keys() - {"kept"} == {name for name, _ in model.hf.named_parameters()}
    model.hf.kept.fill_(2.0)
    assert state["kept"].tolist() == [1.0, 1.0]  # a copy


def test_a_note_beside_the_export(tmp_path):
    write_note(tmp_path, "results.json", {"reward": 1.5})
    assert json.loads((tmp_path / "results.json").read_text()) == {"reward": 1.5}


def test_chat_templates_beside_the_first_are_exported_again(make_policy, tmp_path):
    # transformers keeps several in a folder of their own, which the second export finds in its place.
    folder = str(make_policy("gpt2"))
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}{{ messages }}"}
    model = load_policy(folder, "--model", dtype=torch.float32, tokenizer=tokenizer)
    for _ in range(2):
        export(model, tokenizer, tmp_path, zero3=False)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


def test_a_link_in_the_place_of_the_partial_export_is_not_followed(make_policy, tmp_path):
    folder = str(make_policy("gpt2"))
    tokenizer = load_tokenizer(folder)
    model = load_policy(folder, "--model", dtype=torch.float32, tokenizer=tokenizer)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".partial").symlink_to(tmp_path / "elsewhere")
    export(model, tokenizer, tmp_path / "run", zero3=False)
    assert not list((tmp_path / "elsewhere").iterdir()) and (tmp_path / "run" / "model.safetensors").is_file()
