"""The reward of several parts: its formula, what its functions read, and that a rule alone can be learned."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler

from remax.algorithms import build_algorithm
from remax.algorithms.kl import KLPenalty
from remax.checks.generation import take_probe
from remax.checks.packing import start_packing
from remax.checks.rewards import check_scores
from remax.core.rollout import Rollout
from remax.core.sequences import Prompts, Sequences
from remax.engines.base import Engine, FrozenEngine, StepResult
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.policy import Actor, Reference
from remax.engines.scorer import Reward, TrainedReward
from remax.evaluation.policy import PolicyEvaluation, evaluate_policy
from remax.generation.decoder import GenerationSettings
from remax.models.policy import load_policy
from remax.models.reward_model import load_reward_model
from remax.rewards import composite
from remax.rewards.composite import CompositeReward, FunctionReward, Part, try_functions
from remax.rewards.functions import RewardFunction, reward_function
from remax.training import trainer as trainer_module
from remax.training.trainer import Trainer, TrainerSettings
from utils.data.batches import PromptBatch
from utils.data.tokens import encode_prompts
from utils.run import UserError
from utils.tokenizer import load_tokenizer

CPU = EngineConfig(dtype="fp32")


def by_rule(rule, tokenizer) -> FunctionReward:
    return FunctionReward(RewardFunction("rules:f", rule, batched=False, asynchronous=False), tokenizer)


@pytest.fixture
def judges(make_scorer):
    """Two reward models of different weights, and their tokenizer."""
    folders = [str(make_scorer("llama", seed=seed)) for seed in (5, 6)]
    tokenizer = load_tokenizer(folders[0])
    load = [load_reward_model(folder, "--r", dtype=torch.float32, tokenizer=tokenizer) for folder in folders]
    return [Reward(FrozenEngine(model, CPU)) for model in load], tokenizer


@torch.no_grad()
def plain_scores(reward: Reward, sequences: Sequences) -> torch.Tensor:
    """Each row alone, without padding."""
    rows = [sequences.input_ids[i : i + 1, : sequences.lengths[i]] for i in range(len(sequences))]
    return torch.cat([reward.model.hf(row).logits[:, -1:].flatten() for row in rows])


@pytest.mark.parametrize("forwards", [1, 3, 7])
def test_the_formula(forwards, judges, sequences_of):
    (first, second), tokenizer = judges
    sequences = sequences_of(0, 7, 300)
    length = by_rule(lambda prompt, answer: len(answer), tokenizer)
    reward = CompositeReward(
        [
            Part("first", first, weight=2.0, mean=0.5, std=4.0),
            Part("second", second, weight=-0.5),
            Part("length", length, weight=0.01),
        ]
    )
    scores = {"first": plain_scores(first, sequences), "second": plain_scores(second, sequences)}
    scores["length"] = torch.tensor([float(len(text)) for text in length.texts(sequences)[1]])
    expected = 2.0 * (scores["first"] - 0.5) / 4.0 - 0.5 * scores["second"] + 0.01 * scores["length"]
    total, parts = reward.score_parts(sequences, forwards)
    assert total.dtype == torch.float32 and list(parts) == list(reward.part_names) == ["first", "second", "length"]
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reward.score(sequences, forwards), total)
    for name in scores:
        torch.testing.assert_close(parts[name], scores[name], rtol=1e-4, atol=1e-4)
    assert [part.name for part in reward.models] == ["first", "second"]


def test_one_part_is_that_part(judges, sequences_of):
    (first, _), _ = judges
    sequences = sequences_of(1, 5, 300)
    total, parts = CompositeReward([Part("first", first)]).score_parts(sequences)
    assert torch.equal(total, first.score(sequences)) and parts == {}  # nothing beside the total


# --------------------------------------------------------------------------------------------------------------- texts


def rows_of(tokenizer, texts: list[tuple[str, str, bool]]) -> Sequences:
    """Sequences of (prompt, answer, whether it ends) with the tokenizer's pad behind them."""
    ids = []
    for prompt, answer, ended in texts:
        (start,) = encode_prompts(tokenizer, [prompt])
        rest = tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
        ids.append((start, rest + [tokenizer.eos_token_id] * ended))
    width = max(len(start) + len(rest) for start, rest in ids)
    rows = [start + rest + [tokenizer.pad_token_id] * (width - len(start) - len(rest)) for start, rest in ids]
    lengths = [torch.tensor([len(part) for part in parts]) for parts in zip(*ids, strict=True)]
    return Sequences(torch.tensor(rows), *lengths)


