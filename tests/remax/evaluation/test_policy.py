"""Held-out figures do not depend on the number of ranks, and are what their definitions say."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import replace

import pytest
import torch

from remax.core.batches import First
from remax.core.logprobs import PolicyOutput
from remax.core.sampling import Sampling
from remax.core.sequences import Sequences
from remax.engines.base import FrozenEngine
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.policy import Reference
from remax.engines.scorer import Reward
from remax.evaluation import answers
from remax.evaluation.answers import write_answers
from remax.evaluation.close_ups import pieces
from remax.evaluation.policy import PolicyEvaluation, evaluate_policy, isolated_rng, perplexity
from remax.evaluation.ranking import pair_scores
from remax.generation.decoder import GenerationSettings
from remax.generation.rollout import rollout
from remax.models.policy import load_policy
from remax.models.reward_model import load_reward_model
from remax.rewards.composite import CompositeReward, FunctionReward, Part
from remax.rewards.functions import reward_function
from utils.data.batches import PairBatch, PromptBatch, SupervisedBatch
from utils.tokenizer import load_tokenizer


class PlainActor:
    """What evaluation needs of an actor, without DeepSpeed."""

    def __init__(self, model, settings: GenerationSettings | None = None, sampling: Sampling | None = None):
        self.model, self.settings, self.sampling = model, settings, sampling

    def logprobs(self, sequences: Sequences, entropy: bool = False, sampling: Sampling | None = None) -> PolicyOutput:
        logprobs, h, _ = self.model(sequences, entropy=entropy, sampling=sampling or self.sampling)
        return PolicyOutput(logprobs, h)

    def rollout(self, prompts, *, samples: int = 1, greedy: bool = True):
        return rollout(self.model.hf, prompts, self.settings, samples=samples, greedy=greedy)


def load(folder, loader=load_policy):
    tokenizer = load_tokenizer(str(folder))
    return loader(str(folder), "--model", dtype=torch.float32, tokenizer=tokenizer), tokenizer


def supervised_batch(sequences: Sequences, weight: list[float]) -> SupervisedBatch:
    return SupervisedBatch(
        input_ids=sequences.input_ids,
        lengths=sequences.lengths,
        prompt_lengths=sequences.prompt_lengths,
        weight=torch.tensor(weight),
    )


@torch.no_grad()
def test_perplexity_by_hand(make_policy, sequences_of):
    # exp( - sum of log p of all answer tokens / their number ), over batches; a row of weight 0 does not count.
    model, tokenizer = load(make_policy("llama"))
    batches = [sequences_of(seed, 3, len(tokenizer)) for seed in (0, 1)]
    loader = [supervised_batch(batches[0], [1.0, 1.0, 1.0]), supervised_batch(batches[1], [1.0, 1.0, 0.0])]
    total, tokens = 0.0, 0
    for sequences, rows in zip(batches, (3, 2), strict=True):
        for i in range(rows):
            start, length = int(sequences.prompt_lengths[i]), int(sequences.lengths[i])
            ids = sequences.input_ids[i, :length]
            logp = model.hf(ids[None]).logits[0].double().log_softmax(-1)
            total -= logp[torch.arange(start - 1, length - 1), ids[start:]].sum().item()
            tokens += length - start
    for sampling in (None, Sampling(0.5, 0.8)):  # the model's own, also where answers are drawn otherwise
        figures = perplexity(PlainActor(model, sampling=sampling), loader)
        assert figures["loss"] == pytest.approx(total / tokens, rel=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


@torch.no_grad()
def test_perplexity_is_without_dropout_and_over_the_learned_tokens(make_policy, sequences_of):
    tokenizer = load_tokenizer(str(make_policy("gpt2")))
    options = {"dtype": torch.float32, "tokenizer": tokenizer, "disable_dropout": False}
    model, rows = load_policy(str(make_policy("gpt2")), "--m", **options), sequences_of(3, 4, len(tokenizer))
    learned = torch.rand(rows.answer_mask.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    logprobs = model.eval()(rows)[0][learned & rows.answer_mask]
    model.train()
    batch = replace(supervised_batch(rows, [1.0] * 4), loss_mask=learned)
    assert perplexity(PlainActor(model), [batch])["loss"] == pytest.approx(-logprobs.mean().item(), rel=1e-5)
    assert model.training


def test_draws_of_an_evaluation_are_its_own(monkeypatch):
    # The same every time, others on another rank; and whoever draws next draws what it would have drawn.
    def draws(rank: str) -> torch.Tensor:
        monkeypatch.setenv("RANK", rank)
        with isolated_rng(3):
            return torch.rand(4)

    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    first = draws("0")
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(draws("0"), first) and not torch.equal(draws("1"), first)


@torch.no_grad()
def test_chosen_and_rejected_are_scored_as_single_rows(make_scorer, sequences_of):
    model, tokenizer = load(make_scorer("gpt2"), load_reward_model)
    chosen, rejected = sequences_of(0, 3, len(tokenizer), longest=9), sequences_of(1, 3, len(tokenizer), longest=4)
    prompts = torch.minimum(chosen.prompt_lengths, rejected.prompt_lengths)
    batch = PairBatch(
        chosen_ids=chosen.input_ids,
        chosen_lengths=chosen.lengths,
        rejected_ids=rejected.input_ids,
        rejected_lengths=rejected.lengths,
        prompt_lengths=prompts,
        weight=torch.ones(3),
    )
    engine = type("Engine", (), {"score": staticmethod(model.eval())})
    for got, rows in zip(pair_scores(engine, batch), (chosen, rejected), strict=True):
        for i, score in enumerate(got):
            alone = model.hf.base_model(rows.input_ids[i : i + 1, : rows.lengths[i]]).last_hidden_state[0, -1]
            torch.testing.assert_close(score, model.hf.score(alone)[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_policy_figures_by_hand(make_policy, make_scorer):
    model, tokenizer = load(make_policy("llama"))
    other, _ = load(make_policy("llama", seed=1))
    scorer, _ = load(make_scorer("llama"), load_reward_model)
    actor = PlainActor(model.eval(), GenerationSettings(5, tokenizer.pad_token_id))
    reference, reward = Reference(FrozenEngine(other, EngineConfig())), Reward(FrozenEngine(scorer, EngineConfig()))
    eos = 264
    model.hf.generation_config.eos_token_id = [eos]
    batches = [([[0, 40], [50, 60]], [1, 2], [1.0, 1.0]), ([[70, 80], [70, 80]], [2, 2], [1.0, 0.0])]
    loader = [
        PromptBatch(
            input_ids=torch.tensor(ids),
            lengths=torch.tensor(lengths),
            weight=torch.tensor(weight),
            prompts=[f"prompt {i}" for i in lengths],
            columns={"solution": [f"solution {i}" for i in lengths]},
        )
        for ids, lengths, weight in batches
    ]
    result = evaluate_policy(actor, reference, reward, loader, tokenizer, greedy=True)
    scores, tokens, kls, entropies, nll, ended = [], [], [], [], [], []
    for prompt in ([40], [50, 60], [70, 80]):
        ids = list(prompt)
        while len(ids) - len(prompt) < 5 and (len(ids) == len(prompt) or ids[-1] != eos):
            ids.append(int(model.hf(torch.tensor([ids])).logits[0, -1].argmax()))
        row, n = torch.tensor(ids), len(ids) - len(prompt)
        logp, logq = (hf(row[None]).logits[0, -n - 1 : -1].log_softmax(-1) for hf in (model.hf, other.hf))
        drawn = torch.arange(n), row[-n:]
        scores.append(scorer.hf(row[None]).logits.item())
        tokens.append(n)
        kls.append((logp - logq)[drawn].sum().item())
        entropies.append(-(logp.exp() * logp).sum().item())
        nll.append(-logq[drawn].sum().item())
        ended.append(ids[-1] == eos)
    n, total = 3, sum(tokens)
    mean = sum(scores) / n
    first, second = scores[0] - mean, scores[1] + scores[2] - 2 * mean  # two prompts, of which one has two answers
    assert result.figures == pytest.approx(
        {
            "reward": mean,
            "reward_standard_error": math.sqrt(2 / (2 - 1) * (first**2 + second**2)) / n,
            "length": total / n,
            "ended": sum(ended) / n,
            "kl": sum(kls) / n,
            "kl_per_token": sum(kls) / total,
            "entropy": sum(entropies) / total,
            "reference_perplexity": math.exp(sum(nll) / total),
        },
        rel=1e-4,
    )
    assert [row["length"] for row in result.answers] == tokens
    assert [row["prompt"] for row in result.answers] == ["prompt 1", "prompt 2", "prompt 2"]
    assert result.sample().startswith("--- prompt: prompt 1")

    # Sampled, and the first batch's greedy answers beside: those of above, and no figure moves.
    def ten(prompts, answers, solution):
        assert solution in (["solution 1"], ["solution 1", "solution 2"], ["solution 2", "solution 2"])
        return [10.0] * len(answers)

    function = Part("ten", FunctionReward(reward_function(ten), tokenizer))
    total = CompositeReward([Part("model", reward), function])
    sampled, both = (evaluate_policy(actor, reference, total, loader, tokenizer, close_ups=n) for n in (0, 3))
    assert both.figures == sampled.figures and both.answers == sampled.answers and len(both.close_ups) == 2
    for row, alone, expected in zip(both.close_ups, result.answers, scores, strict=False):
        assert row["greedy"] == alone["answer"] and row["greedy_reward"] == pytest.approx(10 + expected, abs=1e-3)

    # Token by token: the two rows of the first batch; what the tokens say adds up to what is said of the whole.
    seen = []

    def weigh(rollout, logprobs):
        seen.append(rollout)
        return logprobs - rollout.reference_logprobs + rollout.baseline[:, None]

    closer = evaluate_policy(actor, reference, total, loader, tokenizer, close_ups=3, weigh=weigh)
    assert closer.figures == sampled.figures and closer.answers == sampled.answers and len(closer.close_ups) == 2
    for close, row, beside in zip(closer.close_ups, closer.answers, both.close_ups, strict=False):
        assert row.items() <= close.items() and close["greedy"] == beside["greedy"]
        assert "".join(close["tokens"]).startswith(row["answer"]) and len(close["tokens"]) == row["length"]
        moved = [a - k for a, k in zip(close["advantage"], close["kl"], strict=True)]
        assert moved == pytest.approx([close["greedy_reward"]] * row["length"], abs=2e-3)
    of_two = sum(sum(row["kl"]) for row in closer.close_ups)
    (rollout_,) = seen
    mask = rollout_.sequences.answer_mask
    expected = ((rollout_.old_logprobs - rollout_.reference_logprobs) * mask).sum().item()
    assert of_two == pytest.approx(expected, abs=0.01) and abs(of_two) > 0.1
    assert evaluate_policy(actor, reference, total, loader, tokenizer, close_ups=1).close_ups[0].keys() >= {"kl"}


def test_pieces_are_the_text_that_each_token_adds(tokenizer):
    text = " Figs, é \N{GRINNING FACE} and\n  pears"
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == text + tokenizer.eos_token
    face = found.index(next(piece for piece in found if "\N{GRINNING FACE}" in piece))
    assert found[face - 3 : face] == ["", "", ""]  # a character of four bytes, each a token
    assert pieces(tokenizer, ids[: face - 1])[-1].endswith("\N{REPLACEMENT CHARACTER}")  # cut off within it
    assert pieces(tokenizer, []) == []


def test_first_is_the_same_every_time():
    assert [list(First(range(5), 2)), list(First(range(5), 0))] == [[0, 1], [0, 1, 2, 3, 4]]
    some = First(range(5), 2)
    assert list(some) == list(some)


def test_answers_are_written_a_line_each(tmp_path):
    evaluation = PolicyEvaluation({}, [{"prompt": "é", "answer": "a\nb", "reward": 1.0, "length": 2}])
    write_answers(tmp_path / "answers" / "step.jsonl", evaluation.answers)
    text = (tmp_path / "answers" / "step.jsonl").read_text(encoding="utf-8")
    assert text.count("\n") == 1 and json.loads(text) == evaluation.answers[0] and "é" in text


# --- on one rank and on two


@pytest.fixture(scope="module")
def on_ranks(make_policy, make_scorer, rank_answers, run_ranks, tmp_path_factory):
    """The same evaluations and fine-tunings on one rank and on two."""
    from remax.demo.corpus import make_corpus

    data = make_corpus(tmp_path_factory.mktemp("data"), seed=0, train_rows=36, test_rows=7)
    common = {"data": str(data), "cache": str(tmp_path_factory.mktemp("cache")), "zero_stage": 2}
    ranked = str(rank_answers(data, tmp_path_factory.mktemp("ranked")))
    policy, scorer, padless = str(make_policy("llama")), str(make_scorer("llama")), str(make_policy("gpt2", "none"))
    zero_3 = {"zero_stage": 3, "new_pad": True, "packing": True, "lora": "attn.c_"}
    found = {}
    for ranks in (1, 2):
        tune = {"check": "fine_tune", "batch": 4 // ranks, "accumulation": 2}
        checks = [
            {"check": "evaluate", "name": "figures", "model": policy, "scorer": scorer},
            {"check": "evaluate", "name": "figures at ZeRO-3", "model": policy, "scorer": scorer, "zero_stage": 3},
            {"check": "function_fails", "name": "function"},
            tune | {"name": "supervised", "task": "supervised", "model": policy, "max_steps": 0},
            tune | {"name": "ranking", "task": "ranking", "model": scorer, "max_steps": 3},
            tune | {"name": "rankings", "task": "ranking", "data": ranked, "model": scorer, "max_steps": 3},
            tune | {"name": "preference", "task": "preference", "model": policy, "max_steps": 3},
            tune | {"name": "hydra", "task": "hydra", "model": policy, "max_steps": 3},
            tune | zero_3 | {"name": "hydra at ZeRO-3", "task": "hydra", "model": padless, "max_steps": 3},
        ]
        found[ranks] = run_ranks([common | check for check in checks], ranks)
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("stage", ["figures", "figures at ZeRO-3"])
def test_figures_do_not_depend_on_the_number_of_ranks(stage, on_ranks):
    # 7 held-out rows, batches of 2: one rank sees 4 batches, two ranks 2 each, with a filler row.
    alone, two = (on_ranks[ranks][0][stage] for ranks in (1, 2))
    for kind in ("perplexity", "ranking", "policy"):
        assert two[kind] == pytest.approx(alone[kind], rel=1e-4, abs=1e-5), kind
    assert [row["answer"] for row in two["answers"]] == [row["answer"] for row in alone["answers"]]
    assert len(two["answers"]) == 7
    assert two["training"] and two["first"] != two["perplexity"]


@pytest.mark.ranks
def test_a_reward_function_that_fails_on_one_rank_stops_all_with_its_error(on_ranks):
    for ranks, (results, _) in on_ranks.items():
        errors = results["function"]["errors"]
        assert len(errors) == ranks and len(set(errors)) == 1
        assert "ZeroDivisionError: division by zero" in errors[0] and f"On rank {ranks - 1}, sample" in errors[0]


@pytest.mark.ranks
@pytest.mark.parametrize("task", ["supervised", "ranking", "rankings", "preference", "hydra", "hydra at ZeRO-3"])
def test_fine_tuning_does_not_depend_on_the_number_of_ranks(task, on_ranks):
    lines = {}
    for ranks, (results, folder) in on_ranks.items():
        text = (folder / task / "metrics.jsonl").read_text()
        lines[ranks] = [json.loads(line) for line in text.splitlines()]
        evaluated = [line["step"] for line in lines[ranks] if any(name.startswith("eval/") for name in line)]
        assert evaluated[0] == 0 and evaluated[-1] == results[task]["steps"]
    assert len(lines[1]) == len(lines[2])
    for alone, two in zip(lines[1], lines[2], strict=True):
        assert alone.keys() == two.keys()
        for name in alone:
            # Neighbours decide of padding; time and memory are those of the machine.
            if name not in ("time", "train/padding_share", "run/peak_memory_gib") and "second" not in name:
                assert two[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name
    before, after = (on_ranks[2][0][task]["results"][when] for when in ("before", "after"))
    assert all(after[name] != before[name] for name in {"supervised": ["loss"]}.get(task, ["margin"]))
    assert ("best_of_k_accuracy" in after) == (task == "rankings")


def test_answers_that_a_full_disk_does_not_take_end_no_training(tmp_path, monkeypatch, capsys):
    def full(path, rows):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(answers, "write_rows", full)
    write_answers(tmp_path / "answers" / "step.jsonl", [{"answer": "a"}])
    place = tmp_path / "answers" / "step.jsonl"
    assert capsys.readouterr().out == f"warning: no space left for {place}; make room: these answers are not kept\n"
