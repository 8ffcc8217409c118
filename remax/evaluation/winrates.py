"""How often one model's answers are preferred to another's: rates with their errors, lengths apart, and ratings.

A comparison is a prompt, two answers, and p, the probability that the second answer is the better one. As in AlpacaEval
the second answer is the model's whose rate is told, the first the baseline's.

The length-controlled rate is that of AlpacaEval 2 (arXiv 2404.04475). A logistic regression explains p by the lengths
and by constants,

    logit p = a tanh(d) + b difficulty(x) + c,    d = (length of first - length of second) / their standard deviation,

and the rate is its mean prediction at d = 0. Where the prompts' difficulty is not known, the term is left out.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.run import UserError

RESAMPLES = 2000
REFITS = 200  # resamples for which a regression is fitted again
SEED = 0
Z = 1.96  # standard deviations to either side of a normal distribution's mean, between which 95 % of it lie
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt.

    Attributes:
        first: The baseline's answer; `second`: the model's.
        models: The baseline's name, and the model's.
        p: That the second answer is better; None: the judge gave no verdict.
        verdict: The judge's decision: 1 for the second answer, 0 for the first, 0.5 for a tie.
        index: The prompt's number in its benchmark.
    """

    prompt: str
    first: str
    second: str
    models: tuple[str, str]
    p: float | None
    verdict: float | None
    index: int

    def reversed(self) -> Comparison:
        """The same with the answers' places exchanged."""
        p, verdict = (None if value is None else 1 - value for value in (self.p, self.verdict))
        return Comparison(self.prompt, self.second, self.first, self.models[::-1], p, verdict, self.index)


@dataclass(frozen=True)
class Rate:
    """A rate in percent, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:5.1f} %   [{self.low:.1f}, {self.high:.1f}]"


def _of(comparisons: Sequence[Comparison], name: str) -> Array:
    return np.array([getattr(one, name) for one in comparisons], dtype=float)


def _lengths(comparisons: Sequence[Comparison]) -> tuple[Array, Array]:
    """(n,) characters of the first answers, and of the second ones."""
    return np.array([len(one.first) for one in comparisons]), np.array([len(one.second) for one in comparisons])


def resampled(comparisons: Sequence[Comparison], times: int) -> list[Array]:
    """Numbers of comparisons, drawn with replacement `times` times, whole prompts at a time."""
    of_prompt: dict[str, list[int]] = {}
    for i, one in enumerate(comparisons):
        of_prompt.setdefault(one.prompt, []).append(i)
    members = [np.array(found) for found in of_prompt.values()]
    draw = np.random.default_rng(SEED)
    drawn = (draw.integers(len(members), size=len(members)) for _ in range(times))
    return [np.concatenate([members[k] for k in prompts]) for prompts in drawn]


def bootstrap(comparisons: Sequence[Comparison], values: Array) -> Rate:
    """The mean of (n,) values in percent; the interval is that of means over prompts drawn with replacement."""
    means = [values[rows].mean() for rows in resampled(comparisons, RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Rate(100 * float(values.mean()), 100 * float(low), 100 * float(high))


def wilson(share: float, n: int) -> Rate:
    """A share of n prompts in percent, with Wilson's interval."""
    z2 = Z**2 / n
    centre = (share + z2 / 2) / (1 + z2)
    half = (share * (1 - share) * z2 + z2**2 / 4) ** 0.5 / (1 + z2)
    return Rate(100 * share, 100 * (centre - half), 100 * (centre + half))


@dataclass(frozen=True)
class Difficulty:
    """What AlpacaEval 2 knows of its prompts (df_gamed.csv): fitted once over its leaderboard.

    Attributes:
        of_prompt: By the prompt's index.
        gamed: Rows of the baseline against concise and verbose answers of its own: what its length alone does.
        p: (len(gamed),) how they were judged.
    """

    of_prompt: Mapping[int, float]
    gamed: Array  # (m, 3): tanh(d), difficulty, 0
    p: Array


GAMED_WEIGHT = 0.2 / 2  # there are two such baselines
COSTS = np.logspace(-4, 4, 10)  # inverse weights of the L1 penalty, of which cross-validation takes the best
FOLDS = 5


