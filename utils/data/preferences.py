"""Rows of any accepted shape -> prompt, chosen, rejected, margin.

Text convention, that of Dahoas/rm-static: a prompt ends with "Assistant:" and an answer begins with a space, so that
prompt + answer is the whole dialogue. What is written so, or in any template of the user's own, is taken as it stands;
bare questions are written as Human/Assistant dialogue, and so are lists of messages unless the tokenizer has a chat
template.

The shape is found from the columns; data sets known by name have a small function each, in `ADAPTERS`. To add one,
write a function from a row to an `Example` and name it in that table.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value

from utils.data.chat import ASSISTANT, ChatTemplate, Spans, TemplateRefuses, earlier_answers, write_plain
from utils.data.names import parse_name
from utils.data.sources import SHAPES, Part, converted_on_reading, read_splits, row_name, undecodable
from utils.distributed import print0
from utils.run import UserError

HOLD_OUT = 0.05
HOLD_OUT_SEED = 1234
TEXT = Features(
    {"prompt": Value("string"), "chosen": Value("string"), "rejected": Value("string"), "margin": Value("float64")}
)
# earlier: places of earlier answers in the prompt.   origin: the row's name in its file, for messages.
ABOUT = Features({"earlier": List(List(Value("int32"))), "origin": Value("string")})
NORMALISED = Features({**TEXT, **ABOUT, "key": Value("int64"), "skipped": Value("string")})
SHOWN_ROWS = 3
Dropped = dict[str, tuple[int, list[str]]]  # {reason: (rows, names of the first few)}
Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One row.

    prompt: None for plain text, which stands in `chosen`.   margin: by how much the chosen answer is better, where the
    data set knows it.   earlier: where the assistant's earlier answers stand in the prompt; None when it is not known.
    """

    prompt: str | None
    chosen: str | None
    rejected: str | None
    margin: float | None = None
    earlier: Spans | None = ()


@dataclass(frozen=True)
class Conversation:
    """One row whose prompt is still a list of messages: `finish` writes it."""

    messages: list[dict[str, str]]
    chosen: str | None
    rejected: str | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Form:
    """How rows become text.

    columns: {"prompt": its name in the data, ...}, for data whose columns have names of their own; also for "chosen"
    and "rejected".   template: for lists of messages; None: as Human/Assistant dialogue.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    template: ChatTemplate | None = None


PLAIN = Form()


class RowSkipped(Exception):
    """The row is well-formed but cannot be used; the text is the reason that is counted and reported."""


class RowRefused(Exception):
    """The row's content is wrong: (column, what was found and expected)."""


# ----------------------------------------------------------------------------------------------------------------------
# Text


def as_dialogue(question: str) -> str:
    """A bare question as a prompt."""
    return f"\n\nHuman: {question}{ASSISTANT}"


def as_answer(prompt: str, answer: str) -> str:
    """The answer as it follows `prompt`: a space after "Assistant:", nothing where the user's own template stands."""
    glued = prompt.endswith("Assistant:") and answer and not answer[0].isspace()
    return " " + answer if glued else answer


def pair(prompt: str, chosen: str | None, rejected: str | None = None, margin: float | None = None) -> Example:
    """An Example of a finished prompt and the two answers."""
    if chosen is not None:
        chosen = as_answer(prompt, chosen)
    if rejected is not None:
        rejected = as_answer(prompt, rejected)
    return Example(prompt, chosen, rejected, margin, earlier_answers(prompt))


def ask(question: str | None, chosen: str | None, rejected: str | None = None, margin: float | None = None) -> Example:
    """An Example of a bare question and its answers; rows of public sets without one are skipped."""
    if not question or not chosen:
        raise RowSkipped("no question or no answer")
    return pair(as_dialogue(question), chosen, rejected, margin)


