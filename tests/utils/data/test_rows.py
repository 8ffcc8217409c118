"""Rows as they stand in their file, beside the texts that training would make of them."""

import gzip
import json

import pytest

from utils.data.rows import read_rows
from utils.run import UserError


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path, tmp_path):
    return read_rows(str(path), cache_dir=str(tmp_path / "cache"))


def test_rows_keep_order_and_values(tmp_path):
    # Arrow alone would make a date of `when`, 1.0 of `id` and a null `note` in every row.
    rows = [
        {"prompt": "Eins?", "completion": "ja ü", "when": "2020-01-02", "id": 1},
        {"prompt": "Zwei?", "completion": "nein", "when": "2020-01-03", "id": 2.5, "note": {"deep": [1, None]}},
        {"prompt": "Drei?", "completion": "ja", "when": "2020-01-04", "id": 3},
    ]
    found = read(write(tmp_path / "a.jsonl", rows), tmp_path)
    assert [row.original for row in found] == rows
    assert [type(row.original["id"]) for row in found] == [int, float, int]
    assert found[1].example.prompt == "\n\nHuman: Zwei?\n\nAssistant:" and found[1].example.chosen == " nein"
    assert all(row.skipped is None for row in found)


def test_json_list_and_gz(tmp_path):
    rows = [{"prompt": "A?", "chosen": "b", "rejected": "c", "n": i} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n\n".join(json.dumps(row) for row in rows))
    for name in ("a.json", "b.jsonl.gz"):
        assert [row.original for row in read(tmp_path / name, tmp_path)] == rows


def test_rows_that_training_skips_stay(tmp_path):
    start = "\n\nHuman: A?\n\nAssistant:"
    rows = [
        {"chosen": start + " yes", "rejected": start + " no"},
        {"chosen": "no dialogue", "rejected": "none either"},
    ]
    kept, lost = read(write(tmp_path / "a.jsonl", rows), tmp_path)
    assert kept.skipped is None and kept.example.rejected == " no"
    assert lost.original == rows[1] and "share no prompt" in lost.skipped


def test_unwanted_answers_count_as_answers(tmp_path):
    rows = [{"prompt": "A?", "completion": text, "label": text == "good"} for text in ("good", "bad")]
    found = read(write(tmp_path / "a.jsonl", rows), tmp_path)
    assert [row.example.chosen for row in found] == [" good", " bad"]
    assert [row.original["label"] for row in found] == [True, False]


def test_the_test_split_of_a_folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, size in (("train", 5), ("test", 2)):
        write(folder / f"{split}.jsonl", [{"prompt": f"{split} {i}?", "completion": "x"} for i in range(size)])
    assert [row.original["prompt"] for row in read(folder, tmp_path)] == ["test 0?", "test 1?"]


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "a?", "completion": "b"}\n{"prompt": "\xff?", "completion": "b"}\n')
    with pytest.raises(UserError, match=r"--data_path: .*a\.jsonl, line 2"):
        read(path, tmp_path)
