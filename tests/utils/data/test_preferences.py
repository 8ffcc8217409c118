import gzip
import json
import re
import shutil
import socket
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

from utils.data.preferences import load_data_set
from utils.data.shapes import Form
from utils.data.streamed_set import open_stream
from utils.run import UserError

ROOT = Path(__file__).resolve().parents[3]
REAL = ROOT.parent / "shared" / "data"
PAIRS = [
    {"prompt": f"\n\nHuman: What is {i}?\n\nAssistant:", "chosen": f" It is {i}.", "rejected": " No.", "margin": i / 2}
    for i in range(20)
]
TEXTS = ("prompt", "chosen", "rejected", "margin")


def messages(*turns: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[k % 2], "content": turn} for k, turn in enumerate(turns)]


def as_shape(row: dict, shape: str) -> dict:
    """A row of PAIRS in another shape."""
    question = row["prompt"].removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")
    chosen, rejected = row["chosen"].strip(), row["rejected"].strip()
    return {
        "pairs": row,
        "bare": {"prompt": question, "chosen": chosen, "rejected": rejected, "margin": row["margin"]},
        "dialogues": {**{k: row["prompt"] + row[k] for k in ("chosen", "rejected")}, "margin": row["margin"]},
        "messages": {
            "prompt": messages(question),
            "chosen": messages("", chosen)[1:],
            "rejected": messages("", rejected)[1:],
            "margin": row["margin"],
        },
        "whole": {
            "chosen": messages(question, chosen),
            "rejected": messages(question, rejected),
            "margin": row["margin"],
        },
        "question and whole": {
            "prompt": question,
            "chosen": messages(question, chosen),
            "rejected": messages(question, rejected),
            "margin": row["margin"],
        },
    }[shape]


