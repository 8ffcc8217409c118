"""Sets of adapters that are switched on and off: without any the trunk is its start, to the bit; a set never stays on;
roles that share weights learn what separate copies of the same weights learn."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from remax.checkpoint.export import export
from remax.core.sampling import Sampling
from remax.core.sequences import Prompts
from remax.engines.base import FrozenEngine
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.optimizer import optimizer_groups
from remax.engines.policy import Actor, Judge, Reference
from remax.engines.scorer import Reward, TrainedReward
from remax.generation.decoder import GenerationSettings
from remax.models.hydra import load_hydra
from remax.models.lora import add_lora
from remax.models.policy import load_policy
from remax.models.reward_model import load_reward_model
from remax.models.trunk import ACTOR, CRITIC, JOINT_CRITIC, REFERENCE, REWARD, Trunk
from utils.tokenizer import load_tokenizer

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13], [14, 15]]


def read(loader, folder, **options):
    options = {"dtype": torch.float32, "tokenizer": load_tokenizer(str(folder))} | options
    return loader(str(folder), "--model", **options).eval()


def with_sets(reader, **options) -> Trunk:
    """A trunk with two sets of adapters of which every one matters, and a value head."""
    for name, dim in (("actor", 3), ("critic", 2)):
        add_lora(reader.hf, dim, "all-linear", True, "--lora_module_name", alpha=5, adapter=name)
    noise = torch.Generator().manual_seed(1)
    width = reader.hf.get_output_embeddings().in_features
    trunk = Trunk(reader, value=torch.nn.Linear(width, 1, bias=False), **options)
    with torch.no_grad():
        for parameter in trunk.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=noise))
    return trunk


@pytest.fixture
def trunk(make_two_headed):
    return lambda family="llama", packing=False, **options: with_sets(
        read(load_hydra, make_two_headed(family)[0], packing=packing), **options
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_without_adapters_the_trunk_is_its_start_to_the_bit(family, trunk, make_policy, make_two_headed, sequences_of):
    rows, shared = sequences_of(0, 4, 300), trunk(family)
    policy, scorer = read(load_policy, make_policy(family)), read(load_reward_model, make_two_headed(family)[1])
    for use, expected in ((REFERENCE, policy(rows)[0]), (REWARD, scorer(rows))):
        found = shared(rows, use=use)
        assert torch.equal(found[0] if use is REFERENCE else found, expected)
    actor = shared(rows, use=ACTOR)[0]
    values, joint = (shared(rows, use=use, every_token=True) for use in (CRITIC, JOINT_CRITIC))
    assert (actor - policy(rows)[0]).abs().max() > 0.1
    assert values.shape == actor.shape and (values - joint).abs().max() > 0.01
    assert torch.equal(shared(rows, use=REFERENCE)[0], policy(rows)[0])  # what was on leaves no trace


@torch.no_grad()
def test_each_role_is_a_model_with_those_adapters_alone(trunk, make_two_headed, sequences_of):
    # The actor: the same adapters, merged by hand. A set's product B A is scaled by alpha / rank.
    rows, shared = sequences_of(1, 4, 300), trunk()
    scales = {"actor": 5 / 3, "critic": 5 / 2}
    for use in (ACTOR, CRITIC):
        plain = read(load_hydra, make_two_headed("llama")[0])
        for name, layer in shared.reader.hf.named_modules():
            if hasattr(layer, "lora_A"):
                a, b = layer.lora_A[use.adapters].weight, layer.lora_B[use.adapters].weight
                plain.hf.get_submodule(name).weight += scales[use.adapters] * b @ a
        plain.score_head.weight.copy_(shared.value.weight)
        if use is ACTOR:
            torch.testing.assert_close(shared(rows, use=use)[0], plain(rows)[0], rtol=0, atol=1e-4)
        else:
            last = (rows.answer_lengths - 1)[
                :, None
            ]  # the value before the last token: the score of the row without it
            cut = type(rows)(rows.input_ids, rows.prompt_lengths, rows.answer_lengths - 1)
            values = shared(rows, use=use, every_token=True).gather(1, last)[:, 0]
            torch.testing.assert_close(values, plain(cut, head="score"), rtol=0, atol=1e-4)


class Broken(RuntimeError):
    pass


def raises(*_, **__):
    raise Broken


def test_a_role_never_leaves_its_set_switched_on(trunk, sequences_of, monkeypatch):
    rows, shared = sequences_of(2, 2, 300), trunk()
    engine = FrozenEngine(shared, EngineConfig())
    settings = GenerationSettings(4, 0)
    actor = Actor(engine, generation=settings, use=ACTOR)
    before = Reference(engine, use=REFERENCE).logprobs(rows)
    assert shared.active is None
    with actor.generating():
        assert shared.active == "actor"
        Reference(engine, use=REFERENCE).logprobs(rows)  # a role in the middle of another
        assert shared.active == "actor"
    broken = Actor(engine, generation=settings, use=ACTOR, decoder=raises)
    with pytest.raises(Broken):
        broken.rollout(Prompts(torch.tensor([[5, 6]]), torch.tensor([2])))
    assert shared.active is None
    with monkeypatch.context() as patch:
        patch.setattr(shared.reader.hf.get_output_embeddings(), "forward", raises)
        patch.setattr(shared.value, "forward", raises)
        for role in (actor.old_logprobs, TrainedReward(engine, CRITIC).old_values):
            with pytest.raises(Broken):
                role(rows)
            assert shared.active is None and not any(not layer.disable_adapters for layer in shared.layers)
    assert torch.equal(Reference(engine, use=REFERENCE).logprobs(rows), before)


def test_switching_freezes_nothing(trunk):
    shared = trunk()
    learning = {name: p.requires_grad for name, p in shared.named_parameters()}
    assert {name for name, learns in learning.items() if learns} == {
        name for name in learning if ".lora_" in name or name == "value.weight"
    }
    for outer in ("actor", "critic", None):
        with shared.switched(outer), shared.switched("critic"):
            assert {name: p.requires_grad for name, p in shared.named_parameters()} == learning


@pytest.mark.parametrize("use", [ACTOR, CRITIC, JOINT_CRITIC])
def test_recomputation_sees_the_set_of_its_forward(use, trunk, sequences_of):
    # In the backward pass no set is on, or, below, that of somebody else.
    rows, gradients = sequences_of(3, 3, 300), []
    for checkpointing, meanwhile in ((False, nullcontext), (True, nullcontext), (True, "critic"), (True, "actor")):
        shared = trunk(gradient_checkpointing=checkpointing).train()
        found = shared(rows, use=use)
        with shared.switched(meanwhile) if isinstance(meanwhile, str) else meanwhile():
            (found if use.head == "value" else found[0]).square().sum().backward()
        gradients.append({name: p.grad for name, p in shared.named_parameters() if p.grad is not None})
    first = gradients[0]
    assert {name.split(".")[-2] for name in first} - {"value"} == {use.adapters}
    for other in gradients[1:]:
        assert other.keys() == first.keys()
        assert all(torch.allclose(other[name], gradient, atol=1e-6) for name, gradient in first.items())


@torch.no_grad()
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("first", "forwards"), [(4, 1), (4, 3), (2, 3), (7, 2)])
def test_one_forward_tells_what_reference_and_reward_tell(packing, first, forwards, trunk, sequences_of):
    rows, engine = sequences_of(4, 7, 300), FrozenEngine(trunk(packing=packing), EngineConfig())
    reference = Reference(engine, sampling=Sampling(0.7, 0.9), chunk_size=5, use=REFERENCE)
    engine.model.train()
    passes = []
    engine.model.reader.hf.base_model.register_forward_hook(lambda *_: passes.append(1))
    logprobs, scores = Judge(reference).read(rows, first, forwards)
    assert len(passes) == forwards and engine.model.training
    torch.testing.assert_close(logprobs, reference.logprobs(rows.select(slice(0, first))), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, Reward(engine, REWARD).score(rows), rtol=0, atol=1e-5)


def test_the_export_is_the_actor_and_no_reward_model(trunk, make_two_headed, sequences_of, tmp_path):
    rows, shared, both = sequences_of(5, 3, 300), trunk(), make_two_headed("llama")[0]
    export(shared.reader, load_tokenizer(str(both)), tmp_path, zero3=False)
    assert "score.weight" not in load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = shared(rows, use=ACTOR)[0]
        again = read(load_policy, tmp_path)(rows)[0]
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(both), str(tmp_path / "adapter"))
        logits = adapted.eval()(rows.input_ids).logits
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)
    drawn = rows.at(logits, rows.predictor_columns).log_softmax(-1).gather(-1, rows.answer_ids[..., None]).squeeze(-1)
    torch.testing.assert_close(drawn * rows.answer_mask, expected, rtol=0, atol=1e-4)


def test_actor_and_critic_learn_at_rates_of_their_own(trunk):
    shared = trunk()
    groups = optimizer_groups(shared, 0.1, 0.5, (0.25, 0.3))
    names = {id(p): name for name, p in shared.named_parameters()}
    found = {(group["lr"], group["weight_decay"]): {names[id(p)] for p in group["params"]} for group in groups}
    learning = {name for name, p in shared.named_parameters() if p.requires_grad}
    of_critic = {name for name in learning if ".critic." in name or name == "value.weight"}
    assert found == {(0.5, 0.1): learning - of_critic, (0.25, 0.3): of_critic}


# ----------------------------------------------------------------------------- the same updates as with separate copies

ADAPTERS = "--actor_lora_dim 4 --only_optimize_lora --actor_lora_learning_rate 2e-2 --actor_lora_alpha 8"
SIZES = "--num_warmup_steps 0 --max_prompt_seq_len 48 --max_answer_seq_len 8 --per_device_training_batch_size 2"
PPO = "--algo ppo --ppo_mini_batches 2 --critic_lora_dim 3 --critic_learning_rate 1e-2"


ALGORITHMS = [
    "--algo remax",
    "--algo remax --generation_batches 2 --temperature 0.8 --top_p 0.9 --actor_gradient_checkpointing",
    "--algo remax --penalty full_kl_full_step",
    "--algo grpo --samples_per_prompt 2",
]
# Unclipped, since one engine clips the gradient of both as a whole.
OF_TWO = [f"{PPO} --gradient_clipping 0 {more}" for more in ("", "--actor_gradient_checkpointing", "--ppo_epochs 2")]
JOINT = [PPO.replace("--critic_lora_dim 3 ", more) for more in ("--joint_critic ", "")]


@pytest.fixture(scope="module")
def learned(run_ranks, make_two_headed):
    """learned("--algo remax", "all") -> (what learned, what the worker says) of a short training on one rank."""
    both, scorer = make_two_headed("llama")
    cases = [(line, share) for line in ALGORITHMS + OF_TWO for share in ("none", "reference", "all")]
    cases += [(line, "all") for line in JOINT]
    checks = []
    for n, (line, share) in enumerate(cases):
        models = f"--actor_model_name_or_path {both}"
        models += "" if share == "all" else f" --reward_model_name_or_path {scorer}"
        flags = f"{models} {SIZES} {ADAPTERS} --per_device_generation_batch_size 4 {line} --share {share}".split()
        checks.append({"check": "training_by_flags", "name": str(n), "flags": flags, "prompts": PROMPTS, "steps": 3})
    results, folder = run_ranks(checks, 1)

    def find(line: str, share: str) -> tuple[dict, dict]:
        name = str(cases.index((line, share)))
        return torch.load(folder / f"{name}.pt"), results[name]

    return find


def same(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    weights, wanted = found[0], expected[0]
    assert weights.keys() == wanted.keys()
    assert max((weights[name] - x).abs().max().item() for name, x in wanted.items()) < 1e-6
    assert max(x.abs().max().item() for name, x in wanted.items() if ".lora_B." in name) > 1e-2  # it did learn
    for figures, other in zip(found[1]["figures"], expected[1]["figures"], strict=True):
        assert figures == pytest.approx(other, rel=1e-4, abs=1e-5)
    for result in (found[1], expected[1]):
        assert result["frozen"] and not result["moved"] and set(result["active"]) <= {None}


@pytest.mark.parametrize("line", ALGORITHMS)
def test_shared_weights_learn_what_separate_copies_learn(line, learned):
    separate, reference, everything = (learned(line, share) for share in ("none", "reference", "all"))
    assert [x[1]["engines"] for x in (separate, reference, everything)] == [2, 1, 1]
    assert [x[1]["parts"] for x in (separate, reference, everything)] == [[False], [False], [True]]
    same(reference, separate)
    same(everything, separate)


@pytest.mark.parametrize("line", OF_TWO)
def test_so_do_actor_and_critic(line, learned):
    separate, both = learned(line, "none"), learned(line, "all")
    if "checkpointing" not in line:
        critic_is_reward = learned(line, "reference")
        assert critic_is_reward[1]["engines"] == 2 and critic_is_reward[1]["parts"] == [True]
        same(critic_is_reward, separate)
    assert separate[1]["engines"] == 3 and both[1]["engines"] == 1
    without_norm = [
        {**x[1], "figures": [{k: v for k, v in f.items() if k != "grad_norm"} for f in x[1]["figures"]]}
        for x in (both, separate)
    ]
    same((both[0], without_norm[0]), (separate[0], without_norm[1]))
    norms = [[f["grad_norm"] for f in x[1]["figures"]] for x in (both, separate)]
    assert all(whole > own for whole, own in zip(*norms, strict=True))  # the critic's part is in it


def test_a_joint_critic_learns_the_actors_set(learned):
    joint, separate = JOINT
    weights, figures = learned(joint, "all")
    assert {name.split(".")[-2] for name in weights if ".lora_" in name} == {"actor"} and "value" in weights
    assert figures["engines"] == 1 and not figures["moved"]
    own, _ = learned(separate, "all")
    assert {name.split(".")[-2] for name in own if ".lora_" in name} == {"actor", "critic"}
    assert own["value"].shape == weights["value"].shape