@pytest.mark.parametrize("pad", ["own", "eos"])
def test_functions_read_prompt_and_answer_without_special_tokens(pad, tokenizers):
    # Also where the end token pads, stands behind the answer, or is the whole answer; and where nothing ended.
    tokenizer = load_tokenizer(str(tokenizers[pad]))
    texts = [
        ("\n\nHuman: Name a bird, please .\n\nAssistant:", " A robin , of course.", True),
        ("\n\nHuman: Hi\n\nAssistant:", "", True),
        ("\n\nHuman: é\n\nAssistant:", " A longer answer that does not", False),
    ]
    reward = by_rule(lambda prompt, answer: 0.0, tokenizer)
    rows = rows_of(tokenizer, texts)
    junk = rows.input_ids.masked_fill(~rows.mask, 50)  # what stands behind a row's end means nothing
    prompts, answers = reward.texts(replace(rows, input_ids=junk))
    assert prompts == [prompt for prompt, *_ in texts]
    assert answers == [answer for _, answer, _ in texts]


def test_a_prompt_that_was_cut_has_lost_its_beginning(tokenizers):
    tokenizer = load_tokenizer(str(tokenizers["own"]))
    (ids,) = encode_prompts(tokenizer, ["\n\nHuman: one two three\n\nAssistant:"])
    kept = torch.tensor([ids[-3:] + [tokenizer.eos_token_id]])
    prompts, _ = by_rule(None, tokenizer).texts(Sequences(kept, torch.tensor([3]), torch.tensor([1])))
    assert prompts == [tokenizer.decode(ids[-3:])] and "\n\nHuman: one two three\n\nAssistant:".endswith(prompts[0])


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_failure_names_function_rank_prompt_and_answer(tokenizers, monkeypatch):
    tokenizer = load_tokenizer(str(tokenizers["own"]))
    monkeypatch.setenv("RANK", "1")
    sequences = rows_of(tokenizer, [("\n\nHuman: Hi", " one", True), ("\n\nHuman: " + "long " * 40, " two", True)])
    reward = by_rule(lambda prompt, answer: 1.0 if "one" in answer else float("nan"), tokenizer)
    with pytest.raises(UserError) as caught:
        CompositeReward([Part("f", reward)]).score(sequences)
    beginning = "'\\n\\nHuman: " + ("long " * 40)[:71] + "...'"
    assert str(caught.value) == (
        "--reward_fn rules:f: returned nan (float); expected a finite number. On rank 1, sample: prompt "
        f"{beginning}, answer ' two'"
    )
    reward = FunctionReward(RewardFunction("rules:g", lambda prompts, answers: [1.0], True, False), tokenizer)
    with pytest.raises(UserError, match="returned 1 values; .* a batch of 2 whose first sample is: .*Hi', answer"):
        reward.score(sequences)


def test_a_failure_on_another_rank_is_raised_here_too(tokenizers, monkeypatch):
    # Going on alone, this rank would wait for the other one in vain.
    reward = by_rule(lambda prompt, answer: 1.0, load_tokenizer(str(tokenizers["own"])))
    monkeypatch.setattr(composite, "sum_across_ranks", lambda values: {name: x + 1.0 for name, x in values.items()})
    monkeypatch.setattr(composite, "gather_objects", lambda mine: [mine, "what the other rank says"])
    with pytest.raises(UserError, match="what the other rank says"):
        reward.score_texts(["a"], ["b"])


def test_functions_are_tried_with_an_empty_answer(tokenizers):
    tokenizer = load_tokenizer(str(tokenizers["own"]))
    try_functions([by_rule(lambda prompt, answer: len(answer), tokenizer)], ["a", "b"])
    with pytest.raises(UserError, match=r"IndexError: .*prompt 'a', answer '' \(tried before training, with made-up"):
        try_functions([by_rule(lambda prompt, answer: answer[0] == "A", tokenizer)], ["a", "b"])


