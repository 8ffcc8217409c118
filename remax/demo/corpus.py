"""The built-in corpus: small dialogues whose true reward is a known function of the text, so that learning is proven.

    python -m remax.demo.prepare --output_dir output/demo --seed 0

writes, without any download and the same on every machine,

    data/train.jsonl, data/test.jsonl   rows {prompt, chosen, rejected}, in the form of Dahoas/rm-static
    tokenizer/                          a byte-level BPE trained on the training rows
    models/actor, models/reward         small Llamas with random weights

A prompt asks for two to four things of a kind ("Could you list three birds for a quiz?"). `true_reward` reads the
answer: up to 2 points for completeness, half a point for each of the first two courtesies, half a point off for every
fault. The answers in the corpus come from a careless, an ordinary and a careful writer, and which of two answers is the
preferred one is drawn by Bradley-Terry on the true reward. What this leaves to the three stages:

- Supervised fine-tuning imitates the mixture of the writers: well-formed answers of middling quality.
- Reinforcement learning can reach the careful writer's best answer, which the corpus shows only now and then.
- No writer is courteous more than twice or names more things than asked, and up to there more is better. A reward model
  trained on the corpus therefore tends to like still more of both, while the true reward falls: a policy that is not
  held near the reference by the KL term learns to gush and to ramble.

The corpus draws from `random.Random(seed)` alone, so that it does not depend on the Python version. Corpus and reward
need only the standard library; the functions that build the tokenizer and the models import their libraries themselves.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

THINGS = {  # in alphabetical order, which is also the order in which every writer names them
    "animals": ("cow", "dog", "goat", "horse", "pig", "sheep"),
    "birds": ("crow", "duck", "eagle", "owl", "robin", "swan"),
    "clothes": ("belt", "coat", "hat", "scarf", "shirt", "sock"),
    "colours": ("black", "blue", "green", "red", "white", "yellow"),
    "drinks": ("cocoa", "coffee", "juice", "milk", "tea", "water"),
    "fruits": ("apple", "cherry", "fig", "lemon", "pear", "plum"),
    "instruments": ("drum", "flute", "guitar", "harp", "piano", "violin"),
    "tools": ("drill", "hammer", "ladder", "rake", "saw", "spade"),
}
NUMBERS = {"two": 2, "three": 3, "four": 4}
OCCASIONS = ("drawing", "game", "lesson", "party", "picnic", "poster", "quiz", "story")

REQUESTS = (
    "Please name {number} {kind} for a {occasion}.",
    "Could you list {number} {kind} for a {occasion}?",
    "I need {number} {kind} for a {occasion}.",
    "Which {number} {kind} would suit a {occasion}?",
    "Can you think of {number} {kind} for a {occasion}?",
    "Give me {number} {kind} for a {occasion}, please.",
    "Suggest {number} {kind} for a {occasion}.",
    "What are {number} good {kind} for a {occasion}?",
)

PROMPT = "\n\nHuman: {request}\n\nAssistant:"
LEADS = ("Here are {number} {kind}:", "My picks:", "You could take", "I suggest")
WARM_OPENINGS = ("Sure!", "Of course!", "Happy to help!")
WARM_CLOSINGS = ("I hope this helps!", "Ask me any time!", "Enjoy the {occasion}!")  # the occasion is the prompt's own
COLD_OPENINGS = ("Hm.", "Not again.")
COLD_CLOSINGS = ("That is all.", "Look it up yourself.")


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: `number` things of a `kind` for an `occasion`, in one of the phrasings of `REQUESTS`."""

    number: str
    kind: str
    occasion: str
    phrasing: int = 0

    @property
    def prompt(self) -> str:
        return PROMPT.format(request=self.fill(REQUESTS[self.phrasing]))

    def fill(self, template: str) -> str:
        """A template of the grammar with this request's words."""
        return template.format(number=self.number, kind=self.kind, occasion=self.occasion)