def text(row: Row, column: str) -> str:
    """The string in `column`."""
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
    """The row as text."""
    if isinstance(converted, Example):
        return converted
    messages, answers = converted.messages, (converted.chosen, converted.rejected)
    if template is None:
        prompt, earlier = write_plain(messages)
        chosen, rejected = (None if answer is None else as_answer(prompt, answer) for answer in answers)
    else:
        try:
            prompt, earlier = template.prompt(messages)
            chosen, rejected = (
                None if answer is None else template.answer(messages, prompt, answer) for answer in answers
            )
        except TemplateRefuses as error:
            raise RowSkipped(f"that the chat template refuses ({str(error)[:100]})") from error
    return Example(prompt, chosen, rejected, converted.margin, earlier)


# ----------------------------------------------------------------------------------------------------------------------
# Shapes: functions of a row


def prompt_and_answers(row: Row, *, answer: str | None, bare: bool) -> Example | Conversation:
    """prompt with chosen/rejected, with a completion (column `answer`), or alone; text or lists of messages.

    Args:
        answer: the column of the good answer; None where there is none.
        bare: the prompts are plain questions, to be written as dialogue.
    """
    if row.get("label") is False:
        raise RowSkipped("label false: an unwanted answer")
    columns = [answer] if answer else []
    if answer == "chosen" and "rejected" in row:
        columns.append("rejected")
    if any(isinstance(row[column], list) for column in ("prompt", *columns)):
        return conversation(row, columns)
    prompt = text(row, "prompt")
    answers = [text(row, column) for column in columns]
    return pair(as_dialogue(prompt) if bare else prompt, *(answers or [None]), margin=margin(row))


def conversation(row: Row, columns: list[str]) -> Conversation:
    """Lists of {role, content}: a prompt and an answer each, or whole dialogues whose last message is the answer.

    Args:
        columns: of the answers: the good one, then the bad one, as far as there are any.
    """
    if row.get("tools"):
        raise RowRefused("tools", "tools are not supported; leave such rows out, or remove the column")
    asked: list[dict[str, str]] = []
    if row.get("prompt") is not None:
        is_list = isinstance(row["prompt"], list)
        asked = turns(row, "prompt") if is_list else [{"role": "user", "content": text(row, "prompt")}]
    answers: list[str] = []
    before: list[list[dict[str, str]]] = []
    for column in columns:
        if not isinstance(row[column], list):
            answers.append(text(row, column))
            before.append([])
            continue
        messages = turns(row, column)
        if messages[-1]["role"] != "assistant":
            raise RowRefused(column, "the last message must be the assistant's")
        answers.append(messages[-1]["content"])
        before.append(messages[:-1])
    if len(before) == 2 and before[0] != before[1]:
        raise RowSkipped("the two dialogues differ before their last turn")
    earlier = before[0] if before else []
    repeats_prompt = earlier[: len(asked)] == asked or (len(asked) == 1 and asked[0] in earlier)
    messages = earlier if repeats_prompt else asked + earlier
    if not messages or messages[-1]["role"] != "user":
        raise RowRefused("prompt" if asked else columns[0], "expected a user's message before the answer")
    return Conversation(messages, *(answers or [None]), margin=margin(row))


def dialogues(row: Row) -> Example | Conversation:
    """chosen and rejected hold the whole dialogue; what they share up to the last "Assistant:" is the prompt."""
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
    return pair(chosen[:end], chosen[end:], rejected[end:], margin(row))


def last_answer(row: Row) -> Conversation:
    """messages: one dialogue, whose last message is the answer."""
    if not isinstance(row["messages"], list):
        raise RowRefused("messages", 'expected a list like [{"role": "user", "content": "..."}, ...]')
    return conversation(row, ["messages"])


def plain_text(row: Row) -> Example:
    """text: a document without prompt and answer."""
    return Example(None, text(row, "text"), None)


