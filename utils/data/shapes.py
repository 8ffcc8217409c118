"""A row of any accepted shape -> prompt, chosen, rejected, margin; several ranked answers are kept as well.

Text follows the convention of Dahoas/rm-static: a prompt ends with "Assistant:" and an answer begins with a space, so
that prompt + answer is the whole dialogue. Text in this form, or in any template of the user's own, is taken as it is.
Bare questions and lists of messages are written by the tokenizer's chat template, or as Human/Assistant dialogue where
it has none.
"""

import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import Any

from utils.data.chat import ASSISTANT, ChatTemplate, Spans, TemplateRefuses, earlier_answers, write_plain
from utils.present import present

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One row as text; of several ranked answers, chosen and rejected are the best and the worst."""

    prompt: str | None  # None for plain text, which is in `chosen`
    chosen: str | None
    rejected: str | None
    margin: float | None = None  # by how much the chosen answer is better, where the data set knows it
    earlier: Spans | None = ()  # where the assistant's earlier answers are in the prompt; None when that is unknown
    answers: Sequence[str] | None = None  # all of them, where several are ranked
    ranks: Sequence[int] | None = None  # of these, 1 for the best and equal for ties


@dataclass(frozen=True)
class Conversation:
    """One row whose prompt is still a list of messages, which `finish` writes as text."""

    messages: list[dict[str, str]]
    chosen: str | None = None
    rejected: str | None = None
    _: KW_ONLY
    margin: float | None = None
    answers: Sequence[str] | None = None
    ranks: Sequence[float] | None = None


@dataclass(frozen=True)
class Form:
    """How rows become text."""

    # {"prompt": its name in the data, ...}, for data that calls prompt, chosen or rejected otherwise
    columns: Mapping[str, str] = field(default_factory=dict)
    template: ChatTemplate | None = None  # writes lists of messages; None: they become Human/Assistant dialogue
    keep: frozenset[str] = frozenset()  # columns that are kept as they are, under their names in the data; "*": all


PLAIN = Form()


class RowSkipped(Exception):
    """The row is well-formed but cannot be used; the message is the reason that is counted and reported."""


class RowRefused(Exception):
    """The row's content is wrong; the arguments are the column, and what was found and expected."""


def as_dialogue(question: str) -> str:
    """A bare question as a Human/Assistant prompt."""
    return f"\n\nHuman: {question}{ASSISTANT}"


def as_answer(prompt: str, answer: str) -> str:
    """The answer as it follows `prompt`: after a space where "Assistant:" comes before it."""
    needs_space = prompt.endswith("Assistant:") and answer and not answer[0].isspace()
    return " " + answer if needs_space else answer


def pair(
    prompt: str, chosen: str | None = None, rejected: str | None = None, *, margin: float | None = None
) -> Example:
    """An Example of a finished prompt and the two answers."""
    chosen, rejected = (answer if answer is None else as_answer(prompt, answer) for answer in (chosen, rejected))
    return Example(prompt, chosen, rejected, margin, earlier_answers(prompt))


def ranked(prompt: str, answers: Sequence[str], ranks: Sequence[float]) -> Example:
    """An Example of a finished prompt and several answers; the lower an answer's rank, the better it is."""
    return best_and_worst(prompt, [as_answer(prompt, answer) for answer in answers], ranks, earlier_answers(prompt))


def best_and_worst(prompt: str, answers: Sequence[str], ranks: Sequence[float], earlier: Spans | None) -> Example:
    """The Example of several answers as they follow the prompt.

    The best and the worst are found among the `usable_answers`: of several best ones the first, of several worst ones
    the last; where all are tied, there is no worst.
    """
    ranks = dense(ranks)
    kept = sorted(usable_texts(answers, ranks), key=lambda i: ranks[i])
    chosen = answers[kept[0]] if kept else None
    rejected = answers[kept[-1]] if kept and ranks[kept[-1]] > ranks[kept[0]] else None
    return Example(prompt, chosen, rejected, earlier=earlier, answers=tuple(answers), ranks=tuple(ranks))


def dense(ranks: Sequence[float]) -> list[int]:
    """Ranks from 1 without gaps, equal for equal ones."""
    number = {rank: k for k, rank in enumerate(sorted(set(ranks)), 1)}
    return [number[rank] for rank in ranks]