def parse_prompt(prompt: str) -> Request:
    """The request behind a prompt of the corpus; ValueError for any other text."""
    if prompt not in _REQUEST_OF_PROMPT:
        raise ValueError(f"not a prompt of the built-in corpus: {prompt!r}")
    return _REQUEST_OF_PROMPT[prompt]


def _all_requests() -> list[Request]:
    return [Request(*words) for words in itertools.product(NUMBERS, THINGS, OCCASIONS, range(len(REQUESTS)))]


def _words(text: str) -> list[str]:
    """Lower-case words; a run of characters that no answer of the grammar contains counts as one (unknown) word."""
    return re.findall(r"[a-z]+|[^a-z ,.:!]+", text.lower())


@functools.cache
def _fenced(text: str) -> str:
    """Words between bars, so that a phrase is found at word boundaries only and neighbours do not share a boundary."""
    return "".join(f"|{word}|" for word in _words(text))


_REQUEST_OF_PROMPT = {request.prompt: request for request in _all_requests()}

_KIND_OF_THING = {thing: kind for kind, things in THINGS.items() for thing in things}

_KNOWN_WORDS = {"and", *_KIND_OF_THING, *NUMBERS, *THINGS, *OCCASIONS}
for _template in LEADS + WARM_OPENINGS + WARM_CLOSINGS + COLD_OPENINGS + COLD_CLOSINGS:
    _KNOWN_WORDS |= set(_words(re.sub(r"{\w+}", "", _template)))

BEST_REWARD = 3.0
WORST_REWARD = -3.0
LONGEST_ANSWER = 30  # words


@dataclass(frozen=True)
class Judgement:
    """What the true reward sees in an answer."""

    asked: int  # things asked for
    right: int  # distinct things of the kind asked for, at most `asked`
    courtesies: int
    faults: int

    @property
    def reward(self) -> float:
        points = 2.0 * self.right / self.asked + 0.5 * min(self.courtesies, 2) - 0.5 * self.faults
        return max(WORST_REWARD, points)


def judge(prompt: str, answer: str) -> Judgement:
    """Counts right things, courtesies and faults of an answer (decoded text without special tokens).

    A courtesy is one of `WARM_OPENINGS` or `WARM_CLOSINGS`, wherever it stands. Each of these is a fault: a thing not
    asked for (of another kind, named before, or beyond the number asked), a cold remark, a courtesy beyond the second,
    a word the corpus does not know, a word beyond `LONGEST_ANSWER`, an end without full stop or exclamation mark.
    """
    request = parse_prompt(prompt)
    asked = NUMBERS[request.number]
    words = _words(answer)
    text = _fenced(answer)

    def count(templates: Sequence[str]) -> int:
        return sum(text.count(_fenced(request.fill(template))) for template in templates)

    things = [word for word in words if word in _KIND_OF_THING]
    right = min(len({thing for thing in things if _KIND_OF_THING[thing] == request.kind}), asked)
    courtesies = count(WARM_OPENINGS + WARM_CLOSINGS)
    faults = (
        len(things)
        - right
        + count(COLD_OPENINGS + COLD_CLOSINGS)
        + max(0, courtesies - 2)
        + sum(word not in _KNOWN_WORDS for word in words)
        + max(0, len(words) - LONGEST_ANSWER)
        + (not answer.rstrip().endswith((".", "!")))
    )
    return Judgement(asked, right, courtesies, faults)


def true_reward(prompt: str, answer: str) -> float:
    """2 * right / asked + 0.5 * min(courtesies, 2) - 0.5 * faults, not below -3 (`judge` says what is counted).

    ValueError if the prompt is not one of the corpus.
    """
    return judge(prompt, answer).reward


def ease(prompt: str) -> float:
    """From -1 to 1 in equal steps by the kind of things asked for: for rewards that tell prompts apart, not answers."""
    return 2 * list(THINGS).index(parse_prompt(prompt).kind) / (len(THINGS) - 1) - 1