def find_shape(columns: list[str]) -> tuple[str, Callable[..., Example | Conversation] | None]:
    """The name of the shape and the function from row to Example, or None when the columns fit no shape."""
    if {"prompt", "chosen", "rejected"} <= set(columns):
        return "prompt/chosen/rejected", partial(prompt_and_answers, answer="chosen")
    if {"chosen", "rejected"} <= set(columns):
        return "whole dialogues chosen/rejected", dialogues
    if "rejected" in columns:
        return "", None
    for answer in ("chosen", "completion"):
        if {"prompt", answer} <= set(columns):
            return f"prompt/{answer}", partial(prompt_and_answers, answer=answer)
    if "messages" in columns:
        return "messages", last_answer
    if "prompt" in columns:
        return "prompts", partial(prompt_and_answers, answer=None)
    if "text" in columns:
        return "plain text", plain_text
    return "", None


# ----------------------------------------------------------------------------------------------------------------------
# Data sets known by name: functions of a row


def rm_static(row: Row) -> Example:
    return pair(text(row, "prompt"), text(row, "chosen"), text(row, "rejected"), margin(row))


def synthetic_instruct(row: Row) -> Example:
    return ask(row["prompt"], row["chosen"], row["rejected"])


def rlhf_reward_datasets(row: Row) -> Example:
    # The prompt stops before "Assistant:"; the answers may repeat the dialogue.
    prompt = text(row, "prompt").removesuffix("Assistant:") + "Assistant:"
    chosen, rejected = (text(row, column).split("Assistant:")[-1] for column in ("chosen", "rejected"))
    return pair(prompt, chosen, rejected)


def webgpt(row: Row) -> Example:
    scored = [(float(row["score_0"]), row["answer_0"]), (float(row["score_1"]), row["answer_1"])]
    # Without the passages they cite, marks such as " [1, 2]" mean nothing.
    (worse, rejected), (better, chosen) = sorted(
        ((score, re.sub(r" ?\[[^\]]*\]", "", answer)) for score, answer in scored), key=lambda pair: pair[0]
    )
    return ask(row["question"]["full_text"], chosen, rejected if better > worse else None, better - worse)


def shp(row: Row) -> Example:
    a, b = row["human_ref_A"], row["human_ref_B"]
    return ask(row["history"], *((a, b) if int(row["labels"]) == 1 else (b, a)))


def sharegpt_vicuna(row: Row) -> Example:
    if not row["prompt"] or not row["label"]:
        raise RowSkipped("no question or no answer")
    return pair(row["prompt"].replace("USER", "Human").replace("ASSISTANT", "Assistant"), row["label"])


def zhihu(row: Row) -> Example:
    return ask(row["INSTRUCTION"], row["RESPONSE"])


def miracl(row: Row) -> Example:
    passages = (row["positive_passages"], row["negative_passages"])
    return ask(row["query"], *(found[0]["text"] if found else None for found in passages))


def hc3(row: Row) -> Example:
    return ask(row["question"], next(iter(row["human_answers"] or []), None))


def mkqa(row: Row, *, language: str) -> Example:
    answers = row["answers"][language]
    return ask(row["queries"][language], answers[0]["text"] if answers else None)


def qg_jaquad(row: Row) -> Example:
    return ask(row["question"], row["sentence"])


def qag_jaquad(row: Row) -> Example:
    return ask(next(iter(row["questions"] or []), None), row["paragraph"])


def ultrafeedback(row: Row) -> Conversation:
    return replace(conversation(row, ["chosen", "rejected"]), margin=row["score_chosen"] - row["score_rejected"])