def usable_answers(answers: Sequence[Hashable | None], ranks: Sequence[int]) -> list[int]:
    """The indices of the answers that are used: not the empty ones (None), and of equal ones the first.

    Equal answers of unequal rank contradict one another: none of them is used.
    """
    ranks_of: dict[Hashable, set[int]] = {}
    for answer, rank in zip(answers, ranks, strict=True):
        ranks_of.setdefault(answer, set()).add(rank)
    sound = (i for i, answer in enumerate(answers) if answer is not None and len(ranks_of[answer]) == 1)
    return list({answers[i]: i for i in reversed(list(sound))}.values())[::-1]


def usable_texts(answers: Sequence[str | None], ranks: Sequence[int]) -> list[int]:
    """The `usable_answers` among texts, without regard to the white space around them."""
    return usable_answers([(answer or "").strip() or None for answer in answers], ranks)


def unranked(answers: Sequence[str | None], ranks: Sequence[int]) -> str | None:
    """Why no answer of a row is better than another, or None where one is."""
    kept = usable_texts(answers, ranks)
    if len(kept) < 2:
        return "with fewer than two distinct answers"
    return "whose answers are all tied" if len({ranks[k] for k in kept}) < 2 else None


def ask(
    question: str, chosen: str | None = None, rejected: str | None = None, *, margin: float | None = None
) -> Conversation:
    """A bare question and its answers, if any: a user's message, which `finish` writes."""
    return Conversation([{"role": "user", "content": question}], chosen, rejected, margin=margin)


def text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        found = "missing or null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise RowRefused(column, f"found {found}, expected text")
    return value


def margin(row: Row) -> float | None:
    """The number in the column `margin`; None where there is none."""
    value = row.get("margin")
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RowRefused("margin", f"found {str(value)[:40]!r}, expected a number") from None
    if not abs(number) < 3e38:  # also as a float32, and no NaN
        raise RowSkipped("with a margin that is not finite")
    return number


def turns(row: Row, column: str) -> list[dict[str, str]]:
    """The messages in `column`, their roles and contents checked."""
    messages = []
    for message in row[column]:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise RowRefused(column, 'expected messages like {"role": "user", "content": "..."}')
        if message["role"] in ("tool", "function") or message.get("tool_calls"):
            raise RowRefused(column, f"role {message['role']!r} is not supported with tools; leave such rows out")
        if message["role"] not in ("system", "user", "assistant"):
            raise RowRefused(column, f"role {message['role']!r} is not supported, expected system, user or assistant")
        if not isinstance(message["content"], str):
            raise RowRefused(column, f"the content of a message is {type(message['content']).__name__}, expected text")
        messages.append({"role": message["role"], "content": message["content"]})
    if not messages:
        raise RowRefused(column, "found an empty list, expected messages")
    return messages


def finish(converted: Example | Conversation, template: ChatTemplate | None = None) -> Example:
    """Writes a row's messages as text, where it has any."""
    if isinstance(converted, Example):
        return converted
    messages = converted.messages
    try:
        prompt, earlier = write_plain(messages) if template is None else template.prompt(messages)
        write = partial(as_answer, prompt) if template is None else partial(template.answer, messages, prompt)

        if converted.answers is not None:
            ranks = present(converted.ranks, "the ranks of several answers")
            return best_and_worst(prompt, [write(answer) for answer in converted.answers], ranks, earlier)
        both = (converted.chosen, converted.rejected)
        chosen, rejected = (answer if answer is None else write(answer) for answer in both)
        return Example(prompt, chosen, rejected, converted.margin, earlier)
    except TemplateRefuses as error:
        raise RowSkipped(f"that the chat template refuses ({str(error)[:100]})") from error


