"""A row of each shape, and the texts that come of it. Whole files of them are in test_preferences."""

import pytest

from utils.data.shapes import Example, RowRefused, RowSkipped, find_shape, finish, usable_answers

ASK = "\n\nHuman: Q\n\nAssistant:"


def messages(*turns: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[k % 2], "content": turn} for k, turn in enumerate(turns)]


def example(row: dict) -> Example:
    """The row as data of its columns would be read, prompts taken as they stand."""
    shape, convert = find_shape(list(row))
    return finish(convert(row, bare=False) if shape.startswith("prompt") else convert(row))


def test_several_turns():
    row = {
        "prompt": [{"role": "system", "content": "Be kind."}, *messages("Hi", "Hello!", "Who?")],
        "chosen": messages("", "A")[1:],
        "rejected": messages("", "B")[1:],
    }
    found = example(row)
    assert found.prompt == "Be kind.\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Who?\n\nAssistant:"
    assert (found.chosen, found.rejected) == (" A", " B")
    assert [found.prompt[slice(*span)] for span in found.earlier] == [" Hello!"]


@pytest.mark.parametrize(
    "row",
    [
        {"answers": ["A", "B", "C"]},
        {"answers": ["C", "A", "B"], "scores": [-1, 8.5, 8]},
        {"answers": ["C", "A", "B"], "ranks": [9, 1, 2.0]},
        {"answers": [messages("", answer)[1:] for answer in "ABC"]},
        {"answers": [messages("Q", answer) for answer in "BAC"], "scores": [1, 2, 0]},
    ],
)
@pytest.mark.parametrize("prompt", [ASK, messages("Q")])
def test_every_shape_of_ranked_answers_becomes_the_same_text(row, prompt):
    if isinstance(row["answers"][0], list):
        prompt = messages("Q")
    found = example({"prompt": prompt, **row})
    assert (found.prompt, found.chosen, found.rejected, found.earlier) == (ASK, " A", " C", ())
    assert dict(zip(found.answers, found.ranks, strict=True)) == {" A": 1, " B": 2, " C": 3}


def test_ties_keep_their_order_and_share_a_rank():
    found = example({"prompt": ASK, "answers": ["D", "B", "A", "C"], "scores": [1, 3, 3, 1]})
    assert (found.answers, found.ranks) == ((" D", " B", " A", " C"), (2, 1, 1, 2))
    assert (found.chosen, found.rejected) == (" B", " C")
    tied = example({"prompt": ASK, "answers": ["A", "B"], "ranks": [1, 1]})
    assert (tied.chosen, tied.rejected, tied.ranks) == (" A", None, (1, 1))


def test_the_best_and_the_worst_are_found_among_distinct_answers():
    # Empty: 0. "x" is the best and the second at once: neither. "b" twice on one rank: the first.
    assert usable_answers([None, "x", "b", "b", "x", "c"], [1, 1, 2, 2, 3, 4]) == [2, 5]
    found = example({"prompt": ASK, "answers": ["  ", "A", "B", " A", "C", ""]})
    assert (found.chosen, found.rejected, len(found.answers)) == (" B", " C", 6)
    found = example({"prompt": ASK, "answers": ["", ""]})
    assert (found.chosen, found.rejected) == (None, None)


def test_ranked_dialogues_with_other_prompts_are_skipped():
    with pytest.raises(RowSkipped, match="the dialogues differ before their last turn"):
        example({"prompt": messages("Q"), "answers": [messages("Q", "A"), messages("Q", "B"), messages("R", "C")]})


@pytest.mark.parametrize("about", [None, "", "oak, robin"])
def test_alpaca_by_hand(about):
    question = "Which is a bird?" + ("\n\noak, robin" if about else "")
    found = example({"instruction": "Which is a bird?", "input": about, "output": "A robin."})
    assert found == Example(f"\n\nHuman: {question}\n\nAssistant:", " A robin.", None)
    assert about or example({"instruction": "Which is a bird?", "output": "A robin."}) == found


def said(*turns: tuple[str, str]) -> dict:
    return {"conversations": [{"from": who, "value": what} for who, what in turns]}


def test_sharegpt_by_hand():
    dialogue = (("system", "Be brief."), ("human", "Why?"), ("gpt", "So."), ("human", "Sure?"), ("gpt", "Yes."))
    found = example(said(*dialogue))
    assert found.prompt == "Be brief.\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: Sure?\n\nAssistant:"
    assert found.chosen == " Yes." and len(found.earlier) == 1
    assert found == example(
        {"messages": [{"role": "system", "content": "Be brief."}, *messages("Why?", "So.", "Sure?", "Yes.")]}
    )
    for turns in (dialogue[:4], dialogue[4:], (*dialogue, ("gpt", "Or no."))):
        with pytest.raises(RowSkipped, match="do not end in a question and its answer"):
            example(said(*turns))


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ({"instruction": None, "output": "a"}, "instruction", "found missing or null, expected text"),
        ({"instruction": "a", "input": 3, "output": "a"}, "input", "found int '3', expected text"),
        ({"conversations": "a"}, "conversations", "found str 'a', expected a list"),
        (
            {"conversations": messages("a", "b")},
            "conversations",
            'expected messages like {"from": "human", "value": "..."}',
        ),
        (said(("human", "a"), ("bot", "b")), "conversations", "role 'bot' is not supported"),
        (said(("human", "a"), ("gpt", None)), "conversations", "the content of a message is NoneType"),
        ({"prompt": [{"role": "tool", "content": "a"}]}, "prompt", "role 'tool' is not supported"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
            "messages",
            "role 'assistant' is not supported with tools; leave such rows out",
        ),
        ({"prompt": [{"from": "a"}]}, "prompt", "expected messages like"),
        ({"prompt": [{"role": "user", "content": None}]}, "prompt", "the content of a message is NoneType"),
        ({"prompt": []}, "prompt", "found an empty list"),
        ({"messages": messages("only a question")}, "messages", "the last message must be the assistant's"),
        ({"prompt": "a", "answers": "b"}, "answers", "found str 'b', expected a list"),
        ({"prompt": "a", "answers": None}, "answers", "found missing or null, expected a list"),
        ({"prompt": "a", "answers": ["b", 3]}, "answers[2]", "found int '3', expected text"),
        ({"prompt": "a", "answers": ["b", None]}, "answers[2]", "found missing or null, expected text"),
        ({"prompt": "a", "answers": ["b", "c"], "scores": [1]}, "scores", "found 1 numbers for 2 answers"),
        ({"prompt": "a", "answers": ["b", "c"], "ranks": [1, "2"]}, "ranks", "found str '2', expected a number"),
        ({"prompt": "a", "answers": ["b", "c"], "ranks": [1, True]}, "ranks", "found bool 'True', expected a number"),
        ({"prompt": "a", "answers": ["b", "c"], "scores": 3}, "scores", "found int '3', expected a list"),
        (
            {"prompt": "a", "answers": ["b", "c"], "ranks": [1, 2], "scores": [1, 2]},
            "scores",
            "ranks give an order too; expected one of the two columns",
        ),
        ({"prompt": "a", "answers": [messages("a", "b"), messages("a")]}, "answers[2]", "the last message must be"),
        (
            {"prompt": messages("a", "b"), "chosen": messages("", "c")[1:]},
            "prompt",
            "expected a user's message before the answer",
        ),
    ],
)
def test_wrong_content_names_its_column(row, column, expected):
    with pytest.raises(RowRefused) as error:
        example(row)
    assert error.value.args[0] == column and expected in error.value.args[1]