def test_a_function_that_needs_a_column_is_refused_where_there_is_none(tokenizers):
    tokenizer = load_tokenizer(str(tokenizers["own"]))
    seen = []

    def right(prompts, answers, solution, ended, tokens, level=None):
        seen.append(dict(prompts=prompts, answers=answers, solution=solution, ended=ended, tokens=tokens, level=level))
        return [1.0] * len(answers)

    reward = FunctionReward(reward_function(right, "rules:right"), tokenizer)
    with pytest.raises(UserError, match="^--reward_fn rules:right: takes solution, but the data has answer$"):
        try_functions([reward], ["a", "b"], {"answer": [1, 2]}, there=lambda: "the data has answer")
    try_functions([reward], ["a", "b"], {"solution": [1, None]})
    (called,) = seen
    assert called["prompts"] == ["a", "a", "b", "b"] and called["solution"] == [1, 1, None, None]
    assert called["ended"] == [True] * 4 and min(called["tokens"]) == 1 and called["level"] is None


def test_a_time_limit_needs_a_process_that_can_be_ended(tokenizers):
    with pytest.raises(ValueError, match="only a function of load_function has a time limit"):
        FunctionReward(reward_function(lambda prompt, answer: 1.0), load_tokenizer(str(tokenizers["own"])), 5.0)


def test_a_function_touches_neither_the_random_state_nor_gradients(tokenizers):
    def seeds(prompt, answer):
        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        return 1.0

    reward = by_rule(seeds, load_tokenizer(str(tokenizers["own"])))
    state = torch.get_rng_state()
    assert reward.score_texts(["a"], ["b"]) == [1.0]
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


# ------------------------------------------------------------------------------------------------- training, evaluation


class PlainActor(Actor):
    """An actor that learns without DeepSpeed, in this process."""

    def __init__(self, model, generation, rate: float):
        engine = Engine()
        engine.model = engine.wrapped = model
        engine.config = CPU
        super().__init__(engine, generation=generation)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=rate)

    def backward(self, loss, last):
        loss.backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(self.optimizer.param_groups[0]["lr"], 1.0, False)


class PlainCritic(TrainedReward):
    """A critic that learns so, too."""

    def __init__(self, model):
        super().__init__(FrozenEngine(model, CPU))
        model.requires_grad_(True)

    backward, step = PlainActor.backward, PlainActor.step


class Counting:
    """Calls a model and notes how many rows each forward has."""

    def __init__(self, role):
        self.engine, self.rows = role.engine, []
        role.engine = self

    def __call__(self, sequences, **options):
        self.rows.append(len(sequences))
        return self.engine(sequences, **options)

    def __getattr__(self, name):
        return getattr(self.engine, name)


@pytest.fixture
def make_trainer(make_policy):
    def make(reward, tokenizer, algo: str = "remax", rate: float = 1e-3, tokens: int = 8, **settings) -> Trainer:
        folder = str(make_policy("llama"))
        actor = PlainActor(
            load_policy(folder, "--a", dtype=torch.float32, tokenizer=tokenizer),
            GenerationSettings(tokens, tokenizer.pad_token_id),
            rate,
        )
        reference = Reference(FrozenEngine(load_policy(folder, "--a", dtype=torch.float32, tokenizer=tokenizer), CPU))
        return Trainer(
            actor,
            reference,
            reward,
            build_algorithm(algo, **({"kl": KLPenalty(0.0)} | settings.pop("algorithm", {}))),
            TrainerSettings(**settings),
            measure=None,
            metrics=None,
            pad_id=tokenizer.pad_token_id,
        )

    return make


def prompts_of(rows: int) -> PromptBatch:
    noise = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 250, (rows, 4), generator=noise)
    lengths = torch.randint(1, 5, (rows,), generator=noise)
    return PromptBatch(input_ids=ids, lengths=lengths, prompts=[f"{i}?" for i in range(rows)], weight=torch.ones(rows))