def length_controlled(
    comparisons: Sequence[Comparison], difficulty: Difficulty | None = None
) -> tuple[Rate, Mapping[str, float]]:
    """The length-controlled rate in percent, with an interval from fits to prompts drawn anew; and the coefficients.

    Raises:
        UserError: The difficulty of a prompt is not known.
    """
    first, second = _lengths(comparisons)
    columns = [relative_lengths((first - second).astype(float)), np.ones(len(comparisons))]
    names = ["length", "model"]
    if difficulty is not None:
        missing = [one.index for one in comparisons if one.index not in difficulty.of_prompt]
        if missing:
            raise UserError(
                f"--difficulty: knows no prompt of index {missing[0]}; it is for the {len(difficulty.of_prompt)} "
                "prompts of AlpacaEval, in annotations that have their index"
            )
        columns.insert(1, np.array([difficulty.of_prompt[one.index] for one in comparisons]))
        names.insert(1, "difficulty")
    features = np.stack(columns, axis=1)  # (n, 2 or 3)
    even = features * ([0.0] + [1.0] * (len(names) - 1))  # as if all answers were of one length
    p, judged = _of(comparisons, "p"), np.array([one.p is not None for one in comparisons])

    def training(rows: Array) -> tuple[Array, Array, Array]:
        rows = rows[judged[rows]]
        if difficulty is None:
            return features[rows], p[rows], np.ones(len(rows))
        weight = np.r_[np.full(len(difficulty.p), GAMED_WEIGHT), np.ones(len(rows))]
        return np.r_[difficulty.gamed, features[rows]], np.r_[difficulty.p, p[rows]], weight

    whole = training(np.arange(len(comparisons)))
    cost = best_cost(*whole)
    coefficients = fit(*whole, cost)
    value = sigmoid(even @ coefficients).mean()
    again = [sigmoid(even[rows] @ fit(*training(rows), cost)).mean() for rows in resampled(comparisons, REFITS)]
    low, high = np.percentile(again, [2.5, 97.5])
    return Rate(100 * float(value), 100 * float(low), 100 * float(high)), dict(
        zip(names, coefficients.tolist(), strict=True)
    )


def relative_lengths(difference: Array) -> Array:
    """tanh(d) of (n,) differences of length."""
    spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
    return np.asarray(np.tanh(difference / spread)) if spread else difference


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))


def fit(features: Array, p: Array, weight: Array, cost: float) -> Array:
    """Coefficients of an L1-penalised logistic regression without intercept on targets between 0 and 1."""
    from sklearn.linear_model import LogisticRegression

    # Each row counts as a success with weight p and as a failure with weight 1 - p. scikit-learn 1.8 renamed the flag.
    l1 = {"l1_ratio": 1.0} if "l1_ratio" in _news(LogisticRegression) else {"penalty": "l1"}
    model = LogisticRegression(C=cost, solver="liblinear", fit_intercept=False, random_state=123, **l1)
    labels = np.r_[np.ones(len(p)), np.zeros(len(p))]
    model.fit(np.r_[features, features], labels, sample_weight=np.r_[p * weight, (1 - p) * weight])
    return np.asarray(model.coef_[0])


def _news(estimator: Any) -> set[str]:
    """Arguments of scikit-learn's estimator where `penalty` is deprecated, none where it is not."""
    parameters = inspect.signature(estimator).parameters
    return set(parameters) if parameters["penalty"].default == "deprecated" else set()


def best_cost(features: Array, p: Array, weight: Array) -> float:
    """The inverse penalty whose fits predict held-out rows best, by log loss in five folds."""
    from sklearn.model_selection import GroupKFold

    n = len(p)
    if n < FOLDS:
        raise UserError(f"{n} comparisons are too few for a length-controlled rate; expected {FOLDS} or more")
    both, scores = np.r_[np.arange(n), np.arange(n)], np.zeros(len(COSTS))
    for kept, held_out in GroupKFold(FOLDS).split(both, groups=both):
        rows, out = both[kept[kept < n]], both[held_out[held_out < n]]
        for k, cost in enumerate(COSTS):
            predicted = sigmoid(features[out] @ fit(features[rows], p[rows], weight[rows], cost)).clip(1e-15, 1 - 1e-15)
            likelihood = p[out] * np.log(predicted) + (1 - p[out]) * np.log(1 - predicted)
            scores[k] += (likelihood * weight[out]).mean()
    return float(COSTS[scores.argmax()])