ADAPTERS: dict[str, Callable[[Row], Example | Conversation]] = {
    "Dahoas/rm-static": rm_static,
    "Dahoas/full-hh-rlhf": rm_static,
    "Dahoas/synthetic-instruct-gptj-pairwise": synthetic_instruct,
    "yitingxie/rlhf-reward-datasets": rlhf_reward_datasets,
    "openai/webgpt_comparisons": webgpt,
    "stanfordnlp/SHP": shp,
    "pvduy/sharegpt_alpaca_oa_vicuna_format": sharegpt_vicuna,
    "local/jsonfile": rm_static,
    "wangrui6/Zhihu-KOL": zhihu,
    "Cohere/miracl-zh-queries-22-12": miracl,
    "Cohere/miracl-ja-queries-22-12": miracl,
    "Hello-SimpleAI/HC3-Chinese": hc3,
    "mkqa-Chinese": partial(mkqa, language="zh_cn"),
    "mkqa-Japanese": partial(mkqa, language="ja"),
    "lmqg/qg_jaquad": qg_jaquad,
    "lmqg/qag_jaquad": qag_jaquad,
    "Anthropic/hh-rlhf": dialogues,
    "HuggingFaceH4/ultrafeedback_binarized": ultrafeedback,
}


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def load_preferences(
    data_path: list[str], *, cache_dir: str | None, form: Form = PLAIN, announce: bool = True
) -> tuple[Dataset, Dataset]:
    """All data sets of `--data_path`, one after the other: (train, eval) with columns prompt, chosen, rejected, margin
    and those of ABOUT.

    `chosen`, `rejected` and `margin` are None where a data set has none. Weights are left aside.

    Raises:
        UserError: a data set cannot be read; see `load_data_set`.
    """
    loaded = [load_data_set(name, cache_dir=cache_dir, form=form, announce=announce) for name in data_path]
    return tuple(datasets.concatenate_datasets(list(parts)) for parts in zip(*loaded, strict=True))


def load_data_set(
    name: str,
    *,
    cache_dir: str | None,
    num_proc: int | None = None,
    flag: str = "--data_path",
    announce: bool = True,
    form: Form = PLAIN,
    record: list[dict] | None = None,
) -> tuple[Dataset, Dataset]:
    """One data set as (train, eval), from a file, a folder or the hub; columns prompt, chosen, rejected, margin and
    those of ABOUT.

    eval is the data set's own test split. A data set without one gives up a seeded 5 % of its rows (at least one),
    where possible whole prompts, so that no held-out prompt is trained on with another answer.

    Args, raises: as `load_splits`.
    """
    options = {"num_proc": num_proc, "flag": flag, "announce": announce, "form": form, "record": record}
    shape, splits = load_splits(name, cache_dir=cache_dir, **options)
    train, evaluation = (splits["train"], splits["test"]) if "test" in splits else hold_out(splits["train"], name, flag)
    if announce:
        print0(f"{flag} {name}: {shape}; {len(train)} rows to train and {len(evaluation)} to evaluate")
    return train, evaluation


def load_splits(
    name: str,
    *,
    cache_dir: str | None,
    num_proc: int | None = None,
    flag: str = "--data_path",
    announce: bool = True,
    form: Form = PLAIN,
    record: list[dict] | None = None,
) -> tuple[str, dict[str, Dataset]]:
    """The shape of a data set, and its rows as they stand: {"train": rows} and, where there is one, {"test": rows}.

    Args:
        name: a file, a folder or a hub name, see `utils.data.names.parse_name`.
        cache_dir: where the Arrow files go; None: the datasets library's own folder.
        num_proc: processes that convert rows; None: this one.
        flag: the flag that errors name.
        announce: print what was found and dropped; False where the same data set was announced before.
        record: gets an entry for each split: how many rows were read and dropped.

    Raises:
        UserError: nothing there, an unreadable file, columns of no known shape, a wrong value, a split without rows.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    cache_folder(cache_dir)  # a cache that cannot be written is refused before anything is read
    parts_of = read_splits(name, cache_dir, flag)
    splits = {}
    try:
        parts_of = {split: [rename(part, form.columns, flag) for part in parts] for split, parts in parts_of.items()}
        shape, convert, form = choose_conversion(name, parts_of["train"][0], flag, form)
        for split, parts in parts_of.items():
            named = [replace(part, label=f"{part.file.name} " if len(parts) > 1 else "") for part in parts]
            normalised = [normalise(part, convert, shape, cache_dir, num_proc, flag, form) for part in named]
            joined = datasets.concatenate_datasets(normalised)
            splits[split] = drop_skipped(joined, name, split, flag, announce, shape, record)
    except UnicodeDecodeError as error:  # Arrow keeps such bytes, and trips over them when they become text
        raise UserError(f"{flag}: {undecodable(parts_of, name)}") from error
    return shape, splits


def rename(part: Part, columns: Mapping[str, str], flag: str) -> Part:
    """The part with the user's columns under the names that shapes are made of."""
    rows = part.rows
    for ours, theirs in columns.items():
        if theirs not in rows.column_names:
            found = ", ".join(rows.column_names)
            raise UserError(f"--{ours}_column {theirs}: {part.place} ({flag}) has no such column; it has {found}")
    taken = [ours for ours in columns if ours in rows.column_names and ours not in columns.values()]
    rows = rows.remove_columns(taken).rename_columns({theirs: ours for ours, theirs in columns.items()})
    return replace(part, rows=rows)