def test_a_rule_alone_is_learned(make_trainer, tokenizers):
    # The share of vowels among an answer's characters.
    tokenizer = load_tokenizer(str(tokenizers["own"]))

    def vowels(prompt, answer):
        return sum(answer.count(letter) for letter in "aeiou") / max(len(answer), 1)

    reward = CompositeReward([Part("vowels", by_rule(vowels, tokenizer))])
    trainer = make_trainer(reward, tokenizer, rate=2e-2)
    torch.manual_seed(0)
    rewards = [trainer.step([prompts_of(16)])[1]["reward"] for _ in range(60)]
    before, after = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert before < 0.15 and after > 0.8, (before, after)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("algo", ["remax", "rloo"])
def test_scoring_in_several_forwards_gives_the_same_rollout(algo, packing, make_trainer, judges, monkeypatch):
    (first, second), tokenizer = judges
    rule = by_rule(lambda prompt, answer: len(answer), tokenizer)
    reward = CompositeReward([Part("first", first), Part("second", second, -1.0), Part("length", rule, 0.1)])
    options = {"kl": KLPenalty(0.1)} | ({"samples_per_prompt": 2} if algo == "rloo" else {})
    answers = 7 * options.get("samples_per_prompt", 1)
    rollouts, tallies, read = [], [], []
    for full in (10_000, 60):
        monkeypatch.setattr(trainer_module, "FULL_FORWARD", full)
        trainer = make_trainer(reward, tokenizer, algo, algorithm=options)
        counted = [Counting(role) for role in (first, second, trainer.reference)]
        torch.manual_seed(0)
        original, answered = trainer.actor.rollout, []
        trainer.actor.rollout = lambda *args, of=original, to=answered, **kw: to.append(of(*args, **kw)) or to[-1]
        sampled, greedy, _ = trainer.answer(prompts_of(7))
        if full == 60 and packing:  # after the rollouts of padded rows
            for role in (first, second):
                assert start_packing(role, 60, True, every_token=True) == ""
            assert start_packing(trainer.reference, 60, True, hidden_only=True) == ""
        for counter in counted:
            counter.rows.clear()
        rewards, baseline, _, parts = trainer.score(sampled, greedy)
        rollouts.append(trainer.annotate(Rollout(sampled, rewards, baseline)))
        tallies.append({name: float(figure.total) for name, figure in parts.items()})
        assert all(figure.count == answers for figure in parts.values())
        for counter, role in zip(counted, (first, second, trainer.reference), strict=True):
            role.engine = counter.engine
        read.append([counter.rows for counter in counted])
    both = answers + (7 if algo == "remax" else 0)  # the greedy answers go along with the sampled ones
    assert read[0] == [[both], [both], [answers]]
    assert [sum(rows) for rows in read[1]] == [both, both, answers] and min(map(len, read[1])) > 1
    if packing:
        assert all(rows % 2 == 0 for rows in read[1][0])  # with the answer that has the same prompt
    whole, cut = rollouts
    for name in ("rewards", "baseline", "reference_logprobs"):
        if (expected := getattr(whole, name)) is not None:
            torch.testing.assert_close(getattr(cut, name), expected, rtol=1e-4, atol=1e-4)
    assert whole.reference_logprobs is not None
    assert torch.equal(cut.sequences.input_ids, whole.sequences.input_ids)
    sampled, greedy = answered[0].sampled, answered[0].greedy
    torch.testing.assert_close(whole.rewards, reward.score(sampled), rtol=1e-4, atol=1e-4)
    assert (whole.baseline is not None) == (algo == "remax") == (greedy is not None)
    if greedy is not None:
        torch.testing.assert_close(whole.baseline, reward.score(greedy), rtol=1e-4, atol=1e-4)
    assert tallies[0] == pytest.approx(tallies[1]) and tallies[0].keys() == {
        f"reward/{n}" for n in ("first", "second", "length")
    }


@pytest.mark.parametrize("algo", ["remax", "rloo"])
def test_without_a_penalty_no_step_reads_the_reference(algo, make_trainer, judges):
    (first, _), tokenizer = judges
    samples = {"samples_per_prompt": 2} if algo == "rloo" else {}
    for coefficient in (0.0, 0.1):
        options = {"kl": KLPenalty(coefficient)} | samples
        trainer = make_trainer(first, tokenizer, algo, algorithm=options, micro_batch_size=2)
        counter = Counting(trainer.reference)
        rollout, figures = trainer.step([prompts_of(4)])
        asked = coefficient > 0
        assert bool(counter.rows) == asked == ("kl" in figures) == (rollout.reference_logprobs is not None)
        assert math.isfinite(figures["loss"])