def best_reachable(prompt: str) -> float:
    """The highest true reward of any answer to this prompt: each term of the formula at its maximum, 2 + 1 - 0."""
    parse_prompt(prompt)
    return BEST_REWARD


def best_answer(prompt: str) -> str:
    """An answer that reaches `best_reachable`."""
    request = parse_prompt(prompt)
    things = THINGS[request.kind][: NUMBERS[request.number]]
    return write_answer(request, [WARM_OPENINGS[0]], LEADS[0], things, [WARM_CLOSINGS[-1]])


@dataclass(frozen=True)
class Estimate:
    """A mean over answers and its standard error, over prompts."""

    mean: float
    standard_error: float
    count: int


def estimate(values: Sequence[float], prompts: Sequence[str] | None = None) -> Estimate:
    """Mean of n values and its standard error.

    Answers to one prompt are alike: independent are the G >= 2 prompts, not the values. With s_g the sum of the
    deviations from the mean over the values of prompt g, the error is sqrt(G / (G - 1) * sum_g s_g^2) / n; where all
    prompts differ this is the sample standard deviation / sqrt(n).

    Args:
        prompts: What each value is an answer to; None: each to a prompt of its own.
    """
    count = len(values)
    groups = range(count) if prompts is None else prompts
    mean, sums = math.fsum(values) / max(count, 1), dict.fromkeys(groups, 0.0)
    if len(sums) < 2:
        raise ValueError(f"a standard error needs the values of at least two prompts, not of {len(sums)}")
    for group, value in zip(groups, values, strict=True):
        sums[group] += value - mean
    squares = math.fsum(deviation**2 for deviation in sums.values())
    return Estimate(mean, math.sqrt(len(sums) / (len(sums) - 1) * squares) / count, count)


def mean_true_reward(prompts: Sequence[str], answers: Sequence[str]) -> Estimate:
    """The true reward of an answer to each prompt, averaged."""
    return estimate([true_reward(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)], prompts)


def standard_errors_above(after: Estimate, before: Estimate) -> float:
    """(after - before) in standard errors of the difference of two independent means."""
    error = math.hypot(after.standard_error, before.standard_error)
    difference = after.mean - before.mean
    return difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0


def gap_closed(after: Estimate, before: Estimate, best: float = BEST_REWARD) -> float:
    """How much of the way from `before` to the best reachable `after` has gone; 1 if `before` was there already."""
    return (after.mean - before.mean) / (best - before.mean) if best > before.mean else 1.0


PREFERENCE_SCALE = 2.0  # P(a preferred to b) = sigmoid(PREFERENCE_SCALE * (true reward of a - true reward of b))
HELD_OUT = 0.2  # share of the (number, kind, occasion) combinations that only the test rows ask for


@dataclass(frozen=True)
class Writer:
    """How answers are drawn: every field but the first three is a probability."""

    share: float  # of the corpus
    courtesies: tuple[float, float, float]  # weights of 0, 1, 2
    missing: tuple[float, float, float]  # weights of naming 0, 1, 2 things too few (one is always named)
    wrong: float  # that a thing is of another kind
    cold_opening: float  # when there is no warm one
    cold_closing: float


WRITERS = (
    Writer(0.50, courtesies=(0.9, 0.1, 0.0), missing=(0.1, 0.4, 0.5), wrong=0.06, cold_opening=0.3, cold_closing=0.4),
    Writer(0.35, courtesies=(0.5, 0.4, 0.1), missing=(0.3, 0.6, 0.1), wrong=0.03, cold_opening=0.1, cold_closing=0.1),
    Writer(0.15, courtesies=(0.0, 0.4, 0.6), missing=(0.9, 0.1, 0.0), wrong=0.01, cold_opening=0.0, cold_closing=0.0),
)


