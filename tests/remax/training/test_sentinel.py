"""The sentinel: each way of going wrong is fed to it as figures, and it must name it; a healthy run stays quiet."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from remax.core.rollout import Rollout
from remax.core.sequences import Sequences
from remax.core.sums import add, reduce
from remax.training.alarms import Thresholds, distinct_ngrams, fatal_alarms, rollout_figures, rollout_tallies
from remax.training.sentinel import Sentinel
from utils.run import TrainingStopped

HEALTHY = {
    "loss": 0.1,
    "reward": 1.0,
    "grad_norm": 0.5,
    "kl": 1.0,  # nats per answer of 20 tokens
    "entropy": 1.2,
    "length": 20.0,
    "ended": 0.95,
    "distinct_trigrams": 0.98,
    "reward_length_correlation": 0.1,
    "zero_advantages": 0.05,
}
VOCABULARY = 1000
WINDOW = Thresholds().window


def sequences_of(answers: list[list[int]], prompt_length: int = 2) -> Sequences:
    lengths = torch.tensor([len(answer) for answer in answers])
    ids = torch.full((len(answers), prompt_length + int(lengths.max())), 9)
    for i, answer in enumerate(answers):
        ids[i, prompt_length : prompt_length + len(answer)] = torch.tensor(answer)
    return Sequences(ids, torch.full((len(answers),), prompt_length), lengths)


def judged(figures: dict[str, float], steps: int = WINDOW, start: dict[str, float] | None = None) -> set[str]:
    """Kinds of alarm after a healthy start and `steps` steps with some figures changed."""
    sentinel = Sentinel(VOCABULARY)
    for _ in range(WINDOW):
        assert not sentinel.judge(HEALTHY | (start or {}))
    for _ in range(steps):
        alarms = sentinel.judge(HEALTHY | (start or {}) | figures)
    return {alarm.kind for alarm in alarms}


# -------------------------------------------------------------------------------------------------------------- figures


def test_distinct_trigrams_by_hand():
    # 1 2 3 1 2 3: 123 231 312 123, three of four differ;  4 4 4 4: one of two;  5 6: no trigram
    distinct, total = distinct_ngrams(sequences_of([[1, 2, 3, 1, 2, 3], [4, 4, 4, 4], [5, 6]]))
    assert (int(distinct), int(total)) == (3 + 1, 4 + 2)


def test_distinct_trigrams_against_sets():
    noise = torch.Generator().manual_seed(0)
    answers = [torch.randint(0, 3, (int(n),), generator=noise).tolist() for n in torch.randint(1, 30, (20,))]
    for n in (1, 2, 3):
        grams = [[tuple(answer[i : i + n]) for i in range(len(answer) - n + 1)] for answer in answers]
        distinct, total = distinct_ngrams(sequences_of(answers), n)
        assert int(distinct) == sum(len(set(gram)) for gram in grams)
        assert int(total) == sum(len(gram) for gram in grams)


def test_words_far_up_the_vocabulary_are_told_apart():
    big = 2**20 - 1
    distinct, total = distinct_ngrams(sequences_of([[big, big, big, 0, big], [0, 0, 1, 0, 0]]))
    assert (int(distinct), int(total)) == (6, 6)
    distinct, total = distinct_ngrams(sequences_of([[0, 1, 0, 0, 4, 0]]))  # 0 1 0 is another than 0 0 4
    assert (int(distinct), int(total)) == (4, 4)


def rollout_of(answers, rewards, advantages) -> Rollout:
    return Rollout(sequences_of(answers), torch.tensor(rewards), advantages=torch.tensor(advantages))


ROLLOUT = ([[1], [1, 2], [1, 2, 3], [1, 1, 1, 1]], [1.0, 2.0, 3.0, 2.0], [[0.0], [1.0], [0.0], [-1.0]])


def figures_of(*rollouts: Rollout) -> dict[str, float]:
    """Those of the rollouts of several ranks together."""
    tallies: dict = {}
    for rollout in rollouts:
        tallies = add(tallies, rollout_tallies(rollout))
    return rollout_figures(reduce(tallies))


def test_figures_by_hand():
    # lengths 1 2 3 4, rewards 1 2 3 2: deviations -1.5 -.5 .5 1.5 and -1 0 1 0; r = 2 / sqrt(5 * 2)
    expected = {
        "reward": 2.0,
        "reward_std": math.sqrt(2 / 4),
        "length": 2.5,
        "distinct_trigrams": (1 + 1) / (1 + 2),
        "reward_length_correlation": 2 / math.sqrt(10),
        "zero_advantages": 2 / 4,
    }
    assert figures_of(rollout_of(*ROLLOUT)) == pytest.approx(expected)
    of_ranks = [rollout_of(*(column[rows] for column in ROLLOUT)) for rows in (slice(0, 1), slice(1, 4))]
    assert figures_of(*of_ranks) == pytest.approx(expected)


def test_advantages_of_tokens_count_within_the_answer_only():
    # PPO's advantages: what stands behind an answer's end is no advantage.
    rollout = rollout_of([[1, 2], [3]], [0.0, 1.0], [[0.0, 0.0], [0.0, 7.0]])
    assert figures_of(rollout)["zero_advantages"] == 1.0


@pytest.mark.parametrize("level", [0.1, 1e6 / 3])
def test_equal_lengths_or_rewards_have_no_correlation(level):
    equal_lengths = rollout_of([[1], [2]], [0.0, 1.0], [[1.0], [1.0]])
    equal_rewards = rollout_of([[1], [2, 3], [4]], [level] * 3, [[1.0]] * 3)
    for rollout in (equal_lengths, equal_rewards):
        figures = figures_of(rollout)
        assert figures["reward_length_correlation"] == 0.0 and figures["distinct_trigrams"] == 1.0
    # A spread of a millionth of its level is one: that of the lengths.
    spread = rollout_of([[1], [2, 3], [4]], [1.0, 1.0 + 1e-6, 1.0], [[1.0]] * 3)
    assert figures_of(spread)["reward_length_correlation"] == pytest.approx(1.0, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------ judgement


def test_a_healthy_run_is_quiet():
    assert judged({}, steps=200) == set()


def test_a_run_that_improves_is_quiet():
    sentinel = Sentinel(VOCABULARY)
    for step in range(200):
        share = step / 200
        better = {"reward": 1 + 3 * share, "kl": 1 + 5 * share, "entropy": 1.2 - 0.7 * share, "length": 20 + 12 * share}
        assert not sentinel.judge(HEALTHY | better), step


@pytest.mark.parametrize(
    ("figures", "kind"),
    [
        ({"kl": 0.6 * 20 + 1.0}, "KL"),  # 0.6 nats per token more than at first
        ({"kl": -0.5}, "negative KL"),
        ({"entropy": 0.05}, "entropy collapse"),
        ({"entropy": 0.6 * math.log(VOCABULARY) + 0.4 * 1.2}, "entropy rising"),
        ({"length": 45.0, "kl": 1.0}, "length drift"),
        ({"length": 9.0, "kl": 0.5}, "length drift"),
        ({"ended": 0.7}, "end tokens vanish"),
        ({"distinct_trigrams": 0.6}, "repetition"),
        ({"reward_length_correlation": 0.8}, "length reward"),
        ({"reward_length_correlation": -0.8}, "length reward"),
        ({"zero_advantages": 0.95}, "no signal"),
        ({"skipped": 1.0}, "overflow"),
    ],
)
def test_each_drift_is_named(figures, kind):
    assert judged(figures) == {kind}


@pytest.mark.parametrize(
    "figures",
    [
        {"kl": 0.4 * 20 + 1.0},
        {"entropy": 0.15},
        {"entropy": 0.4 * math.log(VOCABULARY) + 0.6 * 1.2},
        {"length": 38.0},
        {"length": 11.0},
        {"ended": 0.8},
        {"distinct_trigrams": 0.7},
        {"reward_length_correlation": 0.6},
        {"zero_advantages": 0.85},
    ],
)
def test_just_inside_the_limits_is_quiet(figures):
    assert judged(figures) == set()


def test_one_bad_step_is_no_drift():
    assert judged({"entropy": 0.05, "length": 60.0, "ended": 0.5}, steps=1) == set()


def test_an_early_explosion_is_named_before_the_window_is_full():
    sentinel = Sentinel(VOCABULARY)
    kinds = [{alarm.kind for alarm in sentinel.judge(HEALTHY | {"kl": 8.0 * step})} for step in range(5)]
    assert kinds == [set(), set(), set(), {"KL"}, {"KL"}]  # excess 0, .4, .8, 1.2 nats a token: recent .2 .4 .6


def test_few_end_tokens_from_the_start():
    sentinel = Sentinel(VOCABULARY)
    for _ in range(WINDOW):
        alarms = sentinel.judge(HEALTHY | {"ended": 0.2})
    assert [alarm.kind for alarm in alarms] == ["few end tokens"]


def test_an_untrained_policy_is_near_noise_from_the_start():
    # Nothing can be said about rising entropy where there is no room for it.
    assert judged({"entropy": 0.999 * math.log(VOCABULARY)}, start={"entropy": 0.99 * math.log(VOCABULARY)}) == set()


def test_the_first_steps_kl_is_the_zero():
    # top_p leaves a KL of its own between the policy and the untruncated reference: here 1 nat per token.
    assert judged({}, start={"kl": 20.0}) == set()
    assert judged({"kl": 20.0 + 0.6 * 20}, start={"kl": 20.0}) == {"KL"}


# ---------------------------------------------------------------------------------------------------------------- fatal


@pytest.mark.parametrize("figures", [{"loss": math.nan}, {"reward": math.inf}, {"loss": -math.inf}])
def test_an_applied_update_that_is_not_finite_is_fatal_at_once(figures):
    assert judged(figures, steps=1) == {"not finite"}


def test_where_there_is_a_critic_its_rate_is_named_too():
    both = "--actor_learning_rate and --critic_learning_rate;"
    for figures, rates in (({}, "--actor_learning_rate;"), ({"value_loss": 1.0}, both)):
        (alarm,) = fatal_alarms({"loss": math.nan} | figures, 0, 1, 0.0, Thresholds())
        assert f"with a tenth of {rates}" in alarm.remedy


def test_an_overflow_that_was_skipped_is_not():
    assert judged({"loss": math.inf, "grad_norm": math.inf, "skipped": 1.0}, steps=1) == set()


def test_a_loss_that_stays_broken_is_fatal_although_its_updates_are_skipped():
    assert judged({"loss": math.nan, "skipped": 1.0}, steps=2) == set()
    assert judged({"loss": math.nan, "skipped": 1.0}, steps=3) == {"not finite"}


def test_overflow_without_end_is_fatal():
    limit = Thresholds().overflow_limit
    assert judged({"skipped": 1.0}, steps=limit - 1) == {"overflow"}
    assert judged({"skipped": 1.0}, steps=limit) == {"stuck in overflow"}


def test_only_overflows_in_a_row_count():
    # fp16 overflows now and then for a whole run; and a run that is resumed goes on counting what it counted.
    sentinel, limits = Sentinel(VOCABULARY), Thresholds()
    for _ in range(limits.overflow_limit):
        alarms = [sentinel.judge(HEALTHY | {"skipped": 1.0}) for _ in range(limits.overflow_warning - 1)]
        assert not any(alarms) and not sentinel.judge(HEALTHY)
    for _ in range(limits.overflow_warning - 1):
        sentinel.judge(HEALTHY | {"skipped": 1.0})
    assert not sentinel.nonfinite
    resumed = Sentinel(VOCABULARY)
    resumed.load_state_dict(json.loads(json.dumps(sentinel.state_dict())))
    (alarm,) = resumed.judge(HEALTHY | {"skipped": 1.0})
    assert alarm.kind == "overflow"


def test_gradients_that_are_not_finite_are_fatal_in_a_row():
    assert judged({"grad_norm": math.inf}, steps=2) == set()
    assert judged({"grad_norm": math.inf}, steps=3) == {"not finite"}


def test_an_engine_that_never_tells_its_gradient_is_believed():
    sentinel = Sentinel(VOCABULARY)
    for _ in range(20):
        assert not sentinel.judge(HEALTHY | {"grad_norm": math.nan})


def test_kl_beyond_the_limit_is_fatal_in_one_step():
    assert "KL beyond the limit" in judged({"kl": 5.1 * 20 + 1.0}, steps=1)
    assert "KL beyond the limit" not in judged({"kl": 4.9 * 20 + 1.0}, steps=1)
    sentinel = Sentinel(VOCABULARY, replace(Thresholds(), kl_limit=0.0))
    sentinel.judge(HEALTHY)
    assert not sentinel.judge(HEALTHY | {"kl": 1000.0})  # one step; the warning about the recent mean remains


# --------------------------------------------------------------------------------------------------------- as a watcher


def watch(sentinel: Sentinel, steps: range, **figures: float) -> list[dict[str, float]]:
    rollout = rollout_of([[1, 2, 3, 4], [5, 6, 7, 8]], [1.0, 0.0], [[1.0], [-1.0]])
    return [sentinel(step, rollout, HEALTHY | {"length": 4.0, "reward": 0.5, "kl": 0.2} | figures) for step in steps]


def test_a_warning_names_step_figure_cause_and_remedy_and_is_not_repeated_at_once():
    told: list[str] = []
    kept: list[tuple[str, str, int]] = []
    sentinel = Sentinel(VOCABULARY, replace(Thresholds(), repeat_after=30), told.append, lambda *row: kept.append(row))
    assert watch(sentinel, range(1, 11))[-1]["alarms"] == 0.0
    assert watch(sentinel, range(11, 60), entropy=0.01)[-1]["alarms"] == 1.0
    assert len(told) == 2  # at step 20, when the recent mean falls below the limit, and 30 steps later
    first, second = (int(message.split("step ")[1].split(":")[0]) for message in told)
    assert second - first == 30
    assert kept == [
        ("entropy collapse", text.removeprefix("warning, "), step)
        for text, step in zip(told, (first, second), strict=True)
    ]
    assert told[0].startswith(f"warning, step {first}: entropy") and "Likely cause:" in told[0]
    assert "Remedy: " in told[0] and "--" in told[0]


def test_fatal_stops_after_the_step_was_logged():
    sentinel = Sentinel(VOCABULARY, warn=lambda message: None)
    watch(sentinel, range(1, 3))
    sentinel.stop_if_fatal()
    figures = watch(sentinel, range(3, 4), loss=math.nan)  # still returns what is to be logged
    assert figures[0]["alarms"] == 1.0
    with pytest.raises(TrainingStopped, match="step 3: loss nan"):
        sentinel.stop_if_fatal()


def test_every_message_gives_a_remedy_with_flags_that_exist():
    from remax.cli.flags import Step3Arguments

    cases = [{"kl": 99.0}, {"kl": -9.0}, {"entropy": 0.01}, {"entropy": 6.0}, {"length": 90.0}, {"ended": 0.1}]
    cases += [{"distinct_trigrams": 0.1}, {"reward_length_correlation": 0.9}, {"zero_advantages": 1.0}]
    cases += [{"skipped": 1.0}, {"loss": math.nan}, {"kl": 999.0}, {"grad_norm": math.nan}]
    known = set(Step3Arguments.__dataclass_fields__)
    for figures in cases:
        sentinel = Sentinel(VOCABULARY)
        for step in range(3 * WINDOW):
            alarms = sentinel.judge(HEALTHY | (figures if step >= WINDOW else {}))
        assert alarms, figures
        for alarm in alarms:
            flags = set(re.findall(r"--(\w+)", f"{alarm.cause} {alarm.remedy}"))
            assert alarm.remedy and flags <= known, flags - known


def test_a_resumed_sentinel_judges_as_the_one_that_stopped():
    whole, told_whole = Sentinel(VOCABULARY), []
    whole.warn = told_whole.append
    first, second, told = Sentinel(VOCABULARY), Sentinel(VOCABULARY), []
    first.warn = second.warn = told.append
    watch(whole, range(1, 16), entropy=1.0)
    watch(first, range(1, 16), entropy=1.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    watch(whole, range(16, 40), entropy=0.01, kl=3.0)
    watch(second, range(16, 40), entropy=0.01, kl=3.0)
    assert told == told_whole and len(told) == 2
