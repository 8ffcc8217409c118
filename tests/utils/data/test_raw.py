import gzip
import io
import json
import re
from pathlib import Path

import datasets
import pytest

from utils.data.raw import BLOCK, json_items, raw_rows
from utils.data.sources import Shard, read_file
from utils.run import UserError

DATA = Path(__file__).resolve().parents[2] / "data"


def read(file: Path) -> list[tuple[str, dict]]:
    return list(raw_rows(Shard(None, str(file), file), "--data_path"))


@pytest.mark.parametrize("file", sorted(DATA.iterdir()), ids=lambda path: path.name)
def test_the_rows_are_those_of_the_datasets_library(file, tmp_path):
    rows = read(file)
    expected = list(read_file(file, str(tmp_path), "--data_path").rows)
    assert [{**dict.fromkeys(expected[0]), **row} for _, row in rows] == expected
    kind = "line" if ".jsonl" in file.name else "row"
    assert [name for name, _ in rows] == [f"{kind} {i}" for i in range(1, len(rows) + 1)]


def test_arrows_file_format_and_saved_data_sets(tmp_path):
    import pyarrow

    rows = [{"prompt": f"a{i}", "n": i} for i in range(2500)]
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as file:
        file.write_table(table)
    assert [row for _, row in read(tmp_path / "x.arrow")] == rows
    saved = datasets.Dataset.from_list(rows)
    assert [row for _, row in raw_rows(Shard(saved, "saved"), "--data_path")] == rows
    stream = saved.to_iterable_dataset()
    assert list(raw_rows(Shard(stream, "hub"), "--data_path"))[2499] == ("row 2500", rows[2499])


def test_a_json_list_is_read_item_by_item():
    text = ' [ {"a": "x]y"} ,\n{"a": [1, {"b": 2}]},{"a": "é"} ] '
    assert list(json_items(io.BytesIO(text.encode()))) == json.loads(text)
    assert list(json_items(io.BytesIO(b"\xef\xbb\xbf[]"))) == []
    # Rows over the borders of what is read at once, and one that is longer than that.
    rows = [{"text": "é" * n} for n in (BLOCK // 3, 10, 2 * BLOCK, BLOCK // 2, 1)]
    file = io.BytesIO(json.dumps(rows, ensure_ascii=False).encode())
    items = json_items(file)
    assert next(items) == rows[0] and file.tell() == BLOCK  # no more than needed
    assert list(items) == rows[1:]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.jsonl", b'{"a": 1}\n\n{"a": \n', "line 3: not valid JSON"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2: not UTF-8"),
        ("x.jsonl", b'{"a": 1}\n7\n', "line 2: found int, expected an object of columns"),
        ("x.jsonl", b"\n \n", "has no rows; expected"),
        ("x.json", b'[{"a": 1}, {"a": 1} {"a": 1}]', "row 3: not valid JSON"),
        ("x.json", b'[{"a": 1}, {"a": 1', "row 2: not valid JSON"),
        ("x.json", b"[]", "has no rows"),
        ("x.csv", b"a,b\n1,2\n1,2,3\n", "cannot be read: .*line 3"),
        ("x.csv", b"a,b\n1,2,\n3,4,\n", "cannot be read: row 1 has more fields than the header names columns .2."),
        ("x.csv", b"a,b\n1,\xff\n", "holds text that is not UTF-8"),
        ("x.csv", b"a,b\n", "has no rows"),
        ("x.parquet", b"something else", "cannot be read: Parquet"),
        ("x.arrow", b"something else, and longer", "cannot be read: "),
        ("x.jsonl.gz", b"not compressed", "cannot be read: Not a gzipped file"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 10_000)[:-20], "cannot be read: "),
        ("x.parquet.gz", b"x", "parquet cannot be streamed out of .gz; unpack it"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"--data_path: {tmp_path / name}") + f".*{expected}"):
        read(tmp_path / name)


def test_a_csv_is_text_and_short_lines_end_in_nothing(tmp_path):
    (tmp_path / "x.csv").write_text("\ufeffa,b\nNA,4\n5\n", encoding="utf-8")
    assert read(tmp_path / "x.csv") == [("row 1", {"a": "NA", "b": "4"}), ("row 2", {"a": "5", "b": ""})]
    assert [row for _, row in read(tmp_path / "x.csv")] == list(read_file(tmp_path / "x.csv", None, "--data_path").rows)


@pytest.mark.parametrize("name", ["completions.csv", "pairs.arrow", "messages.json"])
def test_compressed_files_are_read_as_they_come(tmp_path, name):
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress((DATA / name).read_bytes()))
    assert read(packed) == read(DATA / name)