def choose_conversion(
    name: str, part: Part, flag: str, form: Form
) -> tuple[str, Callable[[Row], Example | Conversation], Form]:
    """The shape of a data set in words, the function from row to Example, and the form that its rows need.

    All are found from its first file.
    """
    lists = ("prompt", "chosen", "rejected", "completion", "messages")
    of_messages = any(isinstance(part.rows.features.get(column), List) for column in lists)
    if not of_messages:
        form = replace(form, template=None)
    how = f", written by the {'chat template' if form.template else 'Human/Assistant convention'}"
    known = None if form.columns else known_name(parse_name(name, flag).name)
    if known and (parse_name(name, flag).name == known or fits(ADAPTERS[known], part.rows[0])):
        return known + (how if of_messages else ""), ADAPTERS[known], form
    shape, convert = find_shape(part.rows.column_names)
    if convert is None:
        found = ", ".join(part.rows.column_names)
        raise UserError(
            f"{flag}: {part.place} has the columns {found}; expected {SHAPES}: rename the columns, or name them with "
            "--prompt_column, --chosen_column and --rejected_column"
        )
    if of_messages:
        shape += " of messages" if shape != "messages" else ""
    if shape.startswith("prompt"):
        bare = prompts_are_bare(part.rows)
        convert = partial(convert, bare=bare)
        shape += ", bare prompts written as Human/Assistant dialogue" if bare else ""
    return shape + (how if of_messages else ""), convert, form


def fits(adapter: Callable[[Row], Example], row: Row) -> bool:
    """Whether a folder that is called like a known data set has its columns too."""
    try:
        adapter(row)
    except RowSkipped:
        return True
    except (KeyError, RowRefused):
        return False
    return True


def known_name(name: str) -> str | None:
    """The data set of ADAPTERS that `name` means: the name itself, or a folder called like it."""
    path = Path(name)
    if name in ADAPTERS:
        return name
    if not path.is_dir():
        return None
    ends = {"/".join(path.resolve().parts[-2:]), path.resolve().name}
    return next((known for known in ADAPTERS if known in ends or known.split("/")[-1] in ends), None)


def prompts_are_bare(rows: Dataset, look_at: int = 1000) -> bool:
    """Whether text prompts are plain questions.

    A template leaves its mark at the end of every prompt ("Assistant:", "### Response:", "[/INST]"); questions do not
    end alike.
    """
    prompts = [value for value in rows[: min(look_at, len(rows))]["prompt"] if isinstance(value, str)]
    written = sum(prompt.rstrip().endswith("Assistant:") for prompt in prompts)
    if not prompts or 2 * written >= len(prompts):
        return False
    cue = os.path.commonprefix([prompt[::-1] for prompt in prompts])[::-1].rstrip(" ")
    return len(prompts) == 1 or len(cue) < 2 or cue[-1] not in ":]>|\n"


