"""A row of each shape, and the texts that come of it. Whole files of them are in test_preferences."""

import pytest

from utils.data.shapes import Example, RowRefused, find_shape, finish

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
    ("row", "column", "expected"),
    [
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
