"""Models that go together or not, as far as their configurations and tokenizers tell; and the reward put together."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from remax.checkpoint.export import export
from remax.cli.validate import parse_step3
from remax.core.sampling import Sampling
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.roles import Role
from remax.models.hydra import load_hydra
from remax.models.reward_model import load_reward_model, store_score_statistics
from remax.stages import models, settings
from remax.stages.models import (
    Models,
    build_reward,
    build_roles,
    check_models,
    load_policy_model,
    load_scorer,
    pack_rows,
)
from remax.stages.rlhf import try_reward_functions
from utils.data.batches import PromptBatch
from utils.run import UserError
from utils.tokenizer import load_tokenizer


@pytest.fixture
def flags(make_policy, tmp_path):
    """flags("--reward_model_name_or_path", ...) -> arguments of step 3 with a tiny actor."""
    (tmp_path / "rules.py").write_text(
        "def length(prompt, answer): return len(answer)\ndef first(prompt, answer): return answer[0] == 'A'\n"
        "def right(prompt, answer, solution): return answer == solution\n"
    )
    sizes = ["--max_prompt_seq_len", "48", "--max_answer_seq_len", "12"]
    return lambda *more: parse_step3(["--actor_model_name_or_path", str(make_policy("llama")), *sizes, *map(str, more)])


@pytest.fixture
def with_statistics(make_scorer, tmp_path):
    """with_statistics(name, score_mean=..., score_std=...) -> a reward model whose config has them."""

    def make(name: str, **statistics):
        folder = tmp_path / name
        shutil.copytree(make_scorer("llama"), folder)
        config = json.loads((folder / "config.json").read_text()) | statistics
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def test_an_actor_that_is_no_policy_is_refused_before_anything_is_read(flags, make_scorer, tmp_path):
    args = flags("--actor_model_name_or_path", make_scorer("llama"), "--reward_fn", f"{tmp_path}/rules.py:length")
    with pytest.raises(UserError, match="--actor_model_name_or_path: .* is a LlamaForSequenceClassification; expected"):
        check_models(args)


def test_one_folder_may_be_actor_and_reward_model(flags, make_policy, tmp_path, sequences_of):
    start = str(make_policy("llama"))
    tokenizer = load_tokenizer(start)
    both = load_hydra(start, "--model", dtype=torch.float32, tokenizer=tokenizer, new_head=True).eval()
    store_score_statistics(both, {"score_mean": 0.5, "score_std": 2.0})
    export(both, tokenizer, tmp_path / "both", zero3=False)
    args = flags("--actor_model_name_or_path", tmp_path / "both", "--reward_model_name_or_path", tmp_path / "both")
    args.normalize_reward = True
    tokenizers, rows = check_models(args), sequences_of(1, 4, 300)
    reward = build_reward(args, EngineConfig(), tokenizers.actor, tokenizers.rewards)
    policy = load_policy_model(settings.actor_model(args), tokenizers.actor).eval()
    with torch.no_grad():
        torch.testing.assert_close(policy(rows)[0], both(rows)[0])
        torch.testing.assert_close(reward.score(rows), (both(rows, head="score") - 0.5) / 2.0)


def test_several_models_and_functions_in_one_reward(flags, with_statistics, make_scorer, tmp_path, sequences_of):
    one, two = with_statistics("one", score_mean=1.5, score_std=0.5), with_statistics("two", score_mean=0, score_std=2)
    models, rule = ["--reward_model_name_or_path", one, f"{two}:-3"], ["--reward_fn", f"{tmp_path}/rules.py:length"]
    args = flags(*models, *rule, "--normalize_reward")
    tokenizers = check_models(args)
    reward = build_reward(args, EngineConfig(), tokenizers.actor, tokenizers.rewards)
    assert [(part.name, part.weight, part.mean, part.std) for part in reward.parts] == [
        ("one", 1.0, 1.5, 0.5),
        ("two", -3.0, 0.0, 2.0),
        ("length", 1.0, 0.0, 1.0),
    ]
    total, scores = reward.score_parts(sequences_of(0, 3, 300))
    expected = (scores["one"] - 1.5) / 0.5 - 3 * scores["two"] / 2 + scores["length"]
    torch.testing.assert_close(total, expected)
    args.normalize_reward = False
    plain = build_reward(args, EngineConfig(), tokenizers.actor, tokenizers.rewards)
    assert [(part.mean, part.std) for part in plain.parts] == [(0.0, 1.0)] * 3


def test_what_step_2_stores_is_what_normalises(flags, make_scorer, tmp_path):
    folder = str(make_scorer("llama"))
    model = load_reward_model(folder, "--m", dtype=torch.float32, tokenizer=load_tokenizer(folder))
    store_score_statistics(model, {"score_mean": -0.25, "score_std": 0.75})
    model.hf.save_pretrained(tmp_path / "reward")
    load_tokenizer(folder).save_pretrained(tmp_path / "reward")
    args = flags("--reward_model_name_or_path", tmp_path / "reward", "--normalize_reward")
    tokenizers = check_models(args)
    (part,) = build_reward(args, EngineConfig(), tokenizers.actor, tokenizers.rewards).parts
    assert (part.mean, part.std) == (-0.25, 0.75)


@pytest.mark.parametrize("statistics", [{}, {"score_mean": 1.0}, {"score_mean": 1.0, "score_std": 0.0}])
def test_a_model_without_statistics_is_named_before_weights_are_read(statistics, flags, with_statistics):
    good, bad = with_statistics("good", score_mean=0.0, score_std=1.0), with_statistics("bad", **statistics)
    for file in bad.glob("*.safetensors"):
        file.unlink()
    args = flags("--reward_model_name_or_path", good, bad, "--normalize_reward")
    with pytest.raises(UserError, match=f"--normalize_reward: .*{bad} has score_mean .* and score_std .*; expected"):
        check_models(args)
    args.normalize_reward = False
    assert len(check_models(args).rewards) == 2


def test_the_model_with_another_vocabulary_is_named(flags, make_scorer, tiny_reward_model, make_policy):
    other = tiny_reward_model("llama")
    with pytest.raises(UserError, match=f"--reward_model_name_or_path {other}: its vocabulary differs"):
        check_models(flags("--reward_model_name_or_path", make_scorer("llama"), other))
    ppo = ["--algo", "ppo", "--reward_model_name_or_path", make_scorer("llama")]
    with pytest.raises(
        UserError, match=f"--critic_model_name_or_path {other}: its vocabulary differs .* the critic reads"
    ):
        check_models(flags(*ppo, "--critic_model_name_or_path", other))
    tokenizers = check_models(flags(*ppo))
    assert tokenizers.critic is tokenizers.rewards[0]
    with pytest.raises(UserError, match=f"--reward_model_name_or_path: {make_policy('llama')} is a LlamaForCausalLM"):
        check_models(flags("--reward_model_name_or_path", make_scorer("llama"), make_policy("llama")))


def test_a_critic_for_a_function_alone(flags, make_scorer, tmp_path):
    rule, critic = ["--reward_fn", f"{tmp_path}/rules.py:length"], make_scorer("llama")
    tokenizers = check_models(flags("--algo", "ppo", "--critic_model_name_or_path", critic, *rule))
    assert tokenizers.rewards == [] and len(tokenizers.critic) == AutoConfig.from_pretrained(critic).vocab_size


def test_a_faulty_function_is_found_before_weights_are_read(flags, tmp_path):
    tensors = {name: torch.ones(3) for name in ("input_ids", "lengths", "weight")}
    held_out = [PromptBatch(**tensors, prompts=["Human: a", "Human: b", "Human: c"])]
    good, bad = (flags("--reward_fn", f"{tmp_path}/rules.py:{name}") for name in ("length", "first"))
    tokenizer = check_models(good).actor
    try_reward_functions(good, tokenizer, held_out)
    with pytest.raises(UserError, match=r"rules.py:first: IndexError: .* line 2: .*prompt 'Human: a', answer ''"):
        try_reward_functions(bad, tokenizer, held_out)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "answer": "#### 1"}\n')
    lacks = flags("--reward_fn", f"{tmp_path}/rules.py:right", "--data_path", data)
    with pytest.raises(
        UserError, match=rf"rules.py:right: takes solution, but the data has prompt, answer \(.* {data}\)$"
    ):
        try_reward_functions(lacks, tokenizer, held_out)


def test_each_model_is_asked_once_to_pack_and_what_does_not_is_named(flags, make_scorer, monkeypatch, capsys):
    asked = []

    def start(role, longest, wanted, **read):
        asked.append((role.engine, longest, wanted, read))
        return "" if role.engine == "critic" else "it is eager"

    monkeypatch.setattr(models, "start_packing", start)
    actor, critic = Role("actor"), Role("critic")
    parts = [SimpleNamespace(model=Role(name)) for name in ("first", "second", "critic")]  # which shares its weights
    reward = SimpleNamespace(models=parts)
    args = flags("--reward_model_name_or_path", make_scorer("llama"), "--packing")
    pack_rows(args, Models(actor, Role("actor"), reward, critic))
    longest = args.max_prompt_seq_len + args.max_answer_seq_len
    assert asked[0] == ("actor", longest, True, {"hidden_only": True})
    assert [engine for engine, *_ in asked] == ["actor", "first", "second", "critic"]
    assert all(read == {"every_token": True} for *_, read in asked[1:])
    assert capsys.readouterr().out == "actor, reward: rows are padded, since it is eager\n"


def test_which_model_gets_which_role(flags, make_scorer, tmp_path, monkeypatch):
    # Engines that only note what they are made of: the critic starts from the first reward model, the reference is
    # tempered like the actor.
    two = tmp_path / "two"
    shutil.copytree(make_scorer("llama"), two)
    line = ["--algo", "ppo", "--reward_model_name_or_path", make_scorer("llama"), f"{two}:0.5", "--temperature", "0.7"]
    line += [
        "--top_p",
        "0.9",
        "--logprob_chunk_size",
        "33",
        "--disable_reward_dropout",
        "--critic_learning_rate",
        "0.5",
    ]

    class Engine:
        def __init__(self, model, config, optimizer=None):
            self.model, self.config, self.optimizer = model, config, optimizer
            self.zero3 = config.zero_stage == 3

    for name in ("TrainedEngine", "FrozenEngine"):
        monkeypatch.setattr(models, name, Engine)
    for name in ("load_policy_model", "load_scorer"):
        monkeypatch.setattr(models, name, lambda spec, tokenizer, **_: (spec.name, tokenizer))

    def build(*more: str):
        args = flags(*line, *more)
        own = check_models(args)
        return args, own, build_roles(args, own, 50)

    args, own, built = build("--actor_zero_stage", "3")
    (first, second) = (part.scorer.engine.model for part in built.reward.parts)
    assert first == (str(make_scorer("llama")), own.rewards[0]) and second == (str(two), own.rewards[1])
    assert built.actor.engine.model == built.reference.engine.model == (args.actor_model_name_or_path, own.actor)
    assert built.critic.engine.model == first and built.critic.engine.optimizer.learning_rate == 0.5
    assert built.actor.engine.optimizer.total_steps == built.critic.engine.optimizer.total_steps == 50
    assert [part.weight for part in built.reward.parts] == [1.0, 0.5]
    assert built.actor.sampling == built.actor.generation.sampling == Sampling(0.7, 0.9)
    assert built.reference.sampling == Sampling(0.7)
    assert built.actor.chunk_size == built.reference.chunk_size == 33
    assert built.actor.gather_for_generation and "gathered once per rollout" in built.actor.backend
    _, _, synced = build("--actor_zero_stage", "3", "--zero3_generation", "synced", "--logprobs_of", "model")
    assert not synced.actor.gather_for_generation and "ranks in step" in synced.actor.backend
    assert synced.actor.sampling == synced.reference.sampling == Sampling()


def test_functions_are_weighed(flags, tmp_path):
    args = flags("--reward_fn", f"{tmp_path}/rules.py:length:-0.1")
    (part,) = build_reward(args, EngineConfig(), check_models(args).actor, []).parts
    assert (part.name, part.weight) == ("length", -0.1)


@torch.no_grad()
def test_from_a_peft_folder_the_actor_learns_on_and_the_reference_is_its_start(
    flags, save_adapters, make_policy, tmp_path, sequences_of
):
    save_adapters(make_policy("llama"), tmp_path / "policy")
    save_adapters(make_policy("llama"), tmp_path / "scorer", scorer=True)
    names = ["--actor_model_name_or_path", tmp_path / "policy", "--reward_model_name_or_path", tmp_path / "scorer"]
    args = flags(*names, "--actor_lora_dropout", "0.5", "--algo", "ppo")
    tokenizers = check_models(args)
    actor = load_policy_model(settings.actor_model(args), tokenizers.actor)
    reference = load_policy_model(settings.reference_model(args), tokenizers.actor)
    critic = load_scorer(settings.critic_model(args, str(tmp_path / "scorer")), tokenizers.critic)
    learn = [name for name, parameter in actor.hf.named_parameters() if parameter.requires_grad]
    assert len(learn) == 2 * 2 * 7 and all("lora_" in name for name in learn)
    sequences = sequences_of(4, rows=3, vocabulary=len(tokenizers.actor))
    torch.testing.assert_close(actor.eval()(sequences)[0], reference.eval()(sequences)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(actor.train()(sequences)[0], reference(sequences)[0], atol=1e-3)
    for whole in (reference, critic):
        assert all("lora_" not in name and parameter.requires_grad for name, parameter in whole.named_parameters())
    part = build_reward(args, EngineConfig(), tokenizers.actor, tokenizers.rewards).models[0]
    torch.testing.assert_close(part.model.score(sequences), critic.eval()(sequences), rtol=1e-5, atol=1e-5)