def normalise(
    part: Part,
    convert: Callable[..., Example | Conversation],
    shape: str,
    cache_dir: str | None,
    num_proc: int | None,
    flag: str,
    form: Form = PLAIN,
) -> Dataset:
    """The part's rows with the columns of NORMALISED; cached."""
    written = form.template.state() if form.template else None
    fingerprint = fingerprint_of(part.rows._fingerprint, code_of("preferences", "chat"), shape, written, part.label)
    return part.rows.map(
        partial(normalise_batch, convert=convert, part=replace(part, rows=None), flag=flag, form=form),
        batched=True,
        with_indices=True,
        remove_columns=part.rows.column_names,
        features=NORMALISED,
        num_proc=num_proc if num_proc and len(part.rows) > 10_000 else None,
        new_fingerprint=fingerprint,
        cache_file_name=cache_file(cache_dir, "rows", fingerprint),
        desc="Reading rows",
    )


def normalise_batch(
    batch: dict[str, list],
    indices: list[int],
    *,
    convert: Callable[[Row], Example | Conversation],
    part: Part,
    flag: str,
    form: Form = PLAIN,
) -> dict[str, list]:
    """Rows of any shape -> columns of NORMALISED.

    Args:
        part: where the rows are from; its own rows are not read.
    """
    columns: dict[str, list] = {name: [] for name in NORMALISED}
    for i, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
        reason = None
        try:
            example = finish(convert(dict(zip(batch.keys(), values, strict=True))), form.template)
        except RowSkipped as skipped:
            example, reason = Example("", None, None), str(skipped)
        except RowRefused as refused:
            column, problem = refused.args
            where = converted_on_reading(part.file, i, column)
            where = where or f"{row_name(part.file, i)}, column {column!r}: {problem}"
            raise UserError(f"{flag}: {part.place}, {where}") from None
        except KeyError as missing:
            found = ", ".join(batch)
            raise UserError(f"{flag}: {part.place} has no column {missing}; it has {found}") from None
        for name in TEXT:
            columns[name].append(getattr(example, name))
        columns["earlier"].append(None if example.earlier is None else [list(span) for span in example.earlier])
        columns["key"].append(content_key(example.prompt, example.chosen, example.rejected))
        columns["skipped"].append(reason)
    columns["origin"] = [part.label + row_name(part.file, i) for i in indices]
    return columns


