"""Files of questions and answers, against the schemas of AlpacaEval, FastChat and Arena-Hard."""

import json

import pytest

from remax.evaluation.answers import Answer
from remax.evaluation.benchmarks import BENCHMARKS, markdown_counts, read_questions
from utils.run import UserError


def read(tmp_path, name: str, rows: list | str):
    file = tmp_path / "questions.jsonl"
    file.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return read_questions(BENCHMARKS[name], str(file), "--questions")


def write(tmp_path, name: str, questions, answers) -> str:
    benchmark, file = BENCHMARKS[name], tmp_path / "answers"
    benchmark.write(file, [benchmark.record(q, found, "mine") for q, found in zip(questions, answers, strict=True)])
    return file.read_text(encoding="utf-8")


def test_alpaca_eval(tmp_path):
    rows = [
        {"instruction": "Name a bird.", "output": "An owl.", "generator": "base", "dataset": "helpful_base"},
        {"instruction": "Sum it up.", "input": "Long text."},
    ]
    questions = read(tmp_path, "alpaca_eval", json.dumps(rows))  # a list, as alpaca_eval.json is
    assert [question.turns for question in questions] == [("Name a bird.",), ("Sum it up.\n\nLong text.",)]
    written = write(tmp_path, "alpaca_eval", questions, [[Answer("A jay.", 3, True)], [Answer("é", 2, True)]])
    assert json.loads(written) == [
        {"instruction": "Name a bird.", "output": "A jay.", "generator": "mine", "dataset": "helpful_base"},
        {"instruction": "Sum it up.", "input": "Long text.", "output": "é", "generator": "mine"},
    ]


def test_mt_bench(tmp_path):
    categories = ["writing", "math", "stem", "of my own"]
    questions = read(
        tmp_path,
        "mt_bench",
        [{"question_id": 81 + i, "category": c, "turns": ["One?", "Two?"]} for i, c in enumerate(categories)],
    )
    assert [question.temperature for question in questions] == [0.7, 0.0, 0.1, 0.7]
    answers = [[Answer(f"{i}a", 1, True), Answer(f"{i}b", 1, True)] for i in range(4)]
    lines = [json.loads(line) for line in write(tmp_path, "mt_bench", questions, answers).splitlines()]
    assert [line["question_id"] for line in lines] == [81, 82, 83, 84]
    assert lines[1]["choices"] == [{"index": 0, "turns": ["1a", "1b"]}]
    assert all(set(line) == {"question_id", "answer_id", "model_id", "choices", "tstamp"} for line in lines)
    assert all(line["model_id"] == "mine" and isinstance(line["tstamp"], float) for line in lines)
    assert len({line["answer_id"] for line in lines}) == 4


def test_arena_hard(tmp_path):
    row = {"uid": "x1", "category": "hard_prompt", "subcategory": "coding", "prompt": "Sort a list."}
    text = "# Sort\n\n1. Call `sorted`.\n- or **list.sort**\n```\n# no header\n```"
    (line,) = write(
        tmp_path, "arena_hard", read(tmp_path, "arena_hard", [row]), [[Answer(text, 31, True)]]
    ).splitlines()
    found = json.loads(line)
    assert set(found) == {"uid", "ans_id", "model", "messages", "tstamp", "metadata"}
    assert (found["uid"], found["model"]) == ("x1", "mine")
    assert found["messages"][0] == {"role": "user", "content": "Sort a list."}
    assert found["messages"][-1]["content"]["answer"] == text
    headers = {f"h{k}": int(k == 1) for k in range(1, 7)}
    assert found["metadata"] == {
        "token_len": 30,  # without the end token
        "header_count": headers,
        "list_count": {"ordered": 1, "unordered": 1},
        "bold_count": {"**": 1, "__": 0},
    }
    assert markdown_counts("__a__ b __c__")["bold_count"] == {"**": 0, "__": 2}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("alpaca_eval", [{"prompt": "Why?"}], "line 1 has no 'instruction'; expected rows with an instruction"),
        ("alpaca_eval", [{"instruction": 3}], "line 1 is not understood .instruction is int, not text.; expected rows"),
        ("mt_bench", [{"question_id": 1, "turns": "One?"}], "line 1 is not understood .turns is no list of texts.;"),
        ("mt_bench", [{"turns": ["One?"]}], "line 1 has no 'question_id'"),
        ("arena_hard", [{"question_id": 1, "turns": ["One?"]}], "line 1 has no 'uid'"),
        ("arena_hard", "[]", "holds no question"),
        ("arena_hard", '["Why?"]', "row 1 is no object; expected rows with uid and prompt"),
        ("arena_hard", '{"uid": 1,', "line 1: not valid JSON"),
    ],
)
def test_rows_that_are_no_questions_are_refused(tmp_path, name, rows, message):
    with pytest.raises(UserError, match=f"--questions .*questions.jsonl: {message}"):
        read(tmp_path, name, rows)


def test_alpaca_eval_reads_the_file(tmp_path):
    # pip install -c constraints.txt alpaca_eval
    reader = pytest.importorskip("alpaca_eval.utils", reason="alpaca_eval is not installed")
    questions = read(tmp_path, "alpaca_eval", [{"instruction": "Why?"}, {"instruction": "How?"}])
    text = write(tmp_path, "alpaca_eval", questions, [[Answer("So.", 2, True)], [Answer("Thus.", 2, True)]])
    (tmp_path / "mine.json").write_text(text)
    frame = reader.load_or_convert_to_dataframe(tmp_path / "mine.json")
    assert frame["output"].tolist() == ["So.", "Thus."] and frame["instruction"].tolist() == ["Why?", "How?"]
    assert reader.get_generator_name(None, frame) == "mine"


def test_fastchat_reads_the_file(tmp_path):
    # pip install -c constraints.txt fschat openai anthropic
    reader = pytest.importorskip("fastchat.llm_judge.common", reason="fschat is not installed", exc_type=ImportError)
    row = {"question_id": 81, "category": "writing", "turns": ["One?", "Two?"]}
    questions = read(tmp_path, "mt_bench", [row])
    (tmp_path / "model_answer").mkdir()
    text = write(tmp_path, "mt_bench", questions, [[Answer("1", 1, True), Answer("2", 1, True)]])
    (tmp_path / "model_answer" / "mine.jsonl").write_text(text)
    answers = reader.load_model_answers(str(tmp_path / "model_answer"))
    judge = reader.Judge("a judge", {})
    reader.check_data([row], answers, {}, ["mine"], {"default": judge, "math": judge})
    assert answers["mine"][81]["choices"][0]["turns"] == ["1", "2"]