def prompt_and_answers(row: Row, *, answer: str | None, bare: bool) -> Example | Conversation:
    """A prompt with chosen/rejected, with a completion (column `answer`), or alone; text or lists of messages.

    Where `answer` is None there is none; `bare` prompts are plain questions, see `ask`.
    """
    if row.get("label") is False:
        raise RowSkipped("label false: an unwanted answer")
    columns = [answer] if answer else []
    if answer == "chosen" and "rejected" in row:
        columns.append("rejected")
    if len(columns) == 2 and all(of_texts(row[column]) for column in columns):
        return right_and_wrong(row, bare)
    if any(isinstance(row[column], list) for column in ("prompt", *columns)):
        return conversation(row, columns)
    prompt = text(row, "prompt")
    answers = [text(row, column) for column in columns]
    return (ask if bare else pair)(prompt, *answers, margin=margin(row))


def conversation(row: Row, columns: list[str]) -> Conversation:
    """Lists of {role, content}: a prompt and an answer each, or whole dialogues whose last message is the answer.

    The answers are in `columns`: the good one, then the bad one, as far as there are any.
    """
    messages, answers = exchange(row, columns)
    return Conversation(messages, *answers, margin=margin(row))


def exchange(row: Row, columns: list[str]) -> tuple[list[dict[str, str]], list[str]]:
    """The messages before the answer, and the answers in `columns`; see `conversation`."""
    if row.get("tools"):
        raise RowRefused("tools", "tools are not supported; leave such rows out, or remove the column")
    asked: list[dict[str, str]] = []
    if isinstance(row.get("prompt"), list):
        asked = turns(row, "prompt")
    elif row.get("prompt") is not None:
        asked = [{"role": "user", "content": text(row, "prompt")}]
    answers: list[str] = []
    before: list[list[dict[str, str]]] = []
    for column in columns:
        is_list = isinstance(row[column], list)
        *before_it, last = turns(row, column) if is_list else [{"role": "assistant", "content": text(row, column)}]
        if last["role"] != "assistant":
            raise RowRefused(column, "the last message must be the assistant's")
        answers.append(last["content"])
        before.append(before_it)
    if any(other != before[0] for other in before[1:]):
        raise RowSkipped(f"the {'two ' if len(before) == 2 else ''}dialogues differ before their last turn")
    earlier = before[0] if before else []
    repeats_prompt = earlier[: len(asked)] == asked or (len(asked) == 1 and asked[0] in earlier)
    messages = earlier if repeats_prompt else asked + earlier
    if not messages or messages[-1]["role"] != "user":
        raise RowRefused("prompt" if asked else columns[0], "expected a user's message before the answer")
    return messages, answers


def several_answers(row: Row, *, order: str | None, bare: bool) -> Example | Conversation:
    """A prompt with a list of answers; text or lists of messages.

    The order is that of "scores", of which the highest is the best, or of "ranks", of which the lowest is; where it is
    None, the best comes first. `bare` prompts are plain questions, see `ask`.
    """
    answers = listed(row, "answers")
    ranks: Sequence[float] = range(len(answers))
    if order:
        ranks = numbers(row, order, len(answers))
    if order == "scores":
        ranks = [-score for score in ranks]
    if order == "ranks" and row.get("scores") is not None:
        raise RowRefused("scores", "ranks give an order too; expected one of the two columns")
    columns = [f"answers[{k}]" for k in range(1, len(answers) + 1)]
    named = {**row, **dict(zip(columns, answers, strict=True))}
    if any(isinstance(value, list) for value in (row["prompt"], *answers)):
        messages, texts = exchange(named, columns)
        return Conversation(messages, answers=texts, ranks=ranks)
    prompt, texts = text(row, "prompt"), [text(named, column) for column in columns]
    return replace(ask(prompt), answers=texts, ranks=ranks) if bare else ranked(prompt, texts, ranks)