def content_key(*texts: str | None) -> int:
    """A number that only equal texts share."""
    digest = hashlib.blake2b(digest_size=8)
    for value in texts:
        digest.update(b"-" if value is None else b"+" + value.encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return int.from_bytes(digest.digest(), "little", signed=True)


def drop_skipped(
    rows: Dataset, name: str, split: str, flag: str, announce: bool, shape: str, record: list[dict] | None = None
) -> Dataset:
    """Leaves out the rows that carry a reason and those that repeat an earlier one, and reports them."""
    table = rows.with_format("arrow")
    reasons = table["skipped"][:].to_pylist()
    keys = np.asarray(table["key"][:])
    _, first = np.unique(keys, return_index=True)
    repeated = np.ones(len(rows), dtype=bool)
    repeated[first] = False
    for i in np.flatnonzero(repeated):
        reasons[i] = reasons[i] or "that repeat an earlier row"
    kept = np.flatnonzero([reason is None for reason in reasons])
    dropped = tally(reasons, rows)
    if announce:
        report_dropped(f"{flag} {name} ({split})", dropped, len(rows))
    if record is not None:
        read = {
            "data": f"{flag} {name}",
            "split": split,
            "shape": shape,
            "fingerprint": fingerprint_of(keys[kept].tobytes()),
        }
        record.append({**read, "rows": len(rows), "kept": len(kept), "dropped": as_record(dropped)})
    if not len(kept):
        raise UserError(f"{flag}: the {split} split of {name} has no usable row: {as_words(dropped)}")
    if len(kept) < len(rows):
        rows = rows.select(kept)
    return rows.remove_columns(["key", "skipped"])


def tally(reasons: Iterable[str | None], rows: Dataset) -> Dropped:
    """The rows that have a reason, by reason, with the names of the first few where `rows` know their origin."""
    found: dict[str, list[int]] = {}
    for i, reason in enumerate(reasons):
        if reason is not None:
            found.setdefault(reason, []).append(i)
    named = "origin" in rows.column_names
    return {
        reason: (len(found[reason]), rows[found[reason][:SHOWN_ROWS]]["origin"] if named else [])
        for reason in sorted(found)
    }


def as_record(dropped: Dropped) -> dict[str, dict]:
    """For data.json."""
    return {reason: {"rows": count, "first": names} for reason, (count, names) in dropped.items()}


def as_words(dropped: Dropped) -> str:
    """For people: "2 with equal answers (line 3, line 8); 1 with an empty prompt (line 5)"."""
    return "; ".join(f"{count} {reason}{listing(count, names)}" for reason, (count, names) in dropped.items())


def listing(count: int, names: list[str]) -> str:
    """ " (line 3, line 8, ...)", or nothing without names."""
    return f" ({', '.join(names)}{', ...' if count > len(names) else ''})" if names else ""


def report_dropped(what: str, dropped: Dropped, total: int) -> None:
    """One line for all dropped rows; none where nothing was dropped."""
    if dropped:
        print0(f"{what}: {sum(count for count, _ in dropped.values())} of {total} rows dropped: {as_words(dropped)}")


def hold_out(rows: Dataset, name: str, flag: str) -> tuple[Dataset, Dataset]:
    """(train, eval): a seeded 5 % of the rows, at least one, is held out; by whole prompts where that is possible."""
    n = len(rows)
    if n < 2:
        raise UserError(f"{flag}: {name} has one row; expected at least two, since one is held out for evaluation")
    target = max(1, round(HOLD_OUT * n))
    groups: dict[int, list[int]] = {}
    for start in range(0, n, 1000):
        batch = rows[start : start + 1000]
        for i, (prompt, chosen) in enumerate(zip(batch["prompt"], batch["chosen"], strict=True), start):
            groups.setdefault(content_key(chosen if prompt is None else prompt), []).append(i)
    order = np.random.RandomState(HOLD_OUT_SEED)  # its stream is the same in every numpy version
    held: list[int] = []
    prompts = list(groups.values())
    for k in order.permutation(len(prompts)):
        if len(held) + len(prompts[k]) <= target:
            held += prompts[k]
    if not held:  # every prompt has more than 5 % of the rows
        held = order.permutation(n)[:target].tolist()
    mask = np.zeros(n, dtype=bool)
    mask[held] = True
    return rows.select(np.flatnonzero(~mask)), rows.select(np.flatnonzero(mask))


def fingerprint_of(*parts: object) -> str:
    """A short name for content: equal in every process and on every rank."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def code_of(*modules: str) -> bytes:
    """The source text of modules of this package: results that they made are not read again once they change."""
    return b"".join(Path(__file__).with_name(f"{module}.py").read_bytes() for module in modules)


def cache_folder(cache_dir: str | None) -> Path:
    """The folder of the converted tables.

    Raises:
        UserError: it cannot be made or written.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "converted"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else "no permission"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise UserError(f"--data_output_path: cannot write to {folder} ({reason}); choose another folder")
    return folder


def cache_file(cache_dir: str | None, kind: str, fingerprint: str) -> str:
    """Where the datasets library keeps a converted table."""
    return str(cache_folder(cache_dir) / f"{kind}-{fingerprint}.arrow")
