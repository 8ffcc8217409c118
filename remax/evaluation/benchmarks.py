"""Questions of public benchmarks as their projects ship them, and the files of answers that their judges read.

- AlpacaEval: a JSON list of {instruction, output, generator};
- MT-bench (FastChat): a line for each question of two turns, {question_id, answer_id, model_id, choices, tstamp};
- Arena-Hard (version 2): a line for each question, {uid, ans_id, model, messages, tstamp, metadata}.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remax.evaluation.answers import Answer
from utils.data.sources import json_objects
from utils.files import write_rows, write_whole
from utils.run import UserError

Row = dict[str, Any]
# MT-bench asks each category at its own temperature; 0 is greedy. Categories of one's own get the last.
MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_CATEGORIES = 0.7


@dataclass(frozen=True)
class Question:
    """What a model is asked: the user's turns, one after the other.

    Attributes:
        row: As the benchmark ships it.
        temperature: Of the benchmark; 0: greedy.
        prompt: The first turn as a whole prompt, where that is written already.
    """

    turns: tuple[str, ...]
    row: Row
    temperature: float = 0.0
    prompt: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark's questions are read, and its answers written.

    Attributes:
        suffix: Of the file of answers; its reader goes by that.
        expected: What errors say a row of questions should be.
        question: A row -> what is asked; KeyError or TypeError: it is none.
        record: A question and the answer to each turn, with the model's name -> what the file holds for it.
        next_step: What judges the file.
    """

    suffix: str
    expected: str
    question: Callable[[Row], Question]
    record: Callable[[Question, Sequence[Answer], str], Row]
    next_step: str

    def write(self, path: Path, records: Sequence[Row]) -> None:
        """The whole file at once: a list, or one object a line."""
        if self.suffix == ".json":
            write_whole(path, json.dumps(list(records), ensure_ascii=False, indent=2) + "\n")
        else:
            write_rows(path, records)


def read_questions(benchmark: Benchmark, file: str, flag: str) -> list[Question]:
    """The questions of a file.

    Raises:
        UserError: No such file, no JSON, or a row that is no question of this benchmark.
    """
    questions = []
    for place, row in json_objects(file, flag, benchmark.expected):
        try:
            questions.append(benchmark.question(row))
        except (KeyError, TypeError, AttributeError) as error:
            missing = f"has no {error}" if isinstance(error, KeyError) else f"is not understood ({error})"
            raise UserError(f"{flag} {file}: {place} {missing}; expected {benchmark.expected}") from None
    if not questions:
        raise UserError(f"{flag} {file}: holds no question; expected {benchmark.expected}")
    return questions


def _text(row: Row, column: str) -> str:
    if not isinstance(row[column], str):
        raise TypeError(f"{column} is {type(row[column]).__name__}, not text")
    return row[column]


def _alpaca_question(row: Row) -> Question:
    instruction = _text(row, "instruction")
    if row.get("input"):
        instruction += "\n\n" + _text(row, "input")
    return Question((instruction,), row)


def _alpaca_record(question: Question, answers: Sequence[Answer], model: str) -> Row:
    return question.row | {"output": answers[0].text, "generator": model}


def _mt_bench_question(row: Row) -> Question:
    row["question_id"]
    turns = row["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise TypeError("turns is no list of texts")
    return Question(tuple(turns), row, MT_BENCH_TEMPERATURES.get(row.get("category", ""), OTHER_CATEGORIES))


def _mt_bench_record(question: Question, answers: Sequence[Answer], model: str) -> Row:
    number = question.row["question_id"]
    return {
        "question_id": number,
        "answer_id": _id(model, number),
        "model_id": model,
        "choices": [{"index": 0, "turns": [answer.text for answer in answers]}],
        "tstamp": time.time(),
    }


def _arena_question(row: Row) -> Question:
    row["uid"]
    return Question((_text(row, "prompt"),), row)


def _arena_record(question: Question, answers: Sequence[Answer], model: str) -> Row:
    (answer,) = answers
    return {
        "uid": question.row["uid"],
        "ans_id": _id(model, question.row["uid"]),
        "model": model,
        "messages": [
            {"role": "user", "content": question.turns[0]},
            {"role": "assistant", "content": {"answer": answer.text}},
        ],
        "tstamp": time.time(),
        "metadata": {"token_len": answer.tokens - answer.ended, **markdown_counts(answer.text)},
    }


def _id(model: str, question: Any) -> str:
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{model} {question}").hex


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """What Arena-Hard controls for as style: headers by level, items of lists, bold texts; outside of code blocks."""
    text = re.sub(r"```[^`]*```", "``````", text)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, flags=re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


BENCHMARKS = {
    "alpaca_eval": Benchmark(
        ".json",
        "rows with an instruction, as of alpaca_eval.json",
        _alpaca_question,
        _alpaca_record,
        "alpaca_eval --model_outputs {output}",
    ),
    "mt_bench": Benchmark(
        ".jsonl",
        "rows with question_id, category and turns, as of MT-bench's question.jsonl",
        _mt_bench_question,
        _mt_bench_record,
        "FastChat's gen_judgment.py, with the file in data/mt_bench/model_answer",
    ),
    "arena_hard": Benchmark(
        ".jsonl",
        "rows with uid and prompt, as of Arena-Hard 2's question.jsonl",
        _arena_question,
        _arena_record,
        "Arena-Hard's gen_judgment.py, with the file in data/arena-hard-v2.0/model_answer",
    ),
}
