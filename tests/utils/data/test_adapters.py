"""Data sets known by name: a row as it stands in each, and the texts that come of it."""

import pytest

from utils.data.adapters import ADAPTERS
from utils.data.shapes import Example, RowSkipped, finish

ASK = "\n\nHuman: Q\n\nAssistant:"
KNOWN = [
    ("Dahoas/rm-static", {"prompt": ASK, "chosen": " A", "rejected": " B"}, (ASK, " A", " B")),
    ("Dahoas/full-hh-rlhf", {"prompt": ASK, "response": "x", "chosen": " A", "rejected": " B"}, (ASK, " A", " B")),
    ("Dahoas/synthetic-instruct-gptj-pairwise", {"prompt": "Q", "chosen": "A", "rejected": "B"}, (ASK, " A", " B")),
    (
        "yitingxie/rlhf-reward-datasets",
        {"prompt": "\n\nHuman: Q\n\n", "chosen": ASK + " A", "rejected": "Assistant: B"},
        (ASK, " A", " B"),
    ),
    (
        "openai/webgpt_comparisons",
        {"question": {"full_text": "Q"}, "answer_0": "B [1, 2].", "score_0": -1, "answer_1": "A [3]", "score_1": 0.5},
        (ASK, " A", " B.", 1.5),
    ),
    ("stanfordnlp/SHP", {"history": "Q", "human_ref_A": "A", "human_ref_B": "B", "labels": 1}, (ASK, " A", " B")),
    ("stanfordnlp/SHP", {"history": "Q", "human_ref_A": "B", "human_ref_B": "A", "labels": 0}, (ASK, " A", " B")),
    (
        "pvduy/sharegpt_alpaca_oa_vicuna_format",
        {"prompt": "USER: Q ASSISTANT:", "label": "A"},
        ("Human: Q Assistant:", " A", None),
    ),
    ("local/jsonfile", {"prompt": ASK, "chosen": "A", "rejected": "B"}, (ASK, " A", " B")),
    ("wangrui6/Zhihu-KOL", {"INSTRUCTION": "Q", "RESPONSE": "A"}, (ASK, " A", None)),
    *[
        (
            f"Cohere/miracl-{language}-queries-22-12",
            {"query": "Q", "positive_passages": [{"text": "A"}], "negative_passages": [{"text": "B"}]},
            (ASK, " A", " B"),
        )
        for language in ("zh", "ja")
    ],
    (
        "Hello-SimpleAI/HC3-Chinese",
        {"question": "Q", "human_answers": ["A"], "chatgpt_answers": ["C"]},
        (ASK, " A", None),
    ),
    *[
        (name, {"queries": {language: "Q"}, "answers": {language: [{"text": "A"}]}}, (ASK, " A", None))
        for name, language in (("mkqa-Chinese", "zh_cn"), ("mkqa-Japanese", "ja"))
    ],
    ("lmqg/qg_jaquad", {"question": "Q", "sentence": "A"}, (ASK, " A", None)),
    ("lmqg/qag_jaquad", {"questions": ["Q", "R"], "paragraph": "A"}, (ASK, " A", None)),
    ("Anthropic/hh-rlhf", {"chosen": ASK + " A", "rejected": ASK + " B"}, (ASK, " A", " B")),
    (
        "HuggingFaceH4/ultrafeedback_binarized",
        {
            "prompt": "Q",
            "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
            "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}],
            "score_chosen": 8.0,
            "score_rejected": 6.5,
        },
        (ASK, " A", " B", 1.5),
    ),
]


RANKED = (ASK, " A", " C", None, (), (" B", " A", " C"), (2, 1, 3))
SCORED = (("B", 7), ("A", 8.5), ("C", 2))
KNOWN += [
    (
        "berkeley-nest/Nectar",
        {"prompt": ASK + " ", "answers": [{"answer": a, "model": "x", "rank": 10.0 - s} for a, s in SCORED]},
        RANKED,
    ),
    (
        "openbmb/UltraFeedback",
        {"instruction": "Q", "completions": [{"response": a, "overall_score": s} for a, s in SCORED]},
        RANKED,
    ),
]


@pytest.mark.parametrize(("name", "row", "expected"), KNOWN)
def test_sets_known_by_name(name, row, expected):
    assert finish(ADAPTERS[name](row)) == Example(*expected)


def test_every_known_name_is_tested():
    assert {name for name, *_ in KNOWN} == set(ADAPTERS)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("wangrui6/Zhihu-KOL", {"INSTRUCTION": None, "RESPONSE": "A"}),
        ("Hello-SimpleAI/HC3-Chinese", {"question": "Q", "human_answers": []}),
        ("mkqa-Japanese", {"queries": {"ja": "Q"}, "answers": {"ja": [{"text": None}]}}),
        ("Cohere/miracl-ja-queries-22-12", {"query": "Q", "positive_passages": [], "negative_passages": []}),
    ],
)
def test_public_rows_without_an_answer_are_skipped(name, row):
    with pytest.raises(RowSkipped, match="no question or no answer"):
        ADAPTERS[name](row)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("openai/webgpt_comparisons", {"score_1": None}),
        ("HuggingFaceH4/ultrafeedback_binarized", {"score_rejected": None}),
        ("berkeley-nest/Nectar", {"answers": [{"answer": "A", "rank": None}]}),
        ("openbmb/UltraFeedback", {"completions": [{"response": "A", "overall_score": float("nan")}]}),
    ],
)
def test_public_rows_without_a_score_are_skipped(name, columns):
    row = next(row for known, row, _ in KNOWN if known == name)
    with pytest.raises(RowSkipped, match="that are missing or not finite"):
        ADAPTERS[name](row | columns)


def test_the_answer_of_a_dialogue_is_behind_its_last_cue():
    dialogue = "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"prompt": dialogue, "chosen": f"{dialogue} good", "rejected": f"{dialogue} bad"}
    example = ADAPTERS["yitingxie/rlhf-reward-datasets"](row)
    assert (example.prompt, example.chosen, example.rejected) == (dialogue, " good", " bad")
    alone = ADAPTERS["yitingxie/rlhf-reward-datasets"](row | {"chosen": "good", "rejected": "bad"})
    assert (alone.chosen, alone.rejected) == (" good", " bad")