def test_a_kl_over_the_vocabulary_reads_the_reference_once(make_trainer, judges):
    (first, _), tokenizer = judges
    options = {"kl": KLPenalty(0.1, "full", "loss")}
    trainer = make_trainer(first, tokenizer, algorithm=options, micro_batch_size=2)
    read = []
    backbone = trainer.reference.model.hf.base_model
    backbone.register_forward_hook(lambda module, args, output: read.append(len(output.last_hidden_state)))
    rollout, _ = trainer.step([prompts_of(4)])
    assert read == [4] and rollout.reference_hidden is not None
    logprobs = trainer.reference.logprobs(rollout.sequences)
    assert len(read) == 2 and torch.equal(rollout.reference_logprobs, logprobs)


@pytest.mark.parametrize("algo", ["remax", "rloo", "ppo"])
def test_the_fast_step_is_the_plain_one(algo, make_trainer, judges, make_scorer):
    # Padded rows in small micro-batches, with a forward for everything; then packed, prompts shared, old log-probs from
    # the decode. Weights after a step along the gradient itself, and every figure but the times.
    (first, _), tokenizer = judges
    options = {"kl": KLPenalty(0.1)} | ({} if algo == "ppo" else {"samples_per_prompt": 4})
    weights, told, tokens = [], [], []
    for fast in (False, True):
        trainer = make_trainer(first, tokenizer, algo, algorithm=options, micro_batch_size=4 if fast else 2)
        trained = [trainer.actor]
        if algo == "ppo":
            model = load_reward_model(str(make_scorer("llama")), "--c", dtype=torch.float32, tokenizer=tokenizer)
            trainer.critic = PlainCritic(model)
            trained.append(trainer.critic)
        for role in trained:
            role.optimizer = torch.optim.SGD(role.model.parameters(), lr=0.1)
        if fast:
            trainer.trusts_decode = True
            for role in (trainer.actor, trainer.reference):
                assert start_packing(role, 60, True, hidden_only=True) == ""
            for role in (first, trainer.critic) if algo == "ppo" else (first,):
                assert start_packing(role, 60, True, every_token=True) == ""
        slots = []

        def note(module, args, to=slots):
            if torch.is_grad_enabled():
                to.append(args[0].numel())

        trainer.actor.model.hf.get_input_embeddings().register_forward_pre_hook(note)
        torch.manual_seed(0)
        rollout, figures = trainer.step([prompts_of(4)])
        weights.append(torch.cat([p.detach().flatten() for role in trained for p in role.model.parameters()]))
        told.append({name: x for name, x in figures.items() if "second" not in name})  # nor tokens_per_second
        tokens.append(sum(slots))
    start = make_trainer(first, tokenizer, algo, algorithm=options).actor.model
    start = torch.cat([p.detach().flatten() for p in start.parameters()])
    moved = (weights[0][: len(start)] - start).norm()
    assert moved > 1e-3 and (weights[1] - weights[0]).norm() < 1e-3 * moved
    assert told[0].keys() == told[1].keys() and told[1] == pytest.approx(told[0], rel=1e-3, abs=1e-4)
    if algo == "ppo":
        assert told[1]["ratio"] == pytest.approx(1, abs=1e-5)  # no step was taken since the decode
    else:
        prompts = sum(rollout.sequences.prompt_lengths[::4].tolist())
        assert tokens[1] == rollout.sequences.answer_tokens + prompts < tokens[0]


def test_old_logprobs_are_those_of_the_decode_where_it_is_trusted(make_trainer, judges):
    (first, _), tokenizer = judges
    found = []
    for trusted in (False, True):
        trainer = make_trainer(first, tokenizer, "rloo", algorithm={"kl": KLPenalty(0.1), "samples_per_prompt": 2})
        trainer.trusts_decode = trusted
        counter = Counting(trainer.actor)
        torch.manual_seed(0)
        sampled, greedy, drawn = trainer.answer(prompts_of(4))
        rollout = trainer.annotate(Rollout(sampled, torch.zeros(8), old_logprobs=drawn))
        assert len(counter.rows) == (0 if trusted else 1)  # forwards of the actor besides the decode
        found.append(rollout.old_logprobs)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)
    assert found[0].abs().sum() > 1


