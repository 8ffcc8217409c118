"""Does the doctor tell a good reward model from a random one, and from one that counts words?"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from remax.checks.findings import FAILURE, OK, SKIPPED, WARNING
from remax.checks.rewards import check_ranking, check_scores, held_out_pairs, ranking_findings
from remax.rewards.composite import CompositeReward, FunctionReward, Part
from remax.rewards.functions import RewardFunction
from utils.data.config import DataConfig


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


def scorer(score) -> CompositeReward:
    """A reward model that scores by a function of sequences."""
    return CompositeReward([Part("judge", SimpleNamespace(score=score, model=torch.nn.Module()))])


def data(path, **options) -> DataConfig:
    return DataConfig(data_path=[str(path)], **options)


def test_pairs_of_a_data_set(corpus, tokenizer):
    pairs = held_out_pairs(data(corpus), tokenizer, max_len=200, limit=10, batch_size=4)
    assert sum(int(batch.weight.sum()) for batch in pairs) == 10
    # a reward model that knows how far down the vocabulary an answer reaches: some score, differing between answers
    ranks, length = check_ranking(scorer(lambda s: s.input_ids.float().mean(1)), pairs)
    assert ranks.numbers["pairs"] == 10
    longest = scorer(lambda s: s.lengths.float())
    ranks, length = check_ranking(longest, pairs)
    assert ranks.numbers["accuracy"] == pytest.approx(length.numbers["longer_wins"])


def test_the_best_and_the_worst_of_ranked_answers_are_a_pair(tmp_path, tokenizer):
    answers = [" middle", " worst answer", " best", ""]
    rows = [{"prompt": f"Human: {i} Assistant:", "answers": answers, "scores": [2, 1, 3, 9]} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (batch,) = held_out_pairs(data(tmp_path / "rows.jsonl", cache_dir=str(tmp_path)), tokenizer, max_len=100)
    texts = [
        tokenizer.decode(ids[0][: lengths[0]], skip_special_tokens=True)
        for ids, lengths in ((batch.chosen_ids, batch.chosen_lengths), (batch.rejected_ids, batch.rejected_lengths))
    ]
    assert [text.split("Assistant:")[1] for text in texts] == [" best", " worst answer"]


def test_data_without_pairs_is_skipped(tmp_path, tokenizer):
    rows = [{"prompt": "Human: a Assistant:", "chosen": f" {i}"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert held_out_pairs(data(tmp_path / "rows.jsonl"), tokenizer, max_len=100) is None
    assert [found.result for found in check_ranking(scorer(None), None)] == [SKIPPED]


# ------------------------------------------------------------------------------------------------------- several parts


def a_function(rule) -> FunctionReward:
    return FunctionReward(RewardFunction("rules:f", rule, batched=False, asynchronous=False), None)


def test_each_reward_model_ranks_by_its_name(corpus, tokenizer):
    pairs = held_out_pairs(data(corpus), tokenizer, max_len=200, limit=10, batch_size=4)
    longer, shorter = (scorer(lambda s, sign=sign: sign * s.lengths.float()).parts[0].scorer for sign in (1, -1))
    reward = CompositeReward([Part("long", longer), Part("short", shorter), Part("rule", a_function(None))])
    findings = check_ranking(reward, pairs)
    assert [found.check for found in findings] == [
        "reward model long ranks pairs",
        "reward model long is not length alone",
        "reward model short ranks pairs",
        "reward model short is not length alone",
    ]
    accuracy = [found.numbers["accuracy"] for found in findings[::2]]
    assert accuracy[0] == pytest.approx(1 - accuracy[1])
    assert [found.remedy.partition(",")[0] for found in findings[1::2]] == [
        "the policy would learn to write more",
        "the policy would learn to write less",
    ]


def test_without_a_reward_model_there_is_nothing_to_rank(corpus, tokenizer):
    pairs = held_out_pairs(data(corpus), tokenizer, max_len=200, limit=10, batch_size=4)
    (found,) = check_ranking(CompositeReward([Part("rule", a_function(None))]), pairs)
    assert (found.result, found.figure) == (SKIPPED, "no reward model: functions score")


def test_scores_of_each_part(sequences_of):
    answers = [sequences_of(0, 4, 300), sequences_of(1, 4, 300)]

    def constant(sequences, forwards=1, columns=None):
        return torch.ones(len(sequences))

    def results(*parts) -> dict[str, str]:
        return {found.check: found.result for found in check_scores(CompositeReward(parts), answers)}

    judge = Part("judge", SimpleNamespace(score=lambda s, forwards=1: s.lengths.float()))
    broken = Part("broken", SimpleNamespace(score=constant))
    rule = Part("rule", a_function(None))
    rule.scorer.score = constant
    total = "scores are finite and differ"
    assert results(judge) == {total: OK}
    # A rule that no answer of a few keeps is suspicious, not broken; a reward model that cannot tell answers apart is.
    assert results(rule) == {total: WARNING}
    assert results(judge, rule) == {total: OK, "scores of judge differ": OK, "scores of rule differ": WARNING}
    assert results(judge, broken) == {total: OK, "scores of judge differ": OK, "scores of broken differ": FAILURE}