def write(path: Path, rows: list[dict] | str | bytes) -> Path:
    """Rows, or raw content, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if isinstance(rows, list) and plain.suffix == ".jsonl":
        rows = "".join(json.dumps(row) + "\n" for row in rows)
    elif isinstance(rows, list) and plain.suffix == ".json":
        rows = json.dumps(rows, indent=1)
    elif isinstance(rows, list) and plain.suffix == ".arrow":
        datasets.Dataset.from_list(rows).save_to_disk(path.parent / "saved")
        rows = next((path.parent / "saved").glob("*.arrow")).read_bytes()
        shutil.rmtree(path.parent / "saved")
    elif isinstance(rows, list):
        getattr(datasets.Dataset.from_list(rows), f"to_{plain.suffix[1:]}")(plain)
        rows = plain.read_bytes()
        plain.unlink()
    content = rows.encode() if isinstance(rows, str) else rows
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def load(path, tmp_path) -> tuple[list[dict], list[dict]]:
    train, evaluation = load_data_set(str(path), cache_dir=str(tmp_path / "cache"))
    assert train.column_names == evaluation.column_names == [*TEXTS, "answers", "ranks", "earlier", "origin"]
    return texts(train), texts(evaluation)


def texts(rows: datasets.Dataset) -> list[dict]:
    return rows.select_columns(list(TEXTS)).to_list()


def refused(path, tmp_path) -> str:
    with pytest.raises(UserError) as error:
        load(path, tmp_path)
    message = str(error.value)
    assert "\n" not in message and message.startswith("--data_path")
    return message


# ------------------------------------------------------------------------------------------------- files and folders


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet", "a.arrow", "a[1] *.jsonl"],
)
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    train, evaluation = load(write(tmp_path / name, PAIRS), tmp_path)
    assert len(evaluation) == 1 and len(train) == 19  # 5 % of 20
    assert sorted(train + evaluation, key=lambda row: row["margin"]) == PAIRS


def test_hold_out_is_seeded_and_takes_whole_prompts(tmp_path):
    rows = [{**PAIRS[i // 4], "chosen": f" answer {i}"} for i in range(80)]  # 4 rows a prompt
    path = write(tmp_path / "a.jsonl", rows)
    train, evaluation = load(path, tmp_path)
    assert len(evaluation) == 4 and len({row["prompt"] for row in evaluation}) == 1  # round(.05 * 80)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in evaluation}
    assert load(path, tmp_path / "again") == (train, evaluation)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_hold_out_is_at_least_one_row(tmp_path, n):
    train, evaluation = load(write(tmp_path / "a.jsonl", PAIRS[:n]), tmp_path)
    assert (len(train), len(evaluation)) == (n - 1, 1)


def test_hold_out_takes_rows_where_every_prompt_is_large(tmp_path):
    rows = [{**PAIRS[0], "chosen": f" answer {i}"} for i in range(40)]
    train, evaluation = load(write(tmp_path / "a.jsonl", rows), tmp_path)
    assert (len(train), len(evaluation)) == (38, 2)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("train.jsonl.gz", "eval.json"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("data/train_prefs-00000-of-00001.parquet", "data/test_prefs-00000-of-00001.parquet"),
        ("my.train.csv", "my_validation.csv"),
        ("helpful/train.jsonl.gz", "helpful/test.jsonl.gz"),
        ("train/0000.parquet", "dev/0000.parquet"),
    ],
)
def test_folders_with_a_file_a_split(tmp_path, train, test):
    folder = tmp_path / "data set"
    write(folder / train, PAIRS[:15])
    write(folder / test, PAIRS[15:])
    assert load(folder, tmp_path) == (PAIRS[:15], PAIRS[15:])


def test_files_of_one_split_are_joined_and_other_splits_left(tmp_path):
    folder = tmp_path / "set"
    for i in range(3):
        write(folder / f"data/train_prefs-0000{i}-of-00003.parquet", PAIRS[5 * i : 5 * i + 5])
    write(folder / "data/train_sft-00000-of-00001.parquet", PAIRS)
    write(folder / "data/test_prefs-00000-of-00001.parquet", PAIRS[15:])
    write(folder / "README.md", "not data")
    assert load(folder, tmp_path) == (PAIRS[:15], PAIRS[15:])


@pytest.mark.parametrize("both", [True, False])
def test_saved_data_sets(tmp_path, both):
    train = datasets.Dataset.from_list(PAIRS[:15])
    test = datasets.Dataset.from_list(PAIRS[15:])
    saved = datasets.DatasetDict(train=train, validation=test) if both else train
    saved.save_to_disk(tmp_path / "saved")
    before = sorted((tmp_path / "saved").rglob("*"))
    loaded = load(tmp_path / "saved", tmp_path)
    assert loaded == (PAIRS[:15], PAIRS[15:]) if both else (len(loaded[0]), len(loaded[1])) == (14, 1)
    assert sorted((tmp_path / "saved").rglob("*")) == before  # nothing is written beside the user's data


def test_local_jsonfile_is_data_train_json_and_eval_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "expected train.json and eval.json in" in refused("local/jsonfile", tmp_path)
    write(tmp_path / "data/train.json", PAIRS[:15])
    write(tmp_path / "data/eval.json", PAIRS[15:])
    assert load("local/jsonfile", tmp_path) == (PAIRS[:15], PAIRS[15:])


def test_several_data_sets_follow_one_another(tmp_path):
    names = []
    for k, shape in enumerate(("pairs", "messages")):
        rows = [as_shape(row, shape) for row in PAIRS]
        write(tmp_path / f"{k}/train.jsonl", rows[:15])
        write(tmp_path / f"{k}/test.jsonl", rows[15:])
        names.append(str(tmp_path / str(k)))
    splits = zip(*(load_data_set(name, cache_dir=str(tmp_path / "cache")) for name in names), strict=True)
    train, evaluation = (datasets.concatenate_datasets(list(parts)) for parts in splits)
    assert texts(train) == PAIRS[:15] * 2 and texts(evaluation) == PAIRS[15:] * 2


def test_the_cache_is_used_and_follows_the_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl.gz", PAIRS)
    first = load(path, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("utils.data.preferences.normalise_batch", lambda *_, **__: pytest.fail("mapped again"))
        assert load(path, tmp_path) == first
    write(path, [{**row, "chosen": " changed"} for row in PAIRS])
    assert {row["chosen"] for part in load(path, tmp_path) for row in part} == {" changed"}


def test_a_split_and_a_configuration_can_be_chosen(tmp_path):
    folder = tmp_path / "set"
    write(folder / "one/data/train_sft-00000-of-00001.parquet", PAIRS[:6])
    write(folder / "one/data/test_sft-00000-of-00001.parquet", PAIRS[6:8])
    write(folder / "one/data/train_gen-00000-of-00001.parquet", PAIRS[8:12])
    write(folder / "one/data/test-00000-of-00001.parquet", PAIRS[12:14])
    write(folder / "two/train.jsonl", PAIRS[14:])
    assert load(f"{folder}#one/train_sft", tmp_path) == (PAIRS[:6], PAIRS[6:8])  # test_sft is its counterpart
    assert load(f"{folder}#one/train_gen", tmp_path) == (PAIRS[8:12], PAIRS[12:14])  # it has none: the usual one
    train, held_out = load(f"{folder}#two/:0.5", tmp_path)
    assert len(train) == 5 and len(held_out) == 1
    saved = datasets.DatasetDict(a=datasets.Dataset.from_list(PAIRS[:4]), test=datasets.Dataset.from_list(PAIRS[4:6]))
    saved.save_to_disk(tmp_path / "saved")
    assert load(f"{tmp_path}/saved#a", tmp_path) == (PAIRS[:4], PAIRS[4:6])
    assert "has no split b; it has a, test" in refused(f"{tmp_path}/saved#b", tmp_path)
    assert f"no such folder: {folder}/three" in refused(f"{folder}#three/train", tmp_path)
    file = write(tmp_path / "a.jsonl", PAIRS)
    assert "a file has no configurations or splits" in refused(f"{file}#train", tmp_path)


def test_columns_of_other_names(tmp_path):
    rows = [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"], "prompt": "x"} for r in PAIRS]
    path = write(tmp_path / "a.jsonl", rows)
    form = Form({"prompt": "question", "chosen": "good", "rejected": "bad"})
    train, held_out = load_data_set(str(path), cache_dir=str(tmp_path), form=form)
    found = sorted(texts(train) + texts(held_out), key=lambda row: int(row["chosen"].split()[-1].strip(".")))
    assert found == [{**row, "margin": None} for row in PAIRS]
    with pytest.raises(
        UserError, match=r"--prompt_column ask: .*a.jsonl \(--data_path\) has no such column; it has que"
    ):
        load_data_set(str(path), cache_dir=str(tmp_path), form=Form({"prompt": "ask"}))
    assert "name them with --prompt_column" in refused(write(tmp_path / "b.jsonl", [{"q": "a"}] * 2), tmp_path)


def test_plain_text_has_no_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"Once upon {i}."} for i in range(4)])
    train, held_out = load(path, tmp_path)
    assert {(r["prompt"], r["chosen"], r["rejected"]) for r in train + held_out} == {
        (None, f"Once upon {i}.", None) for i in range(4)
    }


def test_rows_that_repeat_an_earlier_one_are_dropped_and_named(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [*PAIRS[:3], PAIRS[1], *PAIRS[3:5], PAIRS[1], PAIRS[0], PAIRS[2]])
    train, held_out = load(path, tmp_path)
    assert sorted(train + held_out, key=lambda row: row["margin"]) == PAIRS[:5]
    assert "4 of 9 rows dropped: 4 that repeat an earlier row (line 4, line 7, line 8, ...)" in capsys.readouterr().out


def test_ranked_rows_repeat_one_another_when_all_answers_do(tmp_path, capsys):
    rows = [
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "answers": answers, "ranks": ranks}
        for answers, ranks in [
            ([" a", " b", " c"], [1, 2, 2]),
            ([" c", " a", " b"], [7, 0, 7]),  # the same order
            ([" a", " b", " c"], [1, 2, 3]),
            ([" a", " d", " c"], [1, 2, 2]),
        ]
    ]
    train, held_out = load(write(tmp_path / "a.jsonl", rows), tmp_path)
    assert len(train) + len(held_out) == 3 and {row["chosen"] for row in train + held_out} == {" a"}
    assert "1 of 4 rows dropped: 1 that repeat an earlier row (line 2)" in capsys.readouterr().out


def test_scores_that_are_not_finite_are_named(tmp_path, capsys):
    row = '{"prompt": "Q%d", "answers": ["2020-01-01", "2020-01-02"], "scores": [%s, 1]}\n'
    values = ("0.5", "-1", "NaN", "null")
    path = write(tmp_path / "a.jsonl", "".join(row % (i, value) for i, value in enumerate(values)))
    train, held_out = load(path, tmp_path)
    assert {row["chosen"] for row in train + held_out} == {" 2020-01-02"}  # a text, though it looks like a date
    reported = "2 of 4 rows dropped: 2 with scores that are missing or not finite (line 3, line 4)"
    assert reported in capsys.readouterr().out


def test_rows_of_several_files_are_named_with_their_file(tmp_path, capsys):
    for k in range(2):
        write(tmp_path / f"set/train-0000{k}-of-00002.jsonl", [PAIRS[k], PAIRS[k]])
    load(tmp_path / "set", tmp_path)
    assert "(train-00000-of-00002.jsonl line 2, train-00001-of-00002.jsonl line 2)" in capsys.readouterr().out


def test_margins_that_are_no_numbers_are_named(tmp_path, capsys):
    content = good(3) + '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}\n'
    load(write(tmp_path / "a.jsonl", content), tmp_path)
    line = "1 of 4 rows dropped: 1 with a margin that is not finite (line 4)"
    assert line in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("shape", ["pairs", "bare", "dialogues", "messages", "whole", "question and whole"])
def test_every_shape_becomes_the_same_text(tmp_path, shape, capsys):
    path = write(tmp_path / "a.jsonl", [as_shape(row, shape) for row in PAIRS])
    train, evaluation = load(path, tmp_path)
    assert sorted(train + evaluation, key=lambda row: row["margin"]) == PAIRS
    line = capsys.readouterr().out
    assert line.startswith(f"--data_path {path}: ") and "; 19 training rows, 1 to evaluate" in line


def test_answers_only_and_prompts_only(tmp_path):
    for name, columns in (
        ("completion", {"prompt": "prompt", "completion": "chosen"}),
        ("alone", {"prompt": "prompt"}),
    ):
        rows = [{column: row[source] for column, source in columns.items()} for row in PAIRS]
        train, evaluation = load(write(tmp_path / f"{name}.jsonl", rows), tmp_path)
        found = {row["prompt"]: (row["chosen"], row["rejected"], row["margin"]) for row in train + evaluation}
        chosen = {row["prompt"]: row["chosen"] if name == "completion" else None for row in PAIRS}
        assert found == {prompt: (answer, None, None) for prompt, answer in chosen.items()}
    rows = [{"messages": messages(row["prompt"], row["chosen"])} for row in PAIRS[:2]]
    train, _ = load(write(tmp_path / "messages.jsonl", rows), tmp_path)
    assert train[0]["prompt"].startswith("\n\nHuman: ") and train[0]["chosen"] in (" It is 0.", " It is 1.")


def test_a_template_of_ones_own_is_kept_as_it_is(tmp_path):
    rows = [{"prompt": f"### Question: {i}\n### Response:", "completion": f"{i}"} for i in range(5)]
    train, evaluation = load(write(tmp_path / "a.jsonl", rows), tmp_path)
    found = {(row["prompt"], row["chosen"]) for row in train + evaluation}
    assert found == {(row["prompt"], row["completion"]) for row in rows}


def test_csv_knows_no_types(tmp_path):
    text = "prompt,chosen,rejected,margin\n2 + 2?,4,5,1\nNA?,NA,null,\n"
    train, evaluation = load(write(tmp_path / "a.csv", text), tmp_path)
    found = {(row["chosen"], row["rejected"], row["margin"]) for row in train + evaluation}
    assert found == {(" 4", " 5", 1.0), (" NA", " null", None)}


def test_texts_that_look_like_dates_stay_texts(tmp_path):
    rows = [{"prompt": f"When was {i}?", "chosen": f"2020-01-0{i}", "rejected": "never"} for i in range(1, 4)]
    train, held_out = load(write(tmp_path / "a.jsonl", rows), tmp_path)
    assert {row["chosen"] for row in train + held_out} == {" 2020-01-01", " 2020-01-02", " 2020-01-03"}


def test_dialogues_without_a_common_prompt_are_counted(tmp_path, capsys):
    rows = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in PAIRS[:3]]
    rows.append({"chosen": "Assistant: a", "rejected": "something else"})
    rows.append({"chosen": rows[0]["chosen"], "rejected": PAIRS[0]["prompt"] + " B\n\nHuman: C\n\nAssistant: D"})
    train, evaluation = load(write(tmp_path / "a.jsonl", rows), tmp_path)
    assert len(train) + len(evaluation) == 3
    assert capsys.readouterr().out.splitlines()[0] == (
        f"--data_path {tmp_path}/a.jsonl (train): 2 of 5 rows dropped: 1 the two dialogues differ before their last "
        'turn (line 5); 1 the two dialogues share no prompt up to an "Assistant:" (line 4)'
    )


# ---------------------------------------------------------------------------------------------------------- bad input


def good(n: int) -> str:
    return "".join(json.dumps(row) + "\n" for row in PAIRS[:n])


DEEP = '{"a": ' * 100_000 + "1" + "}" * 100_000  # at which the library's reader ends the process


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", good(2) + "\n{broken\n", "a.jsonl, line 4: not valid JSON (Expecting property name"),
        ("a.jsonl.gz", good(2) + '{"prompt": 1,', "a.jsonl.gz, line 3: not valid JSON"),
        ("a.jsonl", good(1) + '["a"]\n', "a.jsonl, line 2: found list, expected an object"),
        ("a.jsonl", (good(1) + '{"prompt": "é"}\n').encode("latin-1"), "a.jsonl, line 2: not UTF-8"),
        ("a.json", '[\n{"prompt": "a"},\n{"prompt" "b"}]', "a.json, line 3: not valid JSON"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", "\n\n", "a.jsonl is empty"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.csv", "prompt,chosen,rejected\n", "a.csv has no rows"),
        ("a.jsonl.gz", "", "a.jsonl.gz is empty"),
        ("a.txt", "text", "a.txt is of no known kind; expected .jsonl, .json, .csv, .parquet, .arrow, also with .gz"),
        ("a.parquet", "no parquet", "a.parquet cannot be read as parquet: "),
        ("a.json", '[null, {"prompt": "a"}]', "a.json, row 1: found NoneType, expected an object of columns"),
        ("a.jsonl", '\nnull\n{"prompt": "a"}\n', "a.jsonl, line 2: found NoneType, expected an object of columns"),
        ("a.csv", "prompt,chosen\na,b,\nc,d,\n", "a.csv cannot be read as csv: row 1 has more fields than the header"),
        ("a.csv", "prompt,chosen\na,b\na,b,c\n", "a.csv cannot be read as csv: "),
        (
            "a.jsonl",
            good(2) + '\n{"prompt": 5, "chosen": "a", "rejected": "b"}\n',
            "line 4, column 'prompt': found number '5', but str",
        ),
        (
            "a.jsonl",
            good(2) + '{"prompt": 5, "chosen": "a", "rejected": "b"}\n',
            "line 3, column 'prompt': found int '5'",
        ),
        (  # the reader makes numbers of all three
            "a.jsonl",
            '{"prompt": "a", "chosen": " 1"}\n{"prompt": "b", "chosen": " 2"}\n{"prompt": "c", "chosen": 3}\n',
            "a.jsonl, line 3, column 'chosen': found number '3', but str in line 1",
        ),
        ("a.jsonl", '{"prompt": 5}\n{"prompt": 6}\n', "a.jsonl, line 1, column 'prompt': found int '5', expected text"),
        ("a.jsonl", good(1) + '{"prompt": "a", "chosen": "b"}\n', "line 2, column 'rejected': found missing or null"),
        ("a.json", '[{"prompt": "a"}, {"prompt": null}]', "a.json, row 2, column 'prompt': found missing or null"),
        (
            "a.jsonl",
            '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}\n',
            "column 'margin': found 'big'",
        ),
        (
            "a.jsonl",
            '{"promt": "a", "chosen": "b"}\n',
            "has the columns promt, chosen; expected prompt/chosen/rejected",
        ),
        ("a.jsonl", '{"prompt": "a", "rejected": "b"}\n', "has the columns prompt, rejected; expected"),
        (
            "a.jsonl",
            json.dumps({"messages": messages("a", "b"), "tools": [{"name": "search"}]}),
            "line 1, column 'tools': tools are not supported; leave such rows out, or remove the column",
        ),
        ("a.jsonl", good(1), "has one row; expected at least two"),
        (
            "a.jsonl",
            '{"prompt": "a", "answers": ["b", "c"]}\n{"prompt": "a", "answers": ["b", 3]}\n',
            "a.jsonl, line 2, column 'answers[2]': found int '3', expected text",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "answers": ["b", "c"]}\n{"prompt": "a", "answers": "b"}\n',
            "a.jsonl, line 2, column 'answers': found str 'b', but list in line 1",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "answers": ["b", "c"], "ranks": [1, 2]}\n{"prompt": "a", "answers": ["b"]}\n',
            "a.jsonl, line 2, column 'ranks': found missing or null, expected a list",
        ),
        ("a.jsonl", good(1) + DEEP.join(['{"prompt": ', "}\n"]), "a.jsonl, line 2: nested too deep"),
        ("a.json", f"[{DEEP}]", "a.json, a row: nested too deep"),
        (
            "a.csv",
            "prompt,chosen,chosen\na,b,c\n",
            "a.csv cannot be read as csv: the header names the column 'chosen' more than once",
        ),
        ("a.csv", "prompt,answers\na,b\n", "a.csv, row 1, column 'answers': found str 'b', expected a list"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path, name, content, expected):
    assert expected in refused(write(tmp_path / name, content), tmp_path)


def test_files_that_unpack_to_far_more_than_data_are_refused(tmp_path, monkeypatch):
    unpacked = "unpacks to more than 200 times its size, and would fill the memory"
    monkeypatch.setattr("utils.data.sources.LONGEST_ROW", 2**20)
    rows = [{"prompt": "a" * 2**21, "chosen": "b"}, {"prompt": "c", "chosen": "d"}]
    packed = write(tmp_path / "a.jsonl.gz", rows)
    assert unpacked in refused(packed, tmp_path)
    many = [{"prompt": f"{i} {'a' * 2**14}", "chosen": "b"} for i in range(1000)]
    columns = {name: [row[name] for row in many] for name in ("prompt", "chosen")}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd", use_dictionary=False)
    assert unpacked in refused(path, tmp_path)
    with pytest.raises(UserError, match="line 1: longer than 1,048,576 bytes"):
        open_stream(str(packed), None, cache_dir=None, flag="--data_path", form=Form())


def test_brackets_in_texts_are_no_depth(tmp_path):
    rows = [{"prompt": "[{" * 600 + str(i), "chosen": "}]"} for i in range(20)]
    train, evaluation = load(write(tmp_path / "a.jsonl", rows), tmp_path)
    assert len(train) + len(evaluation) == 20


def test_local_files_ask_no_host(tmp_path, monkeypatch):
    asked = []

    def look_up(host, *_, **__):
        asked.append(host)
        raise socket.gaierror("no network")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    load(write(tmp_path / "a.jsonl", PAIRS), tmp_path)
    assert not asked and not datasets.config.HF_HUB_OFFLINE  # a name of the hub that follows may be asked for


def test_a_broken_archive_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", PAIRS)
    path.write_bytes(path.read_bytes()[:-40])
    assert f"{path} cannot be read: " in refused(path, tmp_path)
    path.write_bytes(b"no archive")
    assert f"{path} cannot be read: " in refused(path, tmp_path)


def test_missing_places_are_refused(tmp_path):
    for name in (str(tmp_path / "nothing.jsonl"), "./nothing", "nothing.jsonl", "a/b/c"):
        assert f"no such file or folder: {name}" in refused(name, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no data files; expected train and test files" in refused(tmp_path / "empty", tmp_path)
    write(tmp_path / "only/test.jsonl", PAIRS)
    assert "has no train split; it has test" in refused(tmp_path / "only", tmp_path)


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIRS)
    with pytest.raises(UserError, match="--data_output_path: cannot write to .*/a.jsonl/converted"):
        load_data_set(str(path), cache_dir=str(path))


def test_a_hub_name_without_the_hub_is_one_line(tmp_path):
    for name in ("Dahoas/rm-static", "mkqa-Japanese", "someone/some-set"):
        assert f"{name} is neither a local file or folder nor in the cache" in refused(name, tmp_path)


def test_the_flag_that_names_the_data_is_the_one_in_the_error(tmp_path):
    with pytest.raises(UserError, match="--sft_only_data_path: no such file"):
        load_data_set("nothing.csv", cache_dir=str(tmp_path), flag="--sft_only_data_path")


@pytest.mark.parametrize("folder", ["SHP", "stanfordnlp/SHP", "stanfordnlp--SHP/SHP"])
def test_a_folder_called_like_a_known_set_is_read_like_it(tmp_path, folder):
    rows = [{"history": f"Q{i}", "human_ref_A": "A", "human_ref_B": "B", "labels": 1} for i in range(4)]
    write(tmp_path / folder / "train.jsonl", rows)
    write(tmp_path / folder / "test.jsonl", rows)
    assert load(tmp_path / folder, tmp_path)[0][0]["prompt"] == "\n\nHuman: Q0\n\nAssistant:"


def test_a_folder_called_like_a_known_set_may_hold_another_shape(tmp_path):
    write(tmp_path / "SHP" / "train.jsonl", [as_shape(row, "messages") for row in PAIRS])
    write(tmp_path / "SHP" / "test.jsonl", [as_shape(row, "messages") for row in PAIRS])
    assert load(tmp_path / "SHP", tmp_path)[0] == PAIRS
    ranked = [{"prompt": f"Q{i}\n\nAssistant:", "answers": ["A", "B"]} for i in range(4)]  # texts; there: objects
    write(tmp_path / "Nectar" / "train.jsonl", ranked)
    write(tmp_path / "Nectar" / "test.jsonl", ranked)
    assert load(tmp_path / "Nectar", tmp_path)[0][0]["chosen"] == " A"


# -------------------------------------------------------------------------------------------------------- real text


@pytest.mark.skipif(not REAL.is_dir(), reason="the sample data is not beside this repository")
def test_real_rows_in_all_shapes_agree(tmp_path):
    _, pairs = load(REAL / "alpaca_prefs", tmp_path)
    known = {(row["prompt"], row["chosen"], row["rejected"]) for row in pairs}
    for shape in ("hh_dialogue", "conversational", "prompt_completion"):
        train, evaluation = load(REAL / "formats" / shape, tmp_path)
        for split, found in (("train", train), ("test", evaluation)):  # every row but those that repeat another
            lines = gzip.open(REAL / "formats" / shape / f"{split}.jsonl.gz").readlines()
            assert len(found) == len(set(lines))
        width = 2 if shape == "prompt_completion" else 3
        assert {tuple(row[name] for name in TEXTS[:width]) for row in evaluation} <= {row[:width] for row in known}


def test_a_wrong_row_of_a_known_set_is_named(tmp_path):
    # In the first rows all is well: nothing tells that the folder holds something else.
    folder = tmp_path / "stanfordnlp" / "SHP"
    folder.mkdir(parents=True)
    rows = [{"history": f"Q{i}?", "human_ref_A": "A", "human_ref_B": "B", "labels": "1"} for i in range(4)]
    rows[2]["labels"] = "first"
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"train\.jsonl.* line 3 is not like the rows of this data set \(ValueError"):
        load_data_set(str(folder), cache_dir=str(tmp_path / "cache"))


# Numbers in most rows, and texts in others, of which Arrow would make numbers as well.
@pytest.mark.parametrize("column", ["scores", "ranks"])
@pytest.mark.parametrize("order", [["2", "1"], [2, "1"]])
@pytest.mark.parametrize("place", [1, 3])
def test_texts_among_the_scores_are_refused_where_they_stand(tmp_path, column, order, place):
    rows = [{"prompt": f"{i}?", "answers": ["a", "b"], column: [1.5, 2]} for i in range(3)]
    rows[place - 1][column] = order
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = next(value for value in order if isinstance(value, str))
    expected = f"--data_path: {path}, line {place}, column '{column}': found str '{found}', expected a number"
    with pytest.raises(UserError, match=re.escape(expected)):
        load_data_set(str(path), cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=re.escape(expected)):
        open_stream(str(path), None, cache_dir=None, flag="--data_path", form=Form())
    # Where the column is not learned from, it may hold anything.
    path.write_text(
        "".join(json.dumps({"prompt": row["prompt"], "chosen": "a", column: row[column]}) + "\n" for row in rows)
    )
    load_data_set(str(path), cache_dir=str(tmp_path))


def test_a_pair_beside_several_answers_is_what_counts_and_a_line_says_so(tmp_path, capsys):
    rows = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b", "answers": ["c", "d", "e"]} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, _ = load_data_set(str(path), cache_dir=str(tmp_path))
    assert set(train["chosen"]) == {" a"} and train[0]["answers"] is None
    open_stream(str(path), None, cache_dir=None, flag="--data_path", form=Form())
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("prompt/chosen/rejected" in line and "answers is not read" in line for line in said)
