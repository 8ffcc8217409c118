"""Text files; `tests/bad_input/texts.py` has those that are refused, as the programs' flags name them."""

import errno
import json
from pathlib import Path

import pytest

from utils.files import read_text, write_rows, write_whole
from utils.run import UserError


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a").write_text("\ufeffé\n", encoding="utf-8")
    assert read_text(str(tmp_path / "a"), "--flag", "a file") == "é\n"


def test_the_line_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(UserError, match=r"--flag .*/a: line 3 is not UTF-8 \(invalid start byte\); expected a file"):
        read_text(str(tmp_path / "a"), "--flag", "a file")


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(2**27 + 1)  # takes no room
    with pytest.raises(UserError, match="is larger than 128 MiB; expected a file"):
        read_text(str(tmp_path / "a"), "--flag", "a file")


def test_what_was_there_stays_until_the_new_file_is_complete(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    write_rows(file, [{"text": "é\n"}, {"text": "b"}])
    before = file.read_text(encoding="utf-8")
    assert [json.loads(line)["text"] for line in before.splitlines()] == ["é\n", "b"] and "é" in before
    write = Path.write_text

    def on_a_full_disk(path, text, encoding):
        write(path, text[:1], encoding=encoding)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", on_a_full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"] and file.read_text(encoding="utf-8") == before