def of_texts(value: Any) -> bool:
    """Whether a value is a list of texts, not of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def right_and_wrong(row: Row, bare: bool) -> Example | Conversation:
    """A prompt with lists of right and of wrong answers, as of RewardBench 2: ranked, those of a list equal."""
    order = [1] * len(row["chosen"]) + [2] * len(row["rejected"])
    answers = {"prompt": row["prompt"], "answers": [*row["chosen"], *row["rejected"]], "ranks": order}
    return several_answers(answers, order="ranks", bare=bare)


def listed(row: Row, column: str) -> list[Any]:
    if not isinstance(row[column], list):
        found = "missing or null" if row[column] is None else f"{type(row[column]).__name__} {str(row[column])[:40]!r}"
        raise RowRefused(column, f"found {found}, expected a list")
    return row[column]


def numbers(row: Row, column: str, count: int) -> list[float]:
    """The finite numbers in `column`, one for each of `count` answers."""
    values = listed(row, column)
    if len(values) != count:
        raise RowRefused(column, f"found {len(values)} numbers for {count} answers")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise RowRefused(column, f"found {type(value).__name__} {str(value)[:40]!r}, expected a number")
    if not all(value is not None and math.isfinite(value) for value in values):
        raise RowSkipped(f"with {column} that are missing or not finite")
    return values


def dialogues(row: Row) -> Example | Conversation:
    """Two whole dialogues, chosen and rejected; what they share up to the last "Assistant:" is the prompt."""
    if isinstance(row["chosen"], list):
        return conversation(row, ["chosen", "rejected"])
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    shared = os.path.commonprefix([chosen, rejected])
    cut = shared.rfind(ASSISTANT)
    end = cut + len(ASSISTANT) if cut >= 0 else shared.rfind("Assistant:") + len("Assistant:")
    if end < len("Assistant:") or "Assistant:" not in shared:
        raise RowSkipped('the two dialogues share no prompt up to an "Assistant:"')
    if "\n\nHuman:" in chosen[end:] or "\n\nHuman:" in rejected[end:]:
        raise RowSkipped("the two dialogues differ before their last turn")
    return pair(chosen[:end], chosen[end:], rejected[end:], margin=margin(row))


def last_answer(row: Row) -> Conversation:
    """One dialogue in the column messages, whose last message is the answer."""
    if not isinstance(row["messages"], list):
        raise RowRefused("messages", 'expected a list like [{"role": "user", "content": "..."}, ...]')
    return conversation(row, ["messages"])


def alpaca(row: Row) -> Conversation:
    """An instruction, what it is about (`input`, which may be missing or empty), and the answer in `output`."""
    question = text(row, "instruction")
    if row.get("input") not in (None, ""):
        question += "\n\n" + text(row, "input")
    return ask(question, text(row, "output"))


SPEAKERS = {"human": "user", "gpt": "assistant"}


def sharegpt(row: Row) -> Conversation:
    """One dialogue in the column conversations, of {from, value}; one that does not end in an answer is left out."""
    messages = []
    for message in listed(row, "conversations"):
        if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
            raise RowRefused("conversations", 'expected messages like {"from": "human", "value": "..."}')
        messages.append({"role": SPEAKERS.get(message["from"], message["from"]), "content": message["value"]})
    messages = turns({"conversations": messages}, "conversations")
    roles = [message["role"] for message in messages]
    if roles[-2:] != ["user", "assistant"]:
        raise RowSkipped("that do not end in a question and its answer")
    return conversation({"conversations": messages}, ["conversations"])


def plain_text(row: Row) -> Example:
    """A document in the column text, without prompt and answer."""
    return Example(None, text(row, "text"), None)


def find_shape(columns: list[str]) -> tuple[str, Callable[..., Example | Conversation] | None]:
    """The name of the shape and the function from row to Example, or None when the columns fit no shape."""
    if {"prompt", "chosen", "rejected"} <= set(columns):
        return "prompt/chosen/rejected", partial(prompt_and_answers, answer="chosen")
    if {"chosen", "rejected"} <= set(columns):
        return "whole dialogues chosen/rejected", dialogues
    if "rejected" in columns:
        return "", None
    if {"prompt", "answers"} <= set(columns):
        order = next((column for column in ("ranks", "scores") if column in columns), None)
        shape = f"prompt/answers/{order}" if order else "prompt/answers, the best first"
        return shape, partial(several_answers, order=order)
    for answer in ("chosen", "completion"):
        if {"prompt", answer} <= set(columns):
            return f"prompt/{answer}", partial(prompt_and_answers, answer=answer)
    if "messages" in columns:
        return "messages", last_answer
    if {"instruction", "output"} <= set(columns):
        return "instruction/input/output", alpaca
    if "conversations" in columns:
        return "conversations", sharegpt
    if "prompt" in columns:
        return "prompts", partial(prompt_and_answers, answer=None)
    if "text" in columns:
        return "plain text", plain_text
    return "", None