@pytest.mark.parametrize("algo", ["remax", "rloo"])
def test_columns_stay_with_their_rows(algo, make_trainer, tokenizers):
    tokenizer, calls = load_tokenizer(str(tokenizers["own"])), []

    def right(prompts, answers, solution, ended, tokens):
        calls.append((prompts, answers, solution, ended, tokens))
        return list(range(len(answers)))

    eos = [tokenizer.eos_token_id, *range(40, 90)]  # ends that come often
    reward = CompositeReward([Part("right", FunctionReward(reward_function(right), tokenizer, eos_ids=eos))])
    trainer = make_trainer(reward, tokenizer, algo, algorithm={"samples_per_prompt": 2} if algo == "rloo" else {})
    trainer.actor.model.hf.generation_config.eos_token_id = eos
    batch = prompts_of(5)
    texts = [
        tokenizer.decode(ids[-n:], skip_special_tokens=True)
        for ids, n in zip(batch.input_ids, batch.lengths, strict=True)
    ]
    assert len(set(texts)) == 5
    batch = replace(batch, columns={"solution": texts, "unused": [None] * 5})
    trainer.step([batch])
    evaluate_policy(trainer.actor, trainer.reference, reward, [batch], tokenizer)
    columns = {"solution": texts}
    probe = take_probe(trainer.actor, Prompts(batch.input_ids, batch.lengths), columns)
    check_scores(reward, [probe.sampled, probe.greedy], probe.columns)
    # two answers to each of five prompts; one; and of the doctor's probe four and the end of the longest of these
    assert [len(answers) for _, answers, *_ in calls] == [10, 5, 5, 5]
    for i, (prompts, _, solutions, ended, tokens) in enumerate(calls):
        exact = len(prompts) - (i >= 2)
        assert prompts[:exact] == solutions[:exact] and solutions[-1].endswith(prompts[-1])
        assert any(ended) and all(0 < n <= 8 for n in tokens)
        assert all(n == 8 for n, has_ended in zip(tokens, ended, strict=True) if not has_ended)


def test_figures_name_the_parts_and_count_every_token(make_trainer, judges, monkeypatch):
    (first, _), tokenizer = judges
    rule = by_rule(lambda prompt, answer: len(answer), tokenizer)
    trainer = make_trainer(CompositeReward([Part("judge", first), Part("length", rule, 0.1)]), tokenizer)
    lengths = []
    original = trainer.actor.rollout

    def rollout(*args, **kwargs):
        answers = original(*args, **kwargs)
        lengths.append(int(answers.sampled.answer_lengths.sum() + answers.greedy.answer_lengths.sum()))
        return answers

    trainer.actor.rollout = rollout
    rollout, figures = trainer.step([prompts_of(6), prompts_of(3)])
    scores = trainer.reward.score_parts(rollout.sequences)[1]
    assert figures["reward/judge"] == pytest.approx(scores["judge"].mean().item(), rel=1e-4)
    assert figures["reward/length"] == pytest.approx(scores["length"].mean().item())
    assert figures["reward"] == pytest.approx(figures["reward/judge"] + 0.1 * figures["reward/length"], rel=1e-4)
    assert figures["tokens"] == sum(lengths)
    assert "generated_tokens" not in figures and "rows" not in figures


def test_an_adaptive_kl_moves_once_a_step(make_trainer, judges):
    (first, _), tokenizer = judges
    trainer = make_trainer(first, tokenizer)
    trainer.algorithm.kl = KLPenalty(0.1, reach="full_step", target=6.0, horizon=90)
    _, figures = trainer.step([prompts_of(9)])
    # The policy is its reference: KL 0, error -1 clipped to -.2; 9 answers of a horizon of 90.
    assert figures["kl_coefficient"] == trainer.algorithm.kl.coefficient == pytest.approx(0.1 * (1 - 0.2 * 9 / 90))


