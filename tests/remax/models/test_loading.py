"""Policies of six families against the plain Hugging Face model: log-probs, dropout, adapters, generation settings."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig, GPTNeoXConfig

from remax.checkpoint.export import export
from remax.core.sampling import Sampling
from remax.core.sequences import Prompts, Sequences
from remax.engines.optimizer import optimizer_groups
from remax.evaluation.texts import encode_texts
from remax.generation.decoder import GenerationSettings
from remax.generation.rollout import rollout
from remax.models.loading import check_length, evaluating, load_config
from remax.models.lora import add_lora
from remax.models.policy import load_policy
from remax.models.reward_model import load_reward_model
from utils.data.chat import template_of
from utils.data.encoding import Encoder
from utils.data.shapes import Conversation, finish
from utils.run import UserError
from utils.tokenizer import load_tokenizer

FAMILIES = ("gpt2", "opt", "llama", "mistral", "qwen2", "gemma2")


def load(folder, **options):
    tokenizer = load_tokenizer(str(folder))
    return load_policy(str(folder), "--model", dtype=torch.float32, tokenizer=tokenizer, **options), tokenizer


def row_logprobs(hf, sequences: Sequences, i: int, temperature: float = 1.0) -> torch.Tensor:
    """(T_i,) log-probs of row i's answer by the model's own forward on that row alone, without padding."""
    length, start = int(sequences.lengths[i]), int(sequences.prompt_lengths[i])
    ids = sequences.input_ids[i, :length]
    logp = (hf(ids[None]).logits[0] / temperature).log_softmax(-1)  # (T, V)
    return logp[torch.arange(start - 1, length - 1), ids[start:]]


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("family", [*FAMILIES, "cohere", "granite"])
@torch.no_grad()
def test_a_padded_batch_equals_single_rows(family, chunks, make_policy, sequences_of):
    folder = make_policy(family)
    model, tokenizer = load(folder)
    model.eval()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    sequences = sequences_of(0, rows=5, vocabulary=len(tokenizer), pad_id=tokenizer.pad_token_id)
    logprobs, entropy, _ = model(sequences, chunks=chunks, entropy=True)
    assert logprobs.shape == sequences.answer_mask.shape
    assert logprobs.std() > 0.5  # the weights are large, so the model is far from uniform
    for i in range(len(sequences)):
        n = int(sequences.answer_lengths[i])
        torch.testing.assert_close(logprobs[i, :n], row_logprobs(plain, sequences, i), rtol=1e-5, atol=1e-5)
        assert not logprobs[i, n:].any() and not entropy[i, n:].any()
    wider = Sequences(
        torch.nn.functional.pad(sequences.input_ids, (0, 7), value=3),
        sequences.prompt_lengths,
        sequences.answer_lengths,
    )
    torch.testing.assert_close(model(wider)[0], logprobs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_temperature_acts_behind_the_soft_cap(make_policy, sequences_of):
    folder = make_policy("gemma2")
    model, tokenizer = load(folder)
    model.eval()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    sequences = sequences_of(1, rows=2, vocabulary=len(tokenizer))
    logprobs, *_ = model(sequences, sampling=Sampling(temperature=0.5))
    expected = row_logprobs(plain, sequences, 0, temperature=0.5)
    torch.testing.assert_close(logprobs[0, : len(expected)], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_dropout_is_off(family, make_policy, sequences_of):
    folder = make_policy(family, attention_dropout=0.3) if family not in ("gpt2", "opt") else make_policy(family)
    model, tokenizer = load(folder)
    sequences = sequences_of(2, rows=3, vocabulary=len(tokenizer))
    model.train()
    training = [model(sequences)[0] for _ in range(2)]
    with evaluating(model):
        assert not model.hf.training
        with evaluating(model):
            pass
        assert not model.hf.training  # as it was found
        evaluated = model(sequences)[0]
    assert model.hf.training
    assert torch.equal(training[0], training[1]) and torch.equal(training[0], evaluated)
    dropping, _ = load(folder, disable_dropout=False)
    dropping.train()
    assert not torch.equal(dropping(sequences)[0], dropping(sequences)[0])  # there was some to switch off


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family, make_policy, sequences_of):
    gradients = []
    for checkpointing in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of a method that transformers has renamed
            model, tokenizer = load(make_policy(family), gradient_checkpointing=checkpointing)
        model.train()
        model(sequences_of(3, rows=3, vocabulary=len(tokenizer)), chunks=2)[0].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert getattr(model.hf, "is_gradient_checkpointing", False) == checkpointing
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# --- adapters


LORA_TARGETS = {"gpt2": "attn.c_", "opt": "decoder.layers.", "llama": "q_proj"}


@pytest.mark.parametrize("only_lora", [True, False])
@pytest.mark.parametrize("family", list(LORA_TARGETS))
def test_lora_trains_and_its_merged_export_is_the_same_model(family, only_lora, make_policy, sequences_of, tmp_path):
    model, tokenizer = load(make_policy(family))
    add_lora(model.hf, 3, LORA_TARGETS[family], only_lora, "--lora_module_name")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    sequences = sequences_of(4, rows=4, vocabulary=len(tokenizer))
    optimizer = torch.optim.AdamW(optimizer_groups(model, 0.0, lora_learning_rate=0.02), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = -model(sequences)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name: not torch.equal(p, start[name]) for name, p in model.named_parameters()}
    assert all(moved[name] for name in moved if "lora_" in name)
    assert all(moved[name] != only_lora for name in moved if name.endswith("base_layer.weight"))

    export(model, tokenizer, tmp_path, zero3=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not [name for name in merged.state_dict() if "lora" in name or "base_layer" in name]
    with torch.no_grad(), evaluating(model):
        expected = model.hf(sequences.input_ids).logits
        torch.testing.assert_close(merged(sequences.input_ids).logits, expected, rtol=1e-4, atol=1e-4)
        if only_lora:
            base = AutoModelForCausalLM.from_pretrained(make_policy(family))
            adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
            torch.testing.assert_close(adapted(sequences.input_ids).logits, expected, rtol=1e-5, atol=1e-5)
            assert adapted.peft_config["default"].base_model_name_or_path == str(make_policy(family))
        else:  # the base moved too: adapters alone would be another model
            assert not (tmp_path / "adapter").exists()
        model.hf.disable_adapters()
        assert not torch.allclose(model.hf(sequences.input_ids).logits, expected, atol=1e-2)
    assert torch.equal(merged.get_input_embeddings().weight, model.hf.get_input_embeddings().weight)
    plain, tokenizer = load(make_policy(family))
    export(plain, tokenizer, tmp_path, zero3=False)
    assert not (tmp_path / "adapter").exists()  # of the earlier export


@pytest.mark.parametrize("only_lora", [True, False])
def test_a_score_head_learns_beside_the_adapters_of_its_model(only_lora, make_scorer, tmp_path):
    # A new head is random: were it frozen, the adapters would learn to serve noise.
    folder = str(make_scorer("llama"))
    model = load_reward_model(folder, "--m", dtype=torch.float32, tokenizer=load_tokenizer(folder))
    add_lora(model.hf, 3, "q_proj", only_lora, "--lora_module_name")
    learns = {name: p.requires_grad for name, p in model.hf.named_parameters()}
    assert learns["score.weight"] and all(learns[name] for name in learns if "lora_" in name)
    layers = {name.split(".")[-4] for name in learns if "lora_" in name}
    assert layers == {"q_proj"}  # and no other layer
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    scales = {scale for module in adapted for scale in module.scaling.values()}
    assert scales == {1.0}
    assert all(learns[name] != only_lora for name in learns if "lora_" not in name and name != "score.weight")

    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if "lora_B" in name or name == "score.weight":
                parameter.normal_()
    export(model, load_tokenizer(folder), tmp_path, zero3=False)
    assert (tmp_path / "adapter").exists() == only_lora
    if only_lora:
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        ids = torch.arange(5, 15)[None]
        with torch.no_grad():
            torch.testing.assert_close(adapted(ids).logits, model.eval().hf(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_neox"])
def test_all_linear_finds_every_layer_but_the_head(family, make_policy):
    if family == "gpt_neox":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        hf = AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=300, **sizes))
    else:
        hf = load(make_policy(family))[0].hf
    per_layer = {"gpt2": 4, "opt": 6, "gpt_neox": 4}.get(family, 7)  # of attention and feed-forward
    expected = 2 * per_layer + 2 * (family == "opt")  # which projects its embeddings in and out
    add_lora(hf, 3, "all-linear", True, "--lora_module_name")
    adapted = [name for name, module in hf.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == expected
    head = hf.get_output_embeddings()
    assert not head.weight.requires_grad and not hasattr(head, "lora_A")


def test_scale_and_dropout_of_adapters(make_policy, sequences_of):
    model, tokenizer = load(make_policy("llama"))
    add_lora(model.hf, 4, "all-linear", True, "--lora_module_name", alpha=6, dropout=0.5)
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert {scale for module in adapted for scale in module.scaling.values()} == {6 / 4}
    with torch.no_grad():
        for module in adapted:
            module.lora_B["default"].weight.normal_()
    sequences = sequences_of(4, rows=2, vocabulary=len(tokenizer))
    model.train()
    assert not torch.equal(model(sequences)[0], model(sequences)[0])
    model.eval()
    assert torch.equal(model(sequences)[0], model(sequences)[0])


def test_a_rank_beyond_that_of_the_layers_is_refused(make_policy):
    model, _ = load(make_policy("mistral"))  # 32 wide; two key and value heads of four have 16 rows
    with pytest.raises(UserError, match=r"--actor_lora_dim 17: the matrix of .*k_proj has rank 16 at most"):
        add_lora(model.hf, 17, "all-linear", True, "--actor_lora_module_name")
    add_lora(model.hf, 16, "all-linear", True, "--actor_lora_module_name")


def test_lora_on_nothing_is_refused(make_policy):
    model, _ = load(make_policy("llama"))
    with pytest.raises(UserError, match="--lora_module_name 'decoder.layers.'.*'model.layers.0"):
        add_lora(model.hf, 3, "decoder.layers.", True, "--lora_module_name")


def test_no_weight_decay_on_biases_and_norms(make_policy):
    model, _ = load(make_policy("gpt2"))
    add_lora(model.hf, 2, "c_attn", False, "--lora_module_name")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer_groups(model, 0.1, lora_learning_rate=5e-4)
    seen = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["weight_decay"] == (0.0 if name.endswith("bias") or "ln_" in name else 0.1)
            assert group.get("lr") == (5e-4 if "lora_" in name else None)


# --- generation settings


def with_generation_config(source, target, **fields):
    shutil.copytree(source, target)
    file = target / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return target


@pytest.mark.parametrize(
    "fields",
    [
        {"do_sample": True, "top_k": 2, "temperature": 0.3, "repetition_penalty": 5.0, "max_length": 5},
        {"temperature": 0.9, "top_p": 0.6},  # without do_sample, as the first Llama-2 folders had it
    ],
    ids=["sampling", "without do_sample"],
)
def test_a_models_generation_config_changes_no_rollout_but_is_exported(fields, make_policy, tmp_path):
    source = make_policy("llama")
    plain, tokenizer = load(source)
    folder = with_generation_config(source, tmp_path / "with", **fields)
    model, _ = load(folder)
    prompts = Prompts(torch.tensor([[0, 7, 8], [5, 6, 9]]), torch.tensor([2, 3]))
    answers = []
    for policy in (plain, model):
        torch.manual_seed(0)
        settings = GenerationSettings(max_new_tokens=8, pad_id=tokenizer.pad_token_id)
        found = rollout(policy.hf.eval(), prompts, settings, samples=4)
        answers.append((found.sampled, found.greedy))
    for got, expected in zip(answers[1], answers[0], strict=True):
        assert torch.equal(got.input_ids, expected.input_ids)
    export(model, tokenizer, tmp_path / "export", zero3=False)
    exported = GenerationConfig.from_pretrained(tmp_path / "export")
    assert {name: getattr(exported, name) for name in fields} == fields
    assert exported.pad_token_id == tokenizer.pad_token_id
    assert exported.eos_token_id == tokenizer.eos_token_id


def test_several_end_tokens_all_end_an_answer(make_policy, tmp_path):
    source = make_policy("llama")
    tokenizer = load_tokenizer(str(source))
    folder = with_generation_config(source, tmp_path / "with", eos_token_id=[17, 18])
    model, _ = load(folder)
    eos = tokenizer.eos_token_id
    assert model.hf.generation_config.eos_token_id == [17, 18, eos]  # the tokenizer's own ends answers too
    prompts = Prompts(torch.tensor([[5, 7]]), torch.tensor([2]))
    torch.manual_seed(0)
    sampled = rollout(model.hf.eval(), prompts, GenerationSettings(60, 0), samples=64, greedy=False).sampled
    last = sampled.input_ids.gather(1, sampled.end_index[:, None]).squeeze(1)
    ended = torch.isin(last, torch.tensor([17, 18, eos]))
    assert ended.any() and (sampled.answer_lengths[~ended] == 60).all()
    inside = torch.isin(sampled.answer_ids, torch.tensor([17, 18, eos])) & sampled.answer_mask
    assert (inside.sum(1) == ended.long()).all()  # an end token stands at the end only
    export(model, tokenizer, tmp_path / "export", zero3=False)
    assert GenerationConfig.from_pretrained(tmp_path / "export").eos_token_id == [17, 18, eos]


def test_all_stages_end_a_chats_answer_by_the_same_token(make_policy, tmp_path):
    # As Gemma's template: a turn ends by a special token that is not EOS.
    template = "{% for m in messages %}<turn>{{ m.role }} {{ m.content }}<end>\n{% endfor %}"
    template += "{{ '<turn>assistant ' if add_generation_prompt }}"
    _, tokenizer = load(make_policy("qwen2"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    tokenizer.chat_template = template
    folder = tmp_path / "chat"
    shutil.copytree(make_policy("qwen2"), folder)
    tokenizer.save_pretrained(folder)
    model, tokenizer = load(folder)
    end = tokenizer.convert_tokens_to_ids("<end>")
    # Steps 1 and 2 learn and score rows that end so.
    example = finish(Conversation([{"role": "user", "content": "Why?"}], "yes", "no"), template_of(tokenizer))
    columns = {name: [value] for name, value in vars(example).items()}
    learned = Encoder("supervised", tokenizer, 60).encode(columns)["input_ids"][0]
    scored = Encoder("ranking", tokenizer, 60).encode(columns)["chosen_ids"][0]
    by_hand = encode_texts(tokenizer, [example.prompt], [example.chosen], 60)[0].ids
    # Step 3 cuts an answer there, so the reward model sees the very same row.
    ends = model.hf.generation_config.eos_token_id
    assert ends == [tokenizer.eos_token_id, end]
    prompt = Encoder("prompts", tokenizer, 60).encode(columns)["input_ids"][0]
    answer = [*tokenizer("yes", add_special_tokens=False)["input_ids"], end, tokenizer.eos_token_id, 7]
    prompts = Prompts(torch.tensor([prompt]), torch.tensor([len(prompt)]))
    rolled_out = Sequences.from_generation(prompts, torch.tensor([answer]), ends, 0).input_ids[0].tolist()
    assert learned == scored == by_hand == rolled_out and learned[-1] == end
    export(model, tokenizer, tmp_path / "export", zero3=False)  # and so does whoever generates with the export
    assert GenerationConfig.from_pretrained(tmp_path / "export").eos_token_id == ends


# --- bad input


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=f"--actor: the folder {tmp_path} holds no config.json"):
        load_config(str(tmp_path), "--actor")
    with pytest.raises(UserError, match="--actor: no model at './nowhere'"):
        load_config("./nowhere", "--actor")


def with_config(source, target, **fields):
    shutil.copytree(source, target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return target


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": 0}, "hidden_size is 0; expected 1 at least"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected 1 at least"),
        ({"num_attention_heads": 5}, r"hidden size \(32\) is not a multiple of the number of attention heads \(5\)"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a number in range"),
        ({"pad_token_id": 10**30}, "pad_token_id is 1000000000000000000000000000000; expected a number in range"),
        ({"attention_dropout": 1.5}, "attention_dropout is 1.5; expected 0 at least, and less than 1"),
        ({"architectures": [1]}, r"architectures is \[1\]; expected a list of names"),
        ({"max_position_embeddings": "abc"}, "'max_position_embeddings' expected int, got str"),
        ({"hidden_act": "wobble"}, "cannot load .*'wobble' is nothing that transformers knows"),
        ({"dtype": "float99"}, "no attribute 'float99'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised .* expected weights in fp32"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "is quantised"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "code.C"}}, "it needs Python code of its own, which is not"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_configuration_that_no_model_can_have_is_one_line(fields, message, make_policy, tmp_path):
    folder = with_config(make_policy("llama"), tmp_path / "broken", **fields)
    with pytest.raises(UserError, match=message) as raised:
        load_policy(str(folder), "--actor", dtype=torch.float32, tokenizer=load_tokenizer(str(make_policy("llama"))))
    assert str(raised.value).startswith("--actor: ") and "\n" not in str(raised.value)


def test_code_in_a_models_folder_is_passed_over_with_a_line(make_policy, tmp_path, capsys):
    folder = with_config(make_policy("llama"), tmp_path / "own", auto_map={"AutoModelForCausalLM": "code.Mine"})
    (folder / "code.py").write_text("raise SystemExit('run')")
    load(folder)
    assert "own has Python code of its own, which is not run: LlamaForCausalLM reads it" in capsys.readouterr().out


def test_attention_without_its_package_is_one_line(make_policy):
    with pytest.raises(UserError, match="--model: cannot load .*FlashAttention2"):
        load(make_policy("llama"), attn_implementation="flash_attention_2")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_generation_config_that_cannot_be_read_is_named(text, make_policy, tmp_path):
    folder = with_generation_config(make_policy("llama"), tmp_path / "with")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match="--model: the generation_config.json of .*with cannot be read"):
        load(folder)


@pytest.mark.parametrize("end", [300, -1, "x", [5, 10**9]])
def test_end_tokens_that_the_model_does_not_embed_are_refused(end, make_policy, tmp_path):
    folder = with_generation_config(make_policy("llama"), tmp_path / "with", eos_token_id=end)
    named = end[1] if isinstance(end, list) else end
    with pytest.raises(UserError, match=f"ends answers by {named!r}; expected eos_token_id to be ids from 0 to 299"):
        load(folder)


def test_more_tokens_than_positions_are_refused(make_policy):
    config = load_config(str(make_policy("llama")), "--model")
    check_length(config, 128, "--max_seq_len")
    with pytest.raises(UserError, match="--max_seq_len: 129 tokens.*--model_name_or_path has 128 positions"):
        check_length(config, 129, "--max_seq_len")


def test_a_tokenizer_with_more_words_than_the_model_is_refused(make_policy):
    folder = make_policy("llama")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["<one>", "<two>"])
    with pytest.raises(UserError, match=f"--model: the tokenizer .* has {len(tokenizer)} tokens"):
        load_policy(str(folder), "--model", dtype=torch.float32, tokenizer=tokenizer)
