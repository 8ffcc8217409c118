"""What the roles ask of their models: with or without dropout, in which distribution, in how many forwards."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from remax.core.sampling import Sampling
from remax.core.sequences import Sequences
from remax.engines import policy
from remax.engines.base import FrozenEngine
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.policy import Actor, Reference
from remax.engines.scorer import Reward, TrainedReward
from remax.generation.decoder import GenerationSettings
from remax.models.policy import PolicyModel, load_policy
from remax.models.reward_model import load_reward_model
from utils.tokenizer import load_tokenizer

CPU = EngineConfig()


@pytest.fixture
def engine(make_policy, make_scorer):
    """engine("gpt2", scorer=False) -> a model with its dropout, not trained but able to be in training mode."""

    def load(family: str, scorer: bool = False) -> FrozenEngine:
        folder = str((make_scorer if scorer else make_policy)(family))
        load = load_reward_model if scorer else load_policy
        tokenizer = load_tokenizer(folder)
        return FrozenEngine(load(folder, "--m", dtype=torch.float32, tokenizer=tokenizer, disable_dropout=False), CPU)

    return load


@torch.no_grad()
def test_old_log_probs_and_values_have_no_dropout(engine, sequences_of):
    # GPT-2 drops out a tenth. What is told of a rollout is told without, and training goes on with it.
    rows = sequences_of(0, 4, 300)
    actor, critic = engine("gpt2"), engine("gpt2", scorer=True)
    for role, told, of_model in (
        (Actor(actor), Actor.old_logprobs, lambda: actor.model(rows)[0]),
        (Reference(actor), Reference.logprobs, lambda: actor.model(rows)[0]),
        (TrainedReward(critic), TrainedReward.old_values, lambda: critic.model(rows, every_token=True)),
    ):
        expected = of_model()
        role.engine.train()
        assert not torch.allclose(of_model(), expected, atol=1e-2)
        assert torch.equal(told(role, rows), expected)
        assert role.model.training
        role.engine.train(False)


@torch.no_grad()
@pytest.mark.parametrize("zero_stage", [0, 3])  # the model's own head, and the copy of one that is spread over ranks
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_the_references_head_gives_the_models_logits(family, zero_stage, engine, sequences_of):
    # With a bias, as Phi's head has; Gemma's logits are capped, Granite's scaled.
    frozen = engine(family)
    frozen.config = EngineConfig(zero_stage)
    hf = frozen.model.hf
    head = hf.get_output_embeddings()
    torch.manual_seed(0)
    biased = nn.Linear(head.in_features, head.out_features)
    biased.weight.copy_(head.weight)
    hf.set_output_embeddings(biased)
    rows, reference = sequences_of(1, 3, 300), Reference(frozen)
    logits = reference.head()(reference.hidden(rows))  # (B, A, V)
    expected = rows.at(hf(rows.input_ids).logits, rows.predictor_columns)
    torch.testing.assert_close(logits[rows.answer_mask], expected[rows.answer_mask], rtol=1e-5, atol=1e-5)
    assert isinstance(frozen.model, PolicyModel) and biased.bias.abs().max() > 0.1


@torch.no_grad()
def test_in_which_distribution_a_policy_is_asked(engine, sequences_of):
    # An actor learns what it draws from, unless told otherwise for itself or for one text.
    rows, frozen = sequences_of(2, 3, 300), engine("llama")
    drawn, other = Sampling(0.5, top_k=20), Sampling(2.0)
    generation = GenerationSettings(4, 0, drawn)

    def told(sampling: Sampling) -> torch.Tensor:
        return frozen.model(rows, sampling=sampling)[0]

    actor = Actor(frozen, generation=generation)
    assert torch.equal(actor.logprobs(rows).logprobs, told(drawn))
    assert torch.equal(actor.old_logprobs(rows), told(drawn))
    assert torch.equal(actor.logprobs(rows, sampling=other).logprobs, told(other))
    assert torch.equal(Actor(frozen, generation=generation, sampling=other).logprobs(rows).logprobs, told(other))
    assert torch.equal(Actor(frozen).logprobs(rows).logprobs, told(Sampling()))
    assert torch.equal(Reference(frozen, sampling=drawn).logprobs(rows), told(Sampling(0.5)))  # it needs full support
    assert not torch.allclose(told(drawn), told(Sampling(0.5)))


def test_ranks_agree_on_the_pieces_where_each_is_a_call_of_the_head(engine, sequences_of, monkeypatch):
    # At ZeRO-3. A head that is called once for all pieces needs no agreement, for which the host would wait.
    rows, asked = sequences_of(2, 3, 300), []
    monkeypatch.setattr(policy, "largest_of_ranks", lambda number: asked.append(number) or number)
    llama, gemma = (engine(family) for family in ("llama", "gemma2"))  # Gemma 2 caps its logits
    reference = Reference(llama)
    kl = {"reference_hidden": reference.hidden(rows), "reference_head": reference.head()}
    ways = [(llama, {}), (llama, {"entropy": True}), (llama, {"stats_grad": True})]
    ways += [(gemma, {}), (llama, {"entropy": True, "stats_grad": True}), (llama, kl)]
    ways += [(llama, {"sampling": Sampling(top_k=20)})]
    for stage in (2, 3):
        for i, (frozen, wanted) in enumerate(ways):
            frozen.config = EngineConfig(stage)
            asked.clear()
            Actor(frozen, chunk_size=4).logprobs(rows, **wanted)
            assert asked == ([math.ceil(rows.answer_tokens / 4)] if stage == 3 and i > 2 else []), (stage, i)


def test_answers_are_scored_in_so_many_forwards(engine, sequences_of):
    frozen, sizes = engine("llama", scorer=True), []
    rows, whole = sequences_of(3, 5, 300), frozen.model

    def forward(part):
        sizes.append(len(part))
        return whole(part)

    frozen.wrapped = forward
    scores = [Reward(frozen).score(rows, forwards) for forwards in (1, 2, 5)]
    assert sizes[0] == 5 and sum(sizes[1:3]) == 5 and sizes[3:] == [1] * 5
    for some in scores[1:]:
        torch.testing.assert_close(some, scores[0])
    assert not scores[0].requires_grad
    assert not any(p.requires_grad for p in whole.parameters())  # no memory for gradients either


def test_padded_rows_are_learned_in_forwards_of_similar_length(engine):
    lengths = torch.tensor(
        [30, 11, 10, 40, 13, 12, 38, 14, 39]
    )  # 90 of 207 tokens in the shorter ones, 2 forwards for 9 rows
    torch.manual_seed(0)
    rows = Sequences(torch.randint(3, 300, (9, 40)), torch.ones_like(lengths), lengths - 1)
    frozen = engine("llama", scorer=True)
    role, widths = TrainedReward(frozen), []
    frozen.model.requires_grad_()
    weight = torch.arange(9.0)

    def gradients(scores: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad((scores * weight).sum(), list(frozen.model.parameters())))

    whole = frozen.model(rows)
    frozen.model.hf.base_model.register_forward_pre_hook(
        lambda module, args, options: widths.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    scores = role.score(rows)
    assert widths == [(6, 30), (3, 40)] and role.slots(rows) == 6 * 30 + 3 * 40
    torch.testing.assert_close(scores, whole)
    for found, expected in zip(gradients(scores), gradients(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    frozen.config = EngineConfig(3)  # where every rank has to read as often as the others
    widths.clear()
    role.score(rows)
    assert widths == [(9, 40)]