@dataclass(frozen=True)
class Summary:
    """What is told of one model against another.

    Attributes:
        raw: The mean of p. `discrete`: of verdicts, a tie counting half, with Wilson's interval.
        controlled: See `length_controlled`.
        longer_wins: What the raw rate would be if the longer answer always won.
        for_longer: Share of the verdicts that are for the longer answer, of those that are no tie.
        characters: Mean lengths of the model's answers, and of the baseline's.
    """

    models: tuple[str, str]
    comparisons: int
    without_verdict: int
    ties: int
    raw: Rate
    discrete: Rate
    controlled: Rate
    longer_wins: float
    for_longer: float | None
    characters: tuple[float, float]
    coefficients: Mapping[str, float]

    @property
    def extreme(self) -> bool:
        """Whether the control moves the rate so far that AlpacaEval would doubt the regression."""
        raw, controlled = self.raw.value, self.controlled.value
        return controlled < min(0.75 * raw, raw - 10) or controlled > max(raw + (100 - raw) / 4, raw + 10)


def summarise(comparisons: Sequence[Comparison], difficulty: Difficulty | None = None) -> Summary:
    """Of comparisons of the same two models.

    Raises:
        UserError: Too few verdicts.
    """
    judged = [one for one in comparisons if one.p is not None]
    if not judged:
        raise UserError(f"--judge: has no verdict on any of {len(comparisons)} comparisons")
    controlled, coefficients = length_controlled(comparisons, difficulty)
    verdicts, sign = _of(judged, "verdict"), np.sign(np.subtract(*_lengths(judged)[::-1]))
    decided = (verdicts != 0.5) & (sign != 0)
    prompts = Counter(one.prompt for one in judged)
    first, second = _lengths(comparisons)
    return Summary(
        models=comparisons[0].models,
        comparisons=len(comparisons),
        without_verdict=len(comparisons) - len(judged),
        ties=int((verdicts == 0.5).sum()),
        raw=bootstrap(judged, _of(judged, "p")),
        discrete=wilson(float(verdicts.mean()), len(prompts)),
        controlled=controlled,
        longer_wins=100 * float((0.5 + sign / 2).mean()),
        for_longer=100 * float((sign[decided] == 2 * verdicts[decided] - 1).mean()) if decided.any() else None,
        characters=(float(second.mean()), float(first.mean())),
        coefficients=coefficients,
    )


def by_length(comparisons: Sequence[Comparison], parts: int = 4) -> list[tuple[int, int, int, float]]:
    """The raw rate by how much longer the model's answers are.

    Returns:
        For each part of the comparisons (from, to, how many they are, rate in percent), the lengths in characters.
    """
    judged = [one for one in comparisons if one.p is not None]
    first, second = _lengths(judged)
    difference, p = second - first, _of(judged, "p")
    order = np.argsort(difference, kind="stable")
    found = [rows for rows in np.array_split(order, parts) if len(rows)]
    return [
        (int(difference[rows].min()), int(difference[rows].max()), len(rows), 100 * float(p[rows].mean()))
        for rows in found
    ]


ELO = 400 / np.log(10)  # points for each unit of log odds
SOFT = 1e3  # inverse weight of the L2 penalty: a model that always wins would be rated infinitely


def ratings(comparisons: Sequence[Comparison]) -> dict[str, tuple[float, float, float]]:
    """Bradley-Terry strengths as Elo points with mean 1000, and their 95 % intervals; the best first."""
    names = sorted({name for one in comparisons for name in one.models})
    judged = [one for one in comparisons if one.p is not None]
    design = np.zeros((len(judged), len(names)))
    for row, one in zip(design, judged, strict=True):
        row[names.index(one.models[1])] += 1
        row[names.index(one.models[0])] -= 1
    p = _of(judged, "p")

    def strengths(rows: Array) -> Array:
        from sklearn.linear_model import LogisticRegression

        both = np.r_[design[rows], design[rows]]
        model = LogisticRegression(C=SOFT, fit_intercept=False, max_iter=1000)
        labels = np.r_[np.ones(len(rows)), np.zeros(len(rows))]
        found = model.fit(both, labels, sample_weight=np.r_[p[rows], 1 - p[rows]]).coef_[0]
        return 1000 + ELO * (found - found.mean())

    value = strengths(np.arange(len(judged)))
    low, high = np.percentile([strengths(rows) for rows in resampled(judged, REFITS)], [2.5, 97.5], axis=0)
    found = {name: (float(value[k]), float(low[k]), float(high[k])) for k, name in enumerate(names)}
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))
