"""Sound models pass an examination; with one thing broken at a time, each is found by its own check."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LogitsProcessor

from remax.checks import generation as generation_checks
from remax.checks import models as model_checks
from remax.checks.examination import built_in_prompts, examine
from remax.checks.findings import FAILURE, OK, SKIPPED, WARNING, Finding, Report
from remax.checks.generation import (
    Probe,
    check_drawn,
    check_greedy,
    decode_serves,
    take_probe,
    with_padded_row,
)
from remax.core.sampling import Sampling
from remax.core.sequences import Prompts, Sequences
from remax.engines.base import Engine, FrozenEngine
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.policy import Actor, Reference
from remax.engines.scorer import Reward
from remax.generation import hugging_face, loop
from remax.generation.cache import PromptCache
from remax.generation.decoder import GenerationSettings
from remax.generation.hugging_face import HuggingFaceDecoder
from remax.generation.loop import SharedPromptDecoder
from remax.models.lora import add_lora
from remax.models.policy import load_policy
from remax.models.reward_model import load_reward_model
from remax.rewards.composite import CompositeReward, FunctionReward, Part
from remax.rewards.functions import RewardFunction
from utils.run import UserError
from utils.tokenizer import load_tokenizer

CPU = EngineConfig(dtype="fp32")
PROMPT, ANSWER = 48, 12


@pytest.fixture
def load(make_policy, make_scorer):
    """load("gpt2", ...) -> the arguments of `examine`, of a healthy patient."""

    def load(family: str = "gpt2", pad: str = "own", sampling=Sampling(), config: EngineConfig = CPU) -> dict:
        folder, scorer = str(make_policy(family, pad)), str(make_scorer(family, pad))
        tokenizer = load_tokenizer(folder)
        dtype = config.torch_dtype
        generation = GenerationSettings(ANSWER, tokenizer.pad_token_id, sampling)
        policy = load_policy(folder, "--a", dtype=dtype, tokenizer=tokenizer)
        judge = Reward(FrozenEngine(load_reward_model(scorer, "--r", dtype=dtype, tokenizer=tokenizer), config))
        return {
            "actor": Actor(FrozenEngine(policy, config), generation=generation),
            "reward": CompositeReward([Part("judge", judge, tokenizer=load_tokenizer(scorer))]),
            "tokenizer": tokenizer,
            "prompts": built_in_prompts(tokenizer, PROMPT),
            "reference": Reference(FrozenEngine(load_policy(folder, "--a", dtype=dtype, tokenizer=tokenizer), config)),
            "max_prompt_tokens": PROMPT,
            "reload_limit": 0,
        }

    return load


def results(report: Report) -> dict[str, str]:
    return {found.check: found.result for found in report.findings}


def failed(report: Report) -> list[str]:
    return [found.check for found in report.failures]


# ------------------------------------------------------------------------------------------------------------- healthy


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2"])
def test_a_sound_pipeline_passes(family, load):
    report = examine(**load(family, sampling=Sampling(0.8, top_p=0.9)) | {"reload_limit": 10**9})
    assert not report.failures, report.table()
    checked = [found for found in report.findings if found.result == OK]
    assert len(checked) >= 13  # random weights may look like noise
    assert all(found.remedy == "" for found in checked)


@pytest.mark.parametrize("pad", ["eos", "none"])
def test_a_pad_token_that_is_the_end_token_is_sound(pad, load):
    assert not examine(**load("gpt2", pad)).failures


def test_bf16_is_sound_and_its_export_exact(load):
    # The rotary frequencies stay in float32: rounded, the export would differ from what trains.
    report = examine(**load("llama", config=EngineConfig(dtype="bf16")) | {"reload_limit": 10**9})
    assert not report.failures, report.table()
    (export,) = [found for found in report.findings if found.check == "export reads back the same"]
    assert export.numbers["mean"] < 1e-6


def test_engines_keep_rotary_frequencies_in_float32(load):
    patient = load("llama", config=EngineConfig(dtype="bf16"))
    for engine in (patient["actor"], patient["reference"], patient["reward"].parts[0].scorer):
        rotary = {name: b.dtype for name, b in engine.model.named_buffers() if "inv_freq" in name}
        assert rotary and set(rotary.values()) == {torch.float32}
        assert next(engine.model.parameters()).dtype == torch.bfloat16


def test_the_random_state_is_left_as_it_was(load):
    patient = load()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    examine(**patient)
    assert torch.equal(torch.rand(4), expected)


def test_the_first_prompt_is_padded_even_when_all_are_equally_long():
    ids = torch.arange(1, 13).view(2, 6)
    prompts = with_padded_row(Prompts(ids, torch.tensor([6, 6])), rows=1)
    assert prompts.lengths.tolist() == [6, 3]
    assert prompts.input_ids[1][prompts.attention_mask[1].bool()].tolist() == [4, 5, 6]


def test_a_function_alone_is_enough(load):
    patient = load()
    function = RewardFunction("f", lambda prompt, answer: len(answer), batched=False, asynchronous=False)
    patient["reward"] = CompositeReward([Part("length", FunctionReward(function, patient["tokenizer"]))])
    report = examine(**patient)
    assert not report.failures, report.table()
    assert results(report)["scores are finite and differ"] == OK
    assert results(report)["reward model ranks pairs"] == SKIPPED


def test_each_of_several_reward_models_is_checked(load, make_scorer):
    patient = load()
    folder = str(make_scorer("gpt2", seed=6))
    own = load_tokenizer(folder)
    other = Reward(FrozenEngine(load_reward_model(folder, "--r", dtype=torch.float32, tokenizer=own), CPU))
    (judge,) = patient["reward"].parts
    patient["reward"] = CompositeReward([judge, Part("other", other, tokenizer=own)])
    assert not examine(**patient).failures
    honest = other.score
    other.score = lambda sequences, forwards=1: honest(sequences) + 0.1 * (~sequences.mask).sum(1)
    assert failed(examine(**patient)) == ["rows do not touch one another"]
    other.score, own.eos_token = honest, own.convert_ids_to_tokens(5)
    report = examine(**patient)
    assert failed(report) == ["end token"] and "the reward model other's by [5]" in report.table()


# ---------------------------------------------------------------------------------------------------- broken generation


def generate_with(actor, monkeypatch, change) -> None:
    """Answers come from the model's generate; `change(kwargs)` may alter every call of it."""
    actor.decoder, original = HuggingFaceDecoder(), actor.model.hf.generate
    monkeypatch.setattr(actor.model.hf, "generate", lambda **kwargs: original(**change(dict(kwargs))))


class Penalty(LogitsProcessor):
    """Every token drawn so far loses a nat."""

    def __call__(self, input_ids, scores):
        return scores - torch.zeros_like(scores).scatter_(1, input_ids, 1.0)


def test_a_hidden_penalty_is_found(load, monkeypatch):
    patient = load()

    def change(kwargs):
        kwargs["logits_processor"].insert(0, Penalty())
        return kwargs

    generate_with(patient["actor"], monkeypatch, change)
    assert {"generation agrees with the forward"} <= set(failed(examine(**patient)))


def without_a_look_before(actor) -> None:
    """Answers come from our own loop even where it would see for itself that it cannot serve the model."""
    actor.decoder = SharedPromptDecoder()
    actor.decoder.faults[actor.model.hf] = ""


def decode_with(actor, monkeypatch, change) -> None:
    """`change(kwargs)` may alter every forward of a decode by our own loop, and its logits by what it returns."""
    without_a_look_before(actor)
    original = actor.model.hf.forward

    def forward(**kwargs):
        alter = change(kwargs)
        out = original(**kwargs)
        out.logits = alter(out.logits) if alter else out.logits
        return out

    monkeypatch.setattr(actor.model.hf, "forward", forward)


def test_a_penalty_in_our_own_loop_is_found(load, monkeypatch):
    patient = load()
    decode_with(patient["actor"], monkeypatch, lambda _: lambda logits: logits - torch.arange(logits.shape[-1]) % 2)
    assert {"generation agrees with the forward"} <= set(failed(examine(**patient)))


@pytest.mark.parametrize("decoder", [SharedPromptDecoder(), HuggingFaceDecoder()], ids=["ours", "generate"])
def test_a_hidden_top_k_is_found(decoder, load):
    patient = load()

    def with_top_k(model, prompts, settings, **options):
        return decoder(model, prompts, replace(settings, sampling=Sampling(top_k=20)), **options)

    patient["actor"].decoder = with_top_k
    assert failed(examine(**patient)) == ["generation agrees with the forward"]