def test_an_error_in_a_step_says_which(make_trainer, tokenizers):
    tokenizer = load_tokenizer(str(tokenizers["own"]))
    trainer = make_trainer(CompositeReward([Part("f", by_rule(lambda prompt, answer: None, tokenizer))]), tokenizer)
    batches = [prompts_of(2)]
    loader = DataLoader(batches, batch_size=None, sampler=Epochs(batches))
    trainer.measure = lambda: trainer.step(batches)
    with pytest.raises(UserError, match="^evaluation at step 0: --reward_fn rules:f: returned None; expected a number"):
        trainer.train(loader)
    trainer.measure = lambda: PolicyEvaluation({"reward": 0.0, "kl": 0.0, "kl_per_token": 0.0})
    trainer.metrics = SimpleNamespace(log=lambda *args, **kwargs: None)
    with pytest.raises(UserError, match="^step 1: --reward_fn rules:f: returned None; expected a number"):
        trainer.train(loader)


class Epochs(SequentialSampler):
    """The order of a loader whose epochs are all alike."""

    resume_at = 0

    def set_epoch(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, int]:
        return {}


def test_an_evaluation_names_the_parts(make_trainer, judges):
    (first, _), tokenizer = judges
    rule = by_rule(lambda prompt, answer: len(answer), tokenizer)
    reward = CompositeReward([Part("judge", first, 0.5, mean=1.0, std=2.0), Part("length", rule, 0.1)])
    trainer = make_trainer(reward, tokenizer)
    loader = [replace(prompts_of(4), weight=torch.tensor([1.0, 1.0, 1.0, 0.0]))]
    evaluation = evaluate_policy(trainer.actor, trainer.reference, reward, loader, tokenizer, greedy=True)
    rows, figures = evaluation.answers, evaluation.figures
    assert [row["reward/length"] for row in rows] == [len(row["answer"]) for row in rows] and len(rows) == 3
    for name in ("reward", "reward/judge", "reward/length"):
        assert figures[name] == pytest.approx(sum(row[name] for row in rows) / 3, abs=1e-3)
    expected = 0.5 * (figures["reward/judge"] - 1.0) / 2.0 + 0.1 * figures["reward/length"]
    assert figures["reward"] == pytest.approx(expected, rel=1e-4)
    json.dumps(rows)


def test_a_calibrated_baseline_reads_what_the_greedy_answers_cost(make_trainer, judges):
    (first, _), tokenizer = judges
    trainer = make_trainer(CompositeReward([Part("first", first)]), tokenizer, rate=1e-2, micro_batch_size=3)
    settings = {"baseline": "calibrated", "samples_per_prompt": 2, "gamma": 1.0, "clip_reward_value": 0.0}
    trainer.algorithm = build_algorithm("remax", kl=KLPenalty(0.5), **settings)
    original, answered = trainer.actor.rollout, []
    trainer.actor.rollout = lambda *args, **kw: answered.append(original(*args, **kw)) or answered[-1]
    torch.manual_seed(0)
    for step in range(2):
        before = deepcopy(trainer.actor.model)
        rollout, figures = trainer.step([prompts_of(6)])
        greedy = answered[-1].greedy
        costs = []
        for i in range(6):  # w = 1 - pi, p_t = beta * the KL from t on, gamma 1; a row at a time
            one = greedy.select(slice(i, i + 1))
            with torch.no_grad():
                drawn, reference = before(one)[0][0].double(), trainer.reference.model(one)[0][0].double()
            w, p = 1 - drawn.exp(), 0.5 * (drawn - reference).flip(0).cumsum(0).flip(0)
            costs += 2 * [float((w * p).sum() / w.sum())]
        assert rollout.greedy_cost.tolist() == pytest.approx(costs, abs=1e-5)
        assert rollout.baseline.tolist() == pytest.approx(first.score(greedy).repeat_interleave(2).tolist(), abs=1e-4)
        assert (max(costs) > 1e-3) == bool(step)  # at first the policy is its reference
        assert figures["calibration/greedy"] == (1.0 if step == 0 else trainer.algorithm.coefficients["greedy"])
    assert figures["calibration/greedy"] != 1.0