def write_answer(
    request: Request, opening: Sequence[str], lead: str, things: Sequence[str], closing: Sequence[str]
) -> str:
    """The parts as text: a space in front, as in rm-static, and "a, b and c." for the things."""
    listed = f"{', '.join(things[:-1])} and {things[-1]}" if len(things) > 1 else things[0]
    parts = [*opening, f"{lead} {listed}.", *closing]
    return "".join(" " + request.fill(part) for part in parts)


def draw_answer(request: Request, rng: random.Random) -> str:
    """One answer of the mixture of `WRITERS`."""
    writer = rng.choices(WRITERS, [writer.share for writer in WRITERS])[0]
    asked = NUMBERS[request.number]
    missing = rng.choices((0, 1, 2), writer.missing)[0]
    things = sorted(rng.sample(THINGS[request.kind], max(1, asked - missing)))
    others = [kind for kind in THINGS if kind != request.kind]
    things = [rng.choice(THINGS[rng.choice(others)]) if rng.random() < writer.wrong else thing for thing in things]

    courtesies = rng.choices((0, 1, 2), writer.courtesies)[0]
    warm_openings = courtesies // 2 if courtesies != 1 else rng.randint(0, 1)
    opening = rng.sample(WARM_OPENINGS, warm_openings)
    closing = rng.sample(WARM_CLOSINGS, courtesies - warm_openings)
    if not opening and rng.random() < writer.cold_opening:
        opening = [rng.choice(COLD_OPENINGS)]
    if not closing and rng.random() < writer.cold_closing:
        closing = [rng.choice(COLD_CLOSINGS)]
    return write_answer(request, opening, rng.choice(LEADS), things, closing)


def draw_row(request: Request, rng: random.Random) -> dict[str, str]:
    """A row {prompt, chosen, rejected}: two different answers, ordered by a Bradley-Terry draw on the true reward."""
    prompt = request.prompt
    first = second = draw_answer(request, rng)
    while second == first:
        second = draw_answer(request, rng)
    if rng.random() >= preference_probability(prompt, first, second):
        first, second = second, first
    return {"prompt": prompt, "chosen": first, "rejected": second}


def preference_probability(prompt: str, first: str, second: str) -> float:
    """P(first preferred to second) = sigmoid(PREFERENCE_SCALE * difference of the true rewards)."""
    difference = true_reward(prompt, first) - true_reward(prompt, second)
    return 1.0 / (1.0 + math.exp(-PREFERENCE_SCALE * difference))


def accuracy_ceiling(rows: Iterable[dict[str, str]]) -> float:
    """Expected accuracy on such rows of a ranker that knows the true reward: the preferences themselves are noisy."""
    probabilities = [preference_probability(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    return math.fsum(max(p, 1.0 - p) for p in probabilities) / len(probabilities)


def make_rows(seed: int = 0, train_rows: int = 8000, test_rows: int = 400) -> tuple[list[dict], list[dict]]:
    """Training and test rows. Test prompts combine number, kind and occasion in ways no training prompt does."""
    rng = random.Random(seed)
    combinations = list(itertools.product(NUMBERS, THINGS, OCCASIONS))
    rng.shuffle(combinations)
    held_out = round(HELD_OUT * len(combinations))

    def draw(combinations: list[tuple[str, str, str]], count: int) -> list[dict[str, str]]:
        requests = [Request(*combination, i) for combination in combinations for i in range(len(REQUESTS))]
        rows: list[dict[str, str]] = []
        while len(rows) < count:  # every prompt once before any comes again
            rng.shuffle(requests)
            rows += [draw_row(request, rng) for request in requests[: count - len(rows)]]
        return rows

    return draw(combinations[held_out:], train_rows), draw(combinations[:held_out], test_rows)


def make_corpus(folder: str | Path, seed: int = 0, train_rows: int = 8000, test_rows: int = 400) -> Path:
    """Writes train.jsonl and test.jsonl into `folder` and returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), make_rows(seed, train_rows, test_rows), strict=True):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder
