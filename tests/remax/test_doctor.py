"""The doctor on sound models, and on models with one thing broken at a time: each must be found, by its own check."""

from __future__ import annotations

import inspect
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LogitsProcessor

from remax import doctor
from remax.deepspeed_config import EngineConfig
from remax.doctor import FAILURE, OK, SKIPPED, WARNING, Finding, Report, examine, ranking_findings
from remax.engines import Actor, Reference, Reward
from remax.inference import FrozenActor
from remax.logprobs import Sampling
from remax.modeling import load_policy
from remax.reward_model import load_reward_model
from remax.rollout import GenerationSettings, GreedyRows
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
        return {
            "actor": FrozenActor(load_policy(folder, "--a", dtype=dtype, tokenizer=tokenizer), config, generation),
            "reward": Reward(load_reward_model(scorer, "--r", dtype=dtype, tokenizer=tokenizer), config),
            "tokenizer": tokenizer,
            "reward_tokenizer": load_tokenizer(scorer),
            "prompts": doctor.built_in_prompts(tokenizer, PROMPT),
            "reference": Reference(load_policy(folder, "--a", dtype=dtype, tokenizer=tokenizer), config),
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
    for engine in (patient["actor"], patient["reference"], patient["reward"]):
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
    prompts = doctor.with_padded_row(doctor.Prompts(ids, torch.tensor([6, 6])), rows=1)
    assert prompts.lengths.tolist() == [6, 3]
    assert prompts.input_ids[1][prompts.attention_mask[1].bool()].tolist() == [4, 5, 6]


# ---------------------------------------------------------------------------------------------------- broken generation


def generate_with(actor, monkeypatch, change) -> None:
    """`change(kwargs)` may alter every call of the model's generate."""
    original = actor.model.hf.generate
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


def test_a_hidden_top_k_is_found(load, monkeypatch):
    # What generate does by itself when it is not told top_k=0.
    patient = load()

    def change(kwargs):
        kwargs["generation_config"].top_k = 20
        return kwargs

    generate_with(patient["actor"], monkeypatch, change)
    assert failed(examine(**patient)) == ["generation agrees with the forward"]


def test_a_greedy_baseline_that_is_not_greedy_is_found(load, monkeypatch):
    def second_best(self, input_ids, scores):
        best = scores[self.first :].topk(2).indices[:, 1:]
        only = torch.full_like(scores[self.first :], -torch.inf).scatter_(-1, best, 0.0)
        return torch.cat([scores[: self.first], only])

    patient = load()
    monkeypatch.setattr(GreedyRows, "__call__", second_best)
    assert failed(examine(**patient)) == ["greedy tokens are the argmax"]


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
    original = patient["actor"].model.hf.generate

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


def test_ranks_with_equal_noise_are_found(monkeypatch):
    monkeypatch.setattr(doctor, "gather_objects", lambda state: [state, state])
    assert doctor.check_ranks().result == FAILURE
    monkeypatch.setattr(doctor, "gather_objects", lambda state: [state, state + 1])
    assert doctor.check_ranks().result == OK


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
    from utils.demo import train_tokenizer

    patient = load()
    patient["reward_tokenizer"] = train_tokenizer(["aaa bbb ccc ddd"] * 9, vocab_size=300)
    assert failed(examine(**patient)) == ["vocabulary"]


def test_a_different_end_token_is_found(load):
    patient = load()
    patient["actor"].model.hf.generation_config.eos_token_id = [5]
    assert failed(examine(**patient)) == ["end token"]


def test_a_second_end_token_raises_a_warning(load):
    patient = load()
    patient["actor"].model.hf.generation_config.eos_token_id.append(5)
    assert results(examine(**patient))["end token"] == WARNING


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
    patient["reference"] = Reference(model, CPU)
    assert failed(examine(**patient)) == ["KL to the reference is 0"]
    assert not examine(**patient, resumed=True).failures


class PlainActor(Actor):
    """An actor whose engine is the model itself."""

    def __init__(self, model, generation):
        self.engine = self.model = model
        self.config, self.generation, self.sampling = CPU, generation, generation.sampling
        self.chunk_size, self.gather_for_generation = 1024, True


@pytest.mark.parametrize("disable_dropout", [True, False])
def test_dropout_in_the_update_raises_a_warning(disable_dropout, load, make_policy):
    patient = load("opt")
    folder = str(make_policy("opt"))
    model = load_policy(
        folder, "--a", dtype=torch.float32, tokenizer=patient["tokenizer"], disable_dropout=disable_dropout
    )
    patient["actor"] = PlainActor(model, patient["actor"].generation)
    model.train()
    report = examine(**patient)
    assert results(report)["no dropout in the update"] == (OK if disable_dropout else WARNING)
    assert not report.failures, report.table()
    assert model.training


def test_an_export_that_differs_is_found(load, monkeypatch):
    original = doctor.export

    def export(model, tokenizer, folder, *, zero3):
        with torch.no_grad():
            bias = model.hf.transformer.ln_f.bias
            bias += 0.5
            original(model, tokenizer, folder, zero3=zero3)
            bias -= 0.5

    monkeypatch.setattr(doctor, "export", export)
    patient = load()
    assert failed(examine(**patient | {"reload_limit": 10**9})) == ["export reads back the same"]
    assert results(examine(**patient | {"reload_limit": 1000}))["export reads back the same"] == SKIPPED


# --------------------------------------------------------------------------------------------------------------- reward


def scorer(score, config=CPU) -> SimpleNamespace:
    """A reward model that scores by a function of sequences."""
    return SimpleNamespace(score=score, config=config, model=torch.nn.Module())


def test_a_score_that_reads_the_padding_is_found(load):
    patient = load()
    honest = patient["reward"].score
    patient["reward"].score = lambda sequences: honest(sequences) + 0.1 * (~sequences.mask).sum(1)
    assert failed(examine(**patient)) == ["rows do not touch one another"]


@pytest.mark.parametrize("score", [0.0, math.nan, math.inf])
def test_a_constant_or_broken_score_is_found(score, load):
    patient = load()
    patient["reward"].score = lambda sequences: torch.full((len(sequences),), score)
    assert "scores are finite and differ" in failed(examine(**patient))


def test_accuracy_by_hand():
    # 4 pairs: right, right, tied, wrong -> 2.5 / 4; z = (0.625 - 0.5) * 2 * sqrt(4) = 0.5
    chosen, rejected = torch.tensor([1.0, 2, 3, 0]), torch.tensor([0.0, 1, 3, 1])
    lengths = torch.tensor([5.0, 5, 5, 5]), torch.tensor([4.0, 6, 4, 6])
    ranks, length = ranking_findings(chosen, rejected, *lengths)
    assert ranks.numbers == {"accuracy": 0.625, "pairs": 4}
    assert "0.5 standard errors" in ranks.figure and ranks.result == WARNING  # too few pairs for more
    # the longer is better in pairs 0 (right) and 2 (tied), the shorter in 1 (right) and 3 (wrong): (3/4 + 1/2) / 2
    assert length.numbers == {"balanced_accuracy": 0.625, "longer_wins": 0.5}


def drawn_pairs(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quality difference (n,) of the pairs, and lengths of the better and of the worse answer, longer in 3 of 4."""
    noise = torch.Generator().manual_seed(seed)
    longer = torch.rand(n, generator=noise) < 0.75
    lengths = torch.randint(10, 20, (n,), generator=noise).double()
    extra = torch.where(longer, 5.0, -5.0).double()
    return torch.rand(n, generator=noise).double() + 0.1, lengths + extra, lengths


def test_a_good_reward_model_passes_although_length_helps():
    quality, long, short = drawn_pairs(256)
    noise = torch.randn(256, generator=torch.Generator().manual_seed(1)).double()
    ranks, length = ranking_findings(quality + 0.5 * noise, torch.zeros(256), long, short)
    assert (ranks.result, length.result) == (OK, OK)


def test_length_alone_is_found_although_it_ranks_well():
    _, long, short = drawn_pairs(400)
    ranks, length = ranking_findings(long, short, long, short)
    assert ranks.result == OK and ranks.numbers["accuracy"] > 0.7
    assert length.result == FAILURE and length.numbers["balanced_accuracy"] == 0.5
    assert length.numbers["longer_wins"] == ranks.numbers["accuracy"]


def test_a_random_reward_model_is_found():
    quality, long, short = drawn_pairs(400)
    scores = torch.randn(2, 400, generator=torch.Generator().manual_seed(0)).double()
    ranks, length = ranking_findings(*scores, long, short)
    assert (ranks.result, length.result) == (FAILURE, FAILURE)


def test_swapped_preferences_are_found():
    quality, long, short = drawn_pairs(256)
    ranks, _ = ranking_findings(torch.zeros(256), quality, long, short)
    assert ranks.result == FAILURE and ranks.numbers["accuracy"] == 0


def test_few_pairs_only_warn():
    quality, long, short = drawn_pairs(30)
    ranks, length = ranking_findings(-quality, quality, long, short)
    assert (ranks.result, length.result) == (WARNING, WARNING)


def test_pairs_of_a_data_set(corpus, tokenizer):
    pairs = doctor.held_out_pairs([str(corpus)], tokenizer, max_len=200, limit=10, batch_size=4)
    assert sum(int(batch["weight"].sum()) for batch in pairs) == 10
    # a reward model that knows how far down the vocabulary an answer reaches: some score, differing between answers
    ranks, length = doctor.check_ranking(scorer(lambda s: s.input_ids.float().mean(1)), pairs)
    assert ranks.numbers["pairs"] == 10
    longest = scorer(lambda s: s.lengths.float())
    ranks, length = doctor.check_ranking(longest, pairs)
    assert ranks.numbers["accuracy"] == pytest.approx(length.numbers["longer_wins"])


def test_data_without_pairs_is_skipped(tmp_path, tokenizer):
    rows = [{"prompt": "Human: a Assistant:", "chosen": f" {i}"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert doctor.held_out_pairs([str(tmp_path / "rows.jsonl")], tokenizer, max_len=100) is None
    assert [found.result for found in doctor.check_ranking(None, None)] == [SKIPPED]


# --------------------------------------------------------------------------------------------------------- command line


def test_the_table_names_result_and_remedy():
    report = Report([Finding("a", OK, "1 of 1"), Finding("longer name", FAILURE, "0 of 1", "mend it")])
    assert report.table().splitlines() == [
        "check        result   figure",
        "a            ok       1 of 1",
        "longer name  FAILURE  0 of 1",
        "             remedy:  mend it",
    ]
    with pytest.raises(UserError, match="longer name: 0 of 1. mend it"):
        report.refuse_failures()
    Report([Finding("a", WARNING, "x", "y")]).refuse_failures()  # a warning does not stop training


def run_doctor(monkeypatch, *flags) -> int:
    monkeypatch.setattr("sys.argv", ["doctor", *map(str, flags)])
    try:
        doctor.main()
    except SystemExit as end:
        return end.code
    return 0


def test_command_line(monkeypatch, capsys, make_policy, make_scorer, corpus):
    sizes = ["--max_prompt_seq_len", 64, "--max_answer_seq_len", 32, "--dtype", "fp32", "--data_path", corpus]
    models = ["--actor_model_name_or_path", make_policy("llama"), "--reward_model_name_or_path", make_scorer("llama")]
    assert run_doctor(monkeypatch, *models, *sizes) == 0  # 24 held-out pairs: a random reward model only warns
    out = capsys.readouterr().out
    assert "reward model ranks pairs" in out and "generation agrees with the forward" in out

    assert run_doctor(monkeypatch, *models, *sizes, "--max_prompt_seq_len", 120, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is False
    (failure,) = [found for found in report["findings"] if found["result"] == FAILURE]
    assert failure["check"] == "prompts fit" and failure["remedy"]


def test_a_wrong_flag_is_refused(monkeypatch, make_policy, make_scorer):
    with pytest.raises(UserError, match="--actor_model_name_or_path"):
        run_doctor(monkeypatch, "--actor_model_name_or_path", "./none", "--reward_model_name_or_path", "./none")
    with pytest.raises(UserError, match="--batches"):
        run_doctor(monkeypatch, "--actor_model_name_or_path", ".", "--reward_model_name_or_path", ".", "--batches", "3")


def test_the_tokenizers_of_a_reward_model_with_its_own_pad_agree(load, tokenizers):
    patient = load("gpt2", "none")
    patient["reward_tokenizer"] = AutoTokenizer.from_pretrained(tokenizers["none"])
    patient["reward_tokenizer"].add_special_tokens({"pad_token": "<|pad|>"})
    assert not examine(**patient).failures


def test_remedies_name_flags_that_exist():
    from remax.flags import Step3Arguments

    known = set(Step3Arguments.__dataclass_fields__) | set(doctor.DoctorArguments.__dataclass_fields__)
    assert set(re.findall(r"--(\w+)", inspect.getsource(doctor))) <= known
