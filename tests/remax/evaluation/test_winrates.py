"""Win rates, worked out by hand and compared with alpaca_eval's own functions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from remax.evaluation import winrates
from remax.evaluation.judges import read_annotations
from remax.evaluation.winrates import Comparison, Difficulty, by_length, length_controlled, ratings, summarise, wilson
from remax.stages.winrate import read_difficulty
from utils.run import UserError

NO_SKLEARN = "scikit-learn is not installed: pip install -c constraints.txt scikit-learn"


@pytest.fixture
def sklearn(monkeypatch):
    monkeypatch.setattr(winrates, "REFITS", 20)  # a tenth of what intervals are made of
    return pytest.importorskip("sklearn", reason=NO_SKLEARN)


def comparison(i: int, p: float | None, lengths: tuple[int, int] = (5, 5), models=("base", "mine")) -> Comparison:
    verdict = None if p is None else (p > 0.5) + 0.5 * (p == 0.5)
    return Comparison(f"prompt {i}", "x" * lengths[0], "y" * lengths[1], models, p, verdict, i)


def test_intervals():
    # Wilson, 8 of 10: (0.8 + z2 / 2 -+ sqrt(0.8 * 0.2 * z2 + z2^2 / 4)) / (1 + z2) with z2 = 1.96^2 / 10 = 0.38416
    rate = wilson(0.8, 10)
    assert (rate.value, rate.low, rate.high) == pytest.approx((80.0, 49.0162, 94.3318), abs=1e-3)
    # The mean of 400 draws of 0 or 1 has a standard deviation of 0.5 / sqrt(400) = 2.5 %.
    half = [comparison(i, float(i % 2)) for i in range(400)]
    rate = winrates.bootstrap(half, np.arange(400) % 2.0)
    assert rate.value == 50.0
    assert (rate.low, rate.high) == pytest.approx((50 - 1.96 * 2.5, 50 + 1.96 * 2.5), abs=0.6)
    # Ten verdicts on each of 40 prompts, all alike, tell no more than 40 verdicts.
    alike = [comparison(i % 40, float(i % 2)) for i in range(400)]
    rate = winrates.bootstrap(alike, np.arange(400) % 2.0)
    assert (rate.low, rate.high) == pytest.approx((50 - 1.96 * 7.9, 50 + 1.96 * 7.9), abs=2.0)


def test_a_summary_by_hand(sklearn):
    # (p, lengths of baseline and model)
    rows = [(0.9, (5, 9)), (0.6, (9, 5)), (0.5, (5, 5)), (0.2, (4, 9)), (0.8, (3, 4)), (None, (1, 1)), (0.7, (5, 9))]
    summary = summarise([comparison(i, *row) for i, row in enumerate(rows)])
    assert (summary.models, summary.comparisons, summary.without_verdict, summary.ties) == (("base", "mine"), 7, 1, 1)
    assert summary.raw.value == pytest.approx(100 * (0.9 + 0.6 + 0.5 + 0.2 + 0.8 + 0.7) / 6)
    assert summary.discrete.value == pytest.approx(100 * 4.5 / 6)
    assert summary.longer_wins == pytest.approx(100 * 4.5 / 6)  # longer in four, shorter in one, equal in one
    assert summary.for_longer == pytest.approx(100 * 3 / 5)  # of the five decided ones: not the second and fourth
    assert summary.characters == pytest.approx((42 / 7, 32 / 7))
    with pytest.raises(UserError, match="--judge: has no verdict on any of 2 comparisons"):
        summarise([comparison(i, None) for i in range(2)])
    with pytest.raises(UserError, match="4 comparisons are too few for a length-controlled rate; expected 5 or more"):
        summarise([comparison(i, 0.5, (i, 2)) for i in range(4)])


def judged_by_length(n: int, skill: float, drawn: bool = False) -> list[Comparison]:
    """A judge that likes length: logit p = skill + 2 tanh(what the model's answer is longer by, in deviations).

    Its verdicts are p itself, or `drawn` from it.
    """
    draw = np.random.default_rng(0)
    lengths = np.stack([draw.integers(50, 150, n), draw.integers(80, 300, n)], 1)
    difference = lengths[:, 1] - lengths[:, 0]
    p = winrates.sigmoid(skill + 2 * np.tanh(difference / difference.std(ddof=1)))
    p = (draw.random(n) < p).astype(float) if drawn else p
    return [comparison(i, float(p[i]), (int(lengths[i, 0]), int(lengths[i, 1]))) for i in range(n)]


@pytest.mark.parametrize("skill", [0.0, -0.8])
def test_the_control_takes_the_judges_liking_for_length_out(sklearn, skill):
    comparisons = judged_by_length(400, skill)
    summary = summarise(comparisons)
    fair = 100 * float(winrates.sigmoid(np.array(skill)))
    assert summary.controlled.value == pytest.approx(fair, abs=1.0)
    assert summary.raw.value > summary.controlled.value + 10 and summary.extreme
    assert summary.coefficients["length"] == pytest.approx(-2, abs=0.1)  # of the baseline's being longer
    parts = by_length(comparisons)
    assert [part[2] for part in parts] == [100] * 4 and [part[3] for part in parts] == sorted(part[3] for part in parts)
    assert all(before[1] <= after[0] for before, after in zip(parts, parts[1:], strict=False))


def test_the_interval_of_the_controlled_rate_holds_the_truth(sklearn, monkeypatch):
    monkeypatch.setattr(winrates, "REFITS", 200)
    rate, _ = length_controlled(judged_by_length(400, 0.0, drawn=True))
    assert rate.low < 50 < rate.high
    assert (
        8 < rate.high - rate.low < 20
    )  # of 400 verdicts alone: 2 * 1.96 * 2.5 = 9.8, and the lengths' share is fitted


def test_answers_of_one_length_leave_the_rate_alone(sklearn):
    summary = summarise([comparison(i, p) for i, p in enumerate([0.9, 0.6, 0.7, 0.5, 0.8] * 20)])
    assert summary.controlled.value == pytest.approx(70.0, abs=0.5) and not summary.extreme


def test_ratings(sklearn):
    # b beats a in three of four, c beats b in three of four: 400 log10(3) = 190.8 points each.
    pairs = [("a", "b"), ("b", "c")]
    found = ratings([comparison(i, float(i % 4 > 0), models=pairs[i // 400]) for i in range(800)])
    assert list(found) == ["c", "b", "a"]
    assert [elo for elo, _, _ in found.values()] == pytest.approx([1190.8, 1000.0, 809.2], abs=1.0)
    assert all(low < elo < high for elo, low, high in found.values())


def made_up(n: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Annotations of a judge that likes length, on prompts of unequal difficulty, and rows like df_gamed.csv's."""
    draw = np.random.default_rng(seed)
    difficulty = draw.normal(size=n)
    annotations = []
    for i in range(n):
        lengths = draw.lognormal(5, 0.6, 2).astype(int)
        z = 1.5 * np.tanh((lengths[1] - lengths[0]) / 150) + difficulty[i] + draw.normal()
        p = float(winrates.sigmoid(np.array(z)))
        preference = None if i % 50 == 7 else 1.5 if i % 50 == 9 else 1 + (p if i % 2 else float(p > 0.5))
        row = {"index": i, "instruction": f"q{i}", "output_1": "x" * lengths[0], "output_2": "y" * lengths[1]}
        annotations.append(
            row | {"generator_1": "base", "generator_2": "mine", "annotator": "judge", "preference": preference}
        )
    gamed = []
    for model, shift in (("concise", 1.2), ("verbose", -1.2)):
        for i in range(n):
            d = float(shift + draw.normal() / 2)
            preference = float(np.clip(0.5 - 0.25 * np.tanh(d) + draw.normal() / 5, 0, 1))
            row = {"model": model, "index": i, "preference": preference, "std_delta_len": d}
            gamed.append(row | {"instruction_difficulty": difficulty[i], "not_gamed_baseline": False})
    return annotations, gamed


@pytest.mark.parametrize(("seed", "whole"), [(0, False), (1, True)])
def test_alpaca_eval_tells_the_same(tmp_path, monkeypatch, sklearn, seed, whole):
    # pip install -c constraints.txt alpaca_eval
    theirs = pytest.importorskip("alpaca_eval.metrics.glm_winrate", reason="alpaca_eval is not installed")
    import pandas

    annotations, gamed = made_up(300, seed)
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    pandas.DataFrame(gamed).to_csv(tmp_path / "df_gamed.csv", index=False)
    monkeypatch.setattr(theirs, "hf_hub_download", lambda **_: str(tmp_path / "df_gamed.csv"))
    name = "length_controlled_v1" if whole else "length_controlled_minimal"
    table = pandas.DataFrame(annotations)
    expected = theirs.get_length_controlled_winrate(table, glm_name=name, save_weights_dir=None)
    difficulty = read_difficulty(str(tmp_path / "df_gamed.csv")) if whole else None
    summary = summarise(read_annotations(str(tmp_path / "annotations.json"), "--judge"), difficulty)
    assert summary.raw.value == pytest.approx(expected["win_rate"], abs=1e-9)
    assert summary.discrete.value == pytest.approx(expected["discrete_win_rate"], abs=1e-9)
    assert summary.controlled.value == pytest.approx(expected["length_controlled_winrate"], abs=0.05)
    assert abs(summary.raw.value - summary.controlled.value) > 0.5  # the test would see that nothing is controlled


def test_difficulty(tmp_path, sklearn):
    annotations, gamed = made_up(100, 2)
    import pandas

    pandas.DataFrame(gamed).to_csv(tmp_path / "df_gamed.csv", index=False)
    difficulty = read_difficulty(str(tmp_path / "df_gamed.csv"))
    assert difficulty.gamed.shape == (200, 3) and set(difficulty.of_prompt) == set(range(100))
    assert difficulty.of_prompt[3] == pytest.approx(gamed[3]["instruction_difficulty"])
    assert difficulty.gamed[3] == pytest.approx([np.tanh(gamed[3]["std_delta_len"]), difficulty.of_prompt[3], 0])
    with pytest.raises(UserError, match="--difficulty: knows no prompt of index 100; it is for the 100 prompts of Al"):
        length_controlled([comparison(100, 0.5)] * 6, difficulty)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="--difficulty .*other.csv: .*; expected df_gamed.csv of AlpacaEval, with the"):
        read_difficulty(str(tmp_path / "other.csv"))
    assert isinstance(difficulty, Difficulty)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"generator_1": None}, "row 1 has no text in generator_1; expected annotations of alpaca_eval"),
        ({"preference": 3}, "row 1 has the preference 3; expected 1 to 2, or null"),
        ({"preference": "m"}, "row 1 has the preference 'm'"),
    ],
)
def test_what_are_no_annotations_is_refused(tmp_path, row, message):
    (tmp_path / "a.json").write_text(json.dumps([made_up(1, 0)[0][0] | row]))
    with pytest.raises(UserError, match=f"--judge .*a.json: {message}"):
        read_annotations(str(tmp_path / "a.json"), "--judge")


def test_preferences_of_annotations(tmp_path):
    rows = [made_up(1, 0)[0][0] | {"preference": value} for value in (0, 1, 1.5, 1.25, 2, None)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = read_annotations(str(tmp_path / "a.json"), "--judge")
    assert [one.p for one in found] == [0.5, 0.0, 0.5, 0.25, 1.0, None]
    assert [one.verdict for one in found] == [0.5, 0.0, 0.5, 0.0, 1.0, None]
    other = found[3].reversed()
    assert (other.first, other.models, other.p, other.verdict) == (found[3].second, ("mine", "base"), 0.75, 1.0)