@pytest.mark.parametrize("module", [loop, hugging_face], ids=["ours", "generate"])
def test_a_greedy_baseline_that_is_not_greedy_is_found(module, load, monkeypatch):
    patient = load()
    if module is hugging_face:
        patient["actor"].decoder = HuggingFaceDecoder()
    monkeypatch.setattr(module, "most_probable", lambda logits: logits.topk(2).indices[:, 1])
    assert failed(examine(**patient)) == ["greedy tokens are the argmax"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attention_to_padding_in_our_own_loop_is_found(family, load, monkeypatch):
    patient = load(family)
    without_a_look_before(patient["actor"])
    for weight in patient["actor"].model.parameters():  # so that what is attended to matters
        weight.mul_(8.0 if weight.dim() > 1 else 1.0)
    monkeypatch.setattr(PromptCache, "hidden", lambda self, window: None)
    assert {"generation agrees with the forward", "padding changes nothing"} <= set(failed(examine(**patient)))


def test_positions_counted_from_elsewhere_in_our_own_loop_are_found(load, monkeypatch):
    patient = load("gpt2")

    def later(kwargs):
        if "past_key_values" in kwargs:
            kwargs["position_ids"] = kwargs["position_ids"] + 1

    decode_with(patient["actor"], monkeypatch, later)
    assert {"generation agrees with the forward"} <= set(failed(examine(**patient)))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attention_to_padding_is_found(family, load, monkeypatch):
    patient = load(family)

    def change(kwargs):
        return kwargs | {"attention_mask": torch.ones_like(kwargs["attention_mask"])}

    generate_with(patient["actor"], monkeypatch, change)
    assert {"generation agrees with the forward", "padding changes nothing"} <= set(failed(examine(**patient)))


def test_positions_counted_from_the_padding_are_found(load, monkeypatch):
    # Left-padded GPT-2 with positions 0, 1, 2, ... from the first column of padding.
    patient = load("gpt2")
    patient["actor"].decoder, original = HuggingFaceDecoder(), patient["actor"].model.hf.generate

    def generate(**kwargs):
        forward = patient["actor"].model.hf.transformer.forward

        def without_positions(*args, position_ids=None, past_key_values=None, **rest):
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            width = rest["input_ids"].shape[1] if rest.get("input_ids") is not None else args[0].shape[1]
            positions = torch.arange(past, past + width)[None]
            return forward(*args, position_ids=positions, past_key_values=past_key_values, **rest)

        with monkeypatch.context() as patch:
            patch.setattr(patient["actor"].model.hf.transformer, "forward", without_positions)
            return original(**kwargs)

    monkeypatch.setattr(patient["actor"].model.hf, "generate", generate)
    assert {"generation agrees with the forward", "padding changes nothing"} <= set(failed(examine(**patient)))


def test_answers_from_another_distribution_than_the_learned_one_raise_a_warning(load):
    patient = load(sampling=Sampling(top_p=0.9))
    patient["actor"].sampling = Sampling()  # --logprobs_of model
    report = examine(**patient)
    assert results(report)["sampling is what is learned"] == WARNING
    assert not report.failures


def test_the_decode_serves_where_its_logprobs_are_those_of_the_forward():
    def actor(dtype="fp32", evaluated=Sampling(top_p=0.9)) -> SimpleNamespace:
        drawn = GenerationSettings(8, 0, Sampling(top_p=0.9))
        engine = SimpleNamespace(config=EngineConfig(1, dtype=dtype))
        return SimpleNamespace(engine=engine, sampling=evaluated, generation=drawn)

    def report(largest: float) -> Report:
        return Report([Finding(generation_checks.AGREES, OK, "", numbers={"mean": 1e-6, "largest": largest})])

    assert decode_serves(actor(), None) and decode_serves(actor(), report(9e-4))
    assert not decode_serves(actor(), report(1.1e-3))
    assert not decode_serves(actor("bf16"), None) and not decode_serves(actor("bf16"), report(0.0))
    assert not decode_serves(actor(evaluated=Sampling()), None)  # --logprobs_of model
    try:
        torch.set_float32_matmul_precision("high")  # --tf32
        assert not decode_serves(actor(), None)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_ranks_with_equal_noise_are_found(monkeypatch):
    monkeypatch.setattr(model_checks, "gather_objects", lambda state: [state, state])
    assert model_checks.check_ranks().result == FAILURE
    monkeypatch.setattr(model_checks, "gather_objects", lambda state: [state, state + 1])
    assert model_checks.check_ranks().result == OK


def test_an_untrained_policy_raises_a_warning(load):
    patient = load()
    for parameter in patient["actor"].model.parameters():
        parameter.mul_(0.01)
    report = examine(**patient | {"reference": None})
    assert results(report)["answers are not noise"] == WARNING and not report.failures


# --------------------------------------------------------------------------------------------- models that do not match


def test_pad_beyond_the_embedding_stops_before_anything_runs(load):
    patient = load()
    patient["actor"].generation = replace(patient["actor"].generation, pad_id=10**6)
    report = examine(**patient)
    assert failed(report) == ["pad token"]
    assert report.findings[-1].result == SKIPPED
    with pytest.raises(UserError, match="pad token"):
        report.refuse_failures()


def test_pad_of_another_tokenizer_is_found(load):
    patient = load()
    patient["actor"].generation = replace(patient["actor"].generation, pad_id=7)
    assert failed(examine(**patient)) == ["pad token"]


def test_a_swapped_tokenizer_is_found(load, corpus):
    from remax.demo.tiny_models import train_tokenizer

    patient = load()
    patient["reward"].parts[0].tokenizer = train_tokenizer(["aaa bbb ccc ddd"] * 9, vocab_size=300)
    assert failed(examine(**patient)) == ["vocabulary"]


def test_a_different_end_token_is_found(load):
    patient = load()
    patient["actor"].model.hf.generation_config.eos_token_id = [5]
    assert failed(examine(**patient)) == ["end token"]


def test_a_second_end_token_raises_a_warning(load):
    patient = load()
    patient["actor"].model.hf.generation_config.eos_token_id.append(5)
    assert results(examine(**patient))["end token"] == WARNING


def test_a_chat_templates_end_of_a_turn_must_be_the_reward_models_too(load):
    patient = load()
    (judge,) = patient["reward"].parts
    patient["tokenizer"].chat_template = "{% for m in messages %}{{ m.content }}<s>{% endfor %}"
    assert failed(examine(**patient)) == ["end token"]  # generation does not stop there
    patient["actor"].model.hf.generation_config.eos_token_id.append(patient["tokenizer"].convert_tokens_to_ids("<s>"))
    assert results(examine(**patient))["end token"] == WARNING
    judge.tokenizer.chat_template = patient["tokenizer"].chat_template
    assert results(examine(**patient))["end token"] == OK


def test_prompts_that_do_not_fit_are_found(load):
    patient = load()
    patient["max_prompt_tokens"] = 128 - ANSWER + 1  # the models have 128 positions
    report = examine(**patient)
    assert failed(report) == ["prompts fit"]
    assert "lower --max_prompt_seq_len" in report.table()
    patient["max_prompt_tokens"] = 128 - ANSWER
    assert results(examine(**patient))["prompts fit"] == OK


def test_another_reference_is_found(load, make_policy):
    patient = load()
    other = str(make_policy("gpt2", seed=9))
    model = load_policy(other, "--x", dtype=torch.float32, tokenizer=patient["tokenizer"])
    patient["reference"] = Reference(FrozenEngine(model, CPU))
    assert failed(examine(**patient)) == ["KL to the reference is 0"]


class PlainActor(Actor):
    """An actor whose engine is the model itself."""

    def __init__(self, model, generation):
        engine = Engine()
        engine.model = engine.wrapped = model
        engine.config = CPU
        super().__init__(engine, generation=generation)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("disable_dropout", [True, False])
def test_dropout_in_the_update_raises_a_warning(disable_dropout, training, load, make_policy):
    # Whatever mode the model is in: before the first step it need not be the update's.
    patient = load("opt")
    folder = str(make_policy("opt"))
    model = load_policy(
        folder, "--a", dtype=torch.float32, tokenizer=patient["tokenizer"], disable_dropout=disable_dropout
    )
    patient["actor"] = PlainActor(model, patient["actor"].generation)
    model.train(training)
    report = examine(**patient)
    assert results(report)["no dropout in the update"] == (OK if disable_dropout else WARNING)
    assert not report.failures, report.table()
    assert model.training == training


def test_dropout_of_adapters_that_add_nothing_yet_is_seen(load, make_policy):
    patient = load()
    model = load_policy(str(make_policy("llama")), "--a", dtype=torch.float32, tokenizer=patient["tokenizer"])
    add_lora(model.hf, 2, "all-linear", True, "--lora_module_name", dropout=0.25)
    patient["actor"] = PlainActor(model, patient["actor"].generation)
    report = examine(**patient)
    (found,) = [x for x in report.findings if x.check == "no dropout in the update"]
    assert found.result == WARNING and found.numbers["mean"] == 0 and "dropout 0.25" in found.figure
    assert "--actor_lora_dropout 0" in found.remedy


def test_an_export_that_differs_is_found(load, monkeypatch):
    original = model_checks.export

    def export(model, tokenizer, folder, *, zero3):
        with torch.no_grad():
            bias = model.hf.transformer.ln_f.bias
            bias += 0.5
            original(model, tokenizer, folder, zero3=zero3)
            bias -= 0.5

    monkeypatch.setattr(model_checks, "export", export)
    patient = load()
    assert failed(examine(**patient | {"reload_limit": 10**9})) == ["export reads back the same"]
    assert results(examine(**patient | {"reload_limit": 1000}))["export reads back the same"] == SKIPPED


@torch.no_grad()
def test_an_export_is_tried_twice_as_in_training(load, monkeypatch):
    # An export into the folder of an earlier one can fail where the first went well.
    original, found = model_checks.export, []

    def export(model, tokenizer, folder, *, zero3):
        found.append((Path(folder) / "model.safetensors").is_file())
        original(model, tokenizer, folder, zero3=zero3)

    monkeypatch.setattr(model_checks, "export", export)
    assert failed(examine(**load("llama") | {"reload_limit": 10**9})) == []
    assert found == [False, True]


def test_where_a_difference_is_too_large(load, monkeypatch):
    # Above 1e-3 nats in the mean, for generation against the forward and for an export against the model.
    patient = load()
    with torch.random.fork_rng():
        probe = take_probe(patient["actor"], patient["prompts"])
    honest = generation_checks.logprobs_under(patient["actor"], probe.sampled, Sampling())
    for size, result in ((5e-4, OK), (2e-3, FAILURE)):
        monkeypatch.setattr(generation_checks, "logprobs_under", lambda *_, by=size: probe.drawn_from + by)
        assert check_drawn(patient["actor"], probe).result == result
        monkeypatch.setattr(model_checks, "logprobs_under", lambda *_, by=size: honest + by)
        again = model_checks.check_reload(patient["actor"], patient["tokenizer"], probe, 10**9)
        assert again.result == result
    patient["actor"].engine.config = EngineConfig(dtype="bf16")  # where generation may round more
    assert check_drawn(patient["actor"], probe).result == OK


@pytest.mark.parametrize(("wrong", "result"), [(0, OK), (2, OK), (3, FAILURE)])
def test_how_many_greedy_tokens_may_differ(wrong, result, load, monkeypatch):
    # Of 200 tokens one in a hundred; each is 1 away from the largest logit, so its log-prob is -log(1 + e).
    tokens = torch.zeros(1, 200)
    tokens[0, :wrong] = -math.log1p(math.e)
    answers = Sequences(torch.zeros(1, 201, dtype=torch.long), torch.tensor([1]), torch.tensor([200]))
    monkeypatch.setattr(generation_checks, "logprobs_under", lambda *_: tokens)
    probe = Probe(prompts=None, sampled=answers, greedy=answers, drawn_from=None)
    found = check_greedy(load()["actor"], probe)
    assert found.result == result and found.numbers["share"] == pytest.approx(wrong / 200)


def test_a_score_that_reads_the_padding_is_found(load):
    patient = load()
    judge = patient["reward"].parts[0].scorer
    honest = judge.score
    judge.score = lambda sequences, forwards=1: honest(sequences) + 0.1 * (~sequences.mask).sum(1)
    assert failed(examine(**patient)) == ["rows do not touch one another"]


@pytest.mark.parametrize("score", [0.0, math.nan, math.inf])
def test_a_constant_or_broken_score_is_found(score, load):
    patient = load()
    patient["reward"].parts[0].scorer.score = lambda sequences, forwards=1: torch.full((len(sequences),), score)
    assert "scores are finite and differ" in failed(examine(**patient))


def test_the_tokenizers_of_a_reward_model_with_its_own_pad_agree(load, tokenizers):
    patient = load("gpt2", "none")
    patient["reward"].parts[0].tokenizer = AutoTokenizer.from_pretrained(tokenizers["none"])
    patient["reward"].parts[0].tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert not examine(**patient).failures
