"""Data files of every format that are empty, torn, of another kind or shape than they should be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from tests.bad_input.kit import Case, Content, Maker, copy_of, fifo, folder, link, packed, pairs, table

ROW = {"prompt": "\n\nHuman: What?\n\nAssistant:", "chosen": " A.", "rejected": " B."}
USER, ANSWER = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}
GOOD = json.dumps(ROW) + "\n"


def of_file(name: str, file: str, content: Content, line: str, program: str = "rw_eval", flags: str = "") -> Case:
    """A case whose data is one bad file; the line must name it."""
    return Case(name, program, f"--data_path {file} {flags}", line, {file: content})


def of_rows(name: str, rows: list, line: str, program: str = "rw_eval", flags: str = "") -> Case:
    """A case whose data is one file of JSON lines."""
    return of_file(name, "d.jsonl", rows, f"--data_path: d.jsonl ... {line}", program, flags)


def dialogue(*messages: object) -> list:
    return [{"messages": [USER, ANSWER]}, {"messages": list(messages)}]


def nested(depth: int, inside: str = "") -> str:
    return f'{{"prompt": {"[" * depth}{inside}{"]" * depth}}}\n'


def bomb(path: Path, sound: object) -> None:
    path.write_bytes(gzip.compress(bytes(100_000_000), compresslevel=1))


JSON_LINES = [
    of_file("empty file", "d.jsonl", b"", "--data_path: d.jsonl is empty"),
    of_file("blank lines", "d.jsonl", "\n\n  \n", "--data_path: d.jsonl is empty"),
    of_file("byte order mark alone", "d.jsonl", b"\xef\xbb\xbf", "--data_path: d.jsonl"),
    of_file("row cut off", "d.jsonl", GOOD + GOOD[:30], "--data_path: d.jsonl, line 2: not valid JSON"),
    of_file(
        "row cut off, sft", "d.jsonl", GOOD * 9 + GOOD[:30], "--data_path: d.jsonl, line 10: not valid JSON", "sft"
    ),
    of_file("latin-1", "d.jsonl", GOOD.replace("A.", "é").encode("latin-1"), "--data_path: d.jsonl, line 1: not UTF-8"),
    of_file(
        "latin-1 in the last row",
        "d.jsonl",
        GOOD.encode() * 2000 + GOOD.replace("A.", "é").encode("latin-1"),
        "--data_path: d.jsonl, line 2001: not UTF-8",
    ),
    of_file("UTF-16", "d.jsonl", (GOOD * 3).encode("utf-16"), "--data_path: d.jsonl ... not UTF-8"),
    of_file("UTF-32", "d.jsonl", (GOOD * 3).encode("utf-32"), "--data_path: d.jsonl"),
    of_file("zero bytes", "d.jsonl", b"\0" * 4096, "--data_path: d.jsonl, line 1: not valid JSON"),
    of_file(
        "zero bytes behind a row",
        "d.jsonl",
        GOOD.encode() + b"\0" * 512,
        "--data_path: d.jsonl, line 2: not valid JSON",
    ),
    of_file("rows on one line", "d.jsonl", GOOD.strip() * 2, "--data_path: d.jsonl, line 1: not valid JSON"),
    of_file("rows of Python", "d.jsonl", str(ROW), "--data_path: d.jsonl, line 1: not valid JSON"),
    of_file("comment", "d.jsonl", "# rows\n" + GOOD, "--data_path: d.jsonl, line 1: not valid JSON"),
    of_file("page of an error", "d.jsonl", "<html>404</html>", "--data_path: d.jsonl, line 1: not valid JSON"),
    of_file(
        "merge conflict", "d.jsonl", GOOD + "<<<<<<< HEAD\n" + GOOD, "--data_path: d.jsonl, line 2: not valid JSON"
    ),
    of_file(
        "pointer of git lfs",
        "d.jsonl",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        "--data_path: d.jsonl, line 1: not valid JSON",
    ),
    of_file("gzip without its suffix", "d.jsonl", packed(GOOD), "--data_path: d.jsonl"),
    of_file("parquet called jsonl", "d.jsonl", copy_of("pairs.parquet"), "--data_path: d.jsonl"),
    of_file("rows that are lists", "d.jsonl", [["a", "b"]], "--data_path d.jsonl: no row can be scored"),
    of_rows("rows that are texts", ["a", "b"], "line 1: found str, expected an object"),
    of_rows("rows that are numbers", [1, 2], "line 1: found int, expected an object"),
    of_rows("a row that is null", [ROW, None], "line 2, column 'prompt': found missing or null"),
    of_rows("first row null", [None, ROW], "line 1: found NoneType, expected an object"),
    of_rows("a row that is a number", [ROW, 3], "line 2: found int, expected an object"),
    of_rows("a row that is true", [ROW, True], "line 2: found bool, expected an object"),
    of_rows("no columns", [{}], "expected"),
    of_rows("a row without columns", [ROW, {}], "line 2, column 'prompt': found missing or null"),
    of_rows("unknown columns", [{"question": "a", "reply": "b"}], "has the columns question, reply; expected"),
    of_rows("columns in capitals", [{"Prompt": "a", "Chosen": "b", "Rejected": "c"}], "has the columns Prompt, Chosen"),
    of_rows(
        "column with a space", [{"prompt ": "a", "chosen ": "b", "rejected ": "c"}], "has the columns prompt , chosen"
    ),
    of_rows(
        "prompt is null", [ROW, ROW | {"prompt": None}], "line 2, column 'prompt': found missing or null, expected text"
    ),
    of_rows("every prompt is null", [ROW | {"prompt": None}] * 3, "column 'prompt': found missing or null"),
    of_rows("prompt is a number", [ROW | {"prompt": 3}] * 2, "line 1, column 'prompt': found int '3', expected text"),
    of_rows(
        "one prompt is a number", [ROW, ROW | {"prompt": 3}], "line 2, column 'prompt': found int '3', expected text"
    ),
    of_rows("prompt is true", [ROW | {"prompt": True}], "line 1, column 'prompt': found bool 'True'"),
    of_rows("prompt is an object", [ROW | {"prompt": {"text": "a"}}], "line 1, column 'prompt': found dict"),
    of_rows("prompt is a list of texts", [ROW | {"prompt": ["a"]}], "line 1, column 'prompt': expected messages"),
    of_rows("prompt is an empty list", [ROW | {"prompt": []}], "line 1, column 'prompt': found an empty list"),
    of_rows("chosen is null", [ROW, ROW | {"chosen": None}], "line 2, column 'chosen': found missing or null"),
    of_rows(
        "chosen is missing", [ROW, {"prompt": "a", "rejected": "b"}], "line 2, column 'chosen': found missing or null"
    ),
    of_rows("chosen is a list of numbers", [ROW | {"chosen": [1, 2]}], "line 1, column 'chosen': expected messages"),
    of_rows("rejected is a number", [ROW | {"rejected": 1.5}], "line 1, column 'rejected': found float '1.5'"),
    of_rows("margin is a text", [ROW | {"margin": "much"}], "line 1, column 'margin': found 'much', expected a number"),
    of_rows("margin is a list", [ROW | {"margin": [1]}], "line 1, column 'margin'"),
    of_rows(
        "nothing but equal answers", [ROW | {"chosen": " B."}] * 30, "has one row; expected at least two", "reward"
    ),
    of_rows(
        "nothing but empty answers",
        [ROW | {"chosen": "", "rejected": ""}] * 30,
        "has one row; expected at least two",
        "sft",
    ),
    of_rows("one row", [ROW], "has one row; expected at least two", "sft"),
    of_rows("one row thirty times", [ROW] * 30, "has one row; expected at least two", "sft"),
    of_file("two rows", "d.jsonl", pairs(2), "--data_split 2,4,4: no row is left for step 1", "sft"),
    of_file(
        "prompts alone for step 1",
        "d.jsonl",
        [{"prompt": f"Q{i}"} for i in range(40)],
        "--data_path d.jsonl: no row has an answer `chosen`",
        "sft",
    ),
    of_file(
        "prompts alone for step 2",
        "d.jsonl",
        [{"prompt": f"Q{i}"} for i in range(40)],
        "--data_path d.jsonl: no row has an answer `rejected`",
        "reward",
    ),
    of_file(
        "texts alone for step 2",
        "d.jsonl",
        [{"text": f"Q{i}"} for i in range(40)],
        "--data_path d.jsonl: no row has an answer `rejected`",
        "reward",
    ),
    of_file(
        "texts alone for step 3",
        "d.jsonl",
        [{"text": f"Q{i}"} for i in range(40)],
        "--data_path d.jsonl: no row has a prompt",
        "remax",
    ),
    of_file(
        "single answers for step 2",
        "d.jsonl",
        [{"prompt": f"Q{i}", "completion": "a"} for i in range(40)],
        "--data_path d.jsonl: no row has an answer `rejected`",
        "reward",
    ),
    of_file("prompts alone to score", "d.jsonl", [{"prompt": "a"}], "--data_path d.jsonl: no row can be scored"),
    of_file("number of 30 digits", "d.jsonl", f'{{"prompt": "a", "chosen": {10**30}}}', "--data_path: d.jsonl, line 1"),
    of_file(
        "lone surrogate",
        "d.jsonl",
        '{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n' * 2,
        "--data_path: d.jsonl",
    ),
    of_file(
        "key twice",
        "d.jsonl",
        '{"prompt": "a", "chosen": "a", "chosen": "b", "rejected": "c"}\n' * 2,
        "--data_path: d.jsonl ... chosen",
    ),
    of_file(
        "objects of a thousand keys",
        "d.jsonl",
        json.dumps({f"k{i}": i for i in range(1000)}),
        "--data_path: d.jsonl has the columns",
    ),
    of_file(
        "NaN as a prompt", "d.jsonl", '{"prompt": NaN, "chosen": "a", "rejected": "b"}', "--data_path: d.jsonl, line 1"
    ),
    of_file(
        "streamed row cut off",
        "d.jsonl",
        GOOD + GOOD[:30],
        "--data_path: d.jsonl, line 2: not valid JSON",
        "sft",
        "--streaming",
    ),
    of_file(
        "streamed latin-1",
        "d.jsonl",
        GOOD.replace("A.", "é").encode("latin-1"),
        "--data_path: d.jsonl, line 1: not UTF-8",
        "sft",
        "--streaming",
    ),
    of_file(
        "streamed rows of lists", "d.jsonl", [["a"]], "--data_path: d.jsonl, row 1: found str", "sft", "--streaming"
    ),
    of_file(
        "streamed prompt of a number",
        "d.jsonl",
        [ROW | {"prompt": 3}],
        "--data_path: d.jsonl, line 1, column 'prompt'",
        "sft",
        "--streaming",
    ),
]

JSON_LISTS = [
    of_file("empty list", "d.json", "[]", "--data_path: d.json"),
    of_file("list of lists", "d.json", "[[1, 2]]", "--data_path: d.json, row 1 ... found list"),
    of_file("list of texts", "d.json", '["a", "b"]', "--data_path d.json: no row can be scored"),
    of_file("list cut off", "d.json", f"[{GOOD}, {GOOD}", "--data_path: d.json ... not valid JSON"),
    of_file("list with a comma too many", "d.json", f"[{GOOD}, ]", "--data_path: d.json ... not valid JSON"),
    of_file("list without commas", "d.json", f"[{GOOD} {GOOD}]", "--data_path: d.json ... not valid JSON"),
    of_file("list and more", "d.json", f"[{GOOD}] x", "--data_path: d.json ... not valid JSON"),
    of_file("first item null", "d.json", f"[null, {GOOD}]", "--data_path: d.json"),
    of_file("object of one column", "d.json", json.dumps({"data": 3}), "--data_path: d.json"),
    of_file("text alone", "d.json", '"text"', "--data_path: d.json"),
    of_file("number alone", "d.json", "3", "--data_path: d.json"),
    of_file("null alone", "d.json", "null", "--data_path: d.json"),
    of_file("brace alone", "d.json", "{", "--data_path: d.json ... not valid JSON"),
    of_file("bracket alone", "d.json", "[", "--data_path: d.json ... not valid JSON"),
    of_file(
        "number in a list of rows", "d.json", f"[{GOOD}, 3]", "--data_path: d.json ... found int, expected an object"
    ),
]

CSV = [
    of_file("csv that is empty", "d.csv", b"", "--data_path: d.csv is empty"),
    of_file("csv of a header", "d.csv", "prompt,chosen,rejected\n", "--data_path: d.csv has no rows"),
    of_file(
        "csv with a field too many", "d.csv", "prompt,chosen\na,b,c\n", "--data_path: d.csv ... row 1 has more fields"
    ),
    of_file("csv with a field too many below", "d.csv", "prompt,chosen\na,b\na,b,c\n", "--data_path: d.csv"),
    of_file("csv with a quote that stays open", "d.csv", 'prompt,chosen\n"a,b\n', "--data_path: d.csv"),
    of_file("csv with unknown columns", "d.csv", "a,b\n1,2\n", "--data_path: d.csv has the columns a, b"),
    of_file("csv with semicolons", "d.csv", "prompt;chosen\na;b\n", "--data_path: d.csv has the columns prompt;chosen"),
    of_file("csv in latin-1", "d.csv", "prompt,chosen\né,b\n".encode("latin-1"), "--data_path: d.csv"),
    of_file("csv in UTF-16", "d.csv", "prompt,chosen\na,b\n".encode("utf-16"), "--data_path: d.csv"),
    of_file("csv of zero bytes", "d.csv", b"\0" * 100, "--data_path: d.csv"),
    of_file(
        "csv without a header", "d.csv", "What?,That.\nWho?,They.\n", "--data_path: d.csv has the columns What?, That."
    ),
    of_file("csv of an empty header", "d.csv", ",,\na,b,c\n", "--data_path: d.csv"),
    of_file("csv with a byte order mark alone", "d.csv", b"\xef\xbb\xbf", "--data_path: d.csv"),
    of_file(
        "csv streamed with a field too many",
        "d.csv",
        "prompt,chosen\na,b,c\n",
        "--data_path: d.csv ... row 1 has more fields",
        "sft",
        "--streaming",
    ),
    of_file("csv that is parquet", "d.csv", copy_of("pairs.parquet"), "--data_path: d.csv"),
    of_file("tsv", "d.tsv", "prompt\tchosen\na\tb\n", "--data_path: d.tsv is of no known kind; expected"),
    of_file("txt", "d.txt", "What?\n", "--data_path: d.txt is of no known kind; expected"),
    of_file("file without a suffix", "d", GOOD, "--data_path: d is of no known kind; expected"),
    of_file("yaml", "d.yaml", "- prompt: a\n", "--data_path: d.yaml is of no known kind; expected"),
    of_file("bz2", "d.jsonl.bz2", b"BZh91AY", "--data_path: d.jsonl.bz2 is of no known kind; expected"),
    of_file("zip", "d.zip", b"PK\3\4", "--data_path: d.zip is of no known kind; expected"),
    of_file("pickle", "d.pkl", b"\x80\x04N.", "--data_path: d.pkl is of no known kind; expected"),
]


def columns(**values: list) -> Maker:
    return table(values)


TABLES = [
    of_file("parquet that is empty", "d.parquet", b"", "--data_path: d.parquet is empty"),
    of_file("parquet of text", "d.parquet", GOOD, "--data_path: d.parquet cannot be read as parquet"),
    of_file(
        "parquet cut off",
        "d.parquet",
        copy_of("pairs.parquet", cut=900),
        "--data_path: d.parquet cannot be read as parquet",
    ),
    of_file(
        "parquet with a torn middle",
        "d.parquet",
        copy_of("pairs.parquet", patch=b"\xff" * 700),
        "--data_path: d.parquet",
    ),
    of_file("parquet of its magic alone", "d.parquet", b"PAR1PAR1", "--data_path: d.parquet cannot be read as parquet"),
    of_file("parquet without rows", "d.parquet", columns(prompt=[], chosen=[], rejected=[]), "--data_path: d.parquet"),
    of_file(
        "parquet of numbers",
        "d.parquet",
        columns(prompt=[1], chosen=[2], rejected=[3]),
        "--data_path: d.parquet, row 1, column 'prompt': found int",
    ),
    of_file(
        "parquet of nulls",
        "d.parquet",
        columns(prompt=[None], chosen=[None], rejected=[None]),
        "--data_path: d.parquet, row 1, column 'prompt'",
    ),
    of_file(
        "parquet of bytes",
        "d.parquet",
        columns(prompt=[b"\xff"], chosen=[b"a"], rejected=[b"b"]),
        "--data_path: d.parquet",
    ),
    of_file("parquet of unknown columns", "d.parquet", columns(a=[1]), "--data_path: d.parquet has the columns a"),
    of_file(
        "parquet of lists",
        "d.parquet",
        columns(prompt=[["a"]], chosen=[["b"]], rejected=[["c"]]),
        "--data_path: d.parquet, row 1, column 'prompt'",
    ),
    of_file(
        "parquet streamed out of gz", "d.parquet.gz", packed(b"PAR1"), "--data_path: d.parquet.gz", "sft", "--streaming"
    ),
    of_file(
        "parquet streamed and cut off",
        "d.parquet",
        copy_of("pairs.parquet", cut=900),
        "--data_path: d.parquet",
        "sft",
        "--streaming",
    ),
    of_file("arrow that is empty", "d.arrow", b"", "--data_path: d.arrow is empty"),
    of_file("arrow of text", "d.arrow", GOOD, "--data_path: d.arrow cannot be read as arrow"),
    of_file("arrow cut off", "d.arrow", copy_of("pairs.arrow", cut=700), "--data_path: d.arrow"),
    of_file("arrow with a torn middle", "d.arrow", copy_of("pairs.arrow", patch=b"\xff" * 400), "--data_path: d.arrow"),
    of_file("arrow of its magic alone", "d.arrow", b"ARROW1\0\0", "--data_path: d.arrow cannot be read as arrow"),
    of_file("arrow of numbers", "d.arrow", columns(prompt=[1], chosen=[2], rejected=[3]), "--data_path: d.arrow"),
    of_file(
        "arrow streamed and cut off",
        "d.arrow",
        copy_of("pairs.arrow", cut=700),
        "--data_path: d.arrow",
        "sft",
        "--streaming",
    ),
    of_file("gz that is empty", "d.jsonl.gz", b"", "--data_path: d.jsonl.gz is empty"),
    of_file("gz of nothing", "d.jsonl.gz", packed(""), "--data_path: d.jsonl.gz"),
    of_file("gz of text", "d.jsonl.gz", GOOD, "--data_path: d.jsonl.gz cannot be read"),
    of_file("gz cut off", "d.jsonl.gz", packed(pairs(300), cut=900), "--data_path: d.jsonl.gz"),
    of_file("gz with more behind it", "d.jsonl.gz", packed(GOOD) + b"more", "--data_path: d.jsonl.gz"),
    of_file("gz with a wrong sum", "d.jsonl.gz", packed(GOOD)[:-8] + b"\0" * 8, "--data_path: d.jsonl.gz"),
    of_file("gz of its magic alone", "d.jsonl.gz", b"\x1f\x8b", "--data_path: d.jsonl.gz"),
    of_file("gz of gz", "d.jsonl.gz", packed(packed(GOOD)), "--data_path: d.jsonl.gz"),
    of_file(
        "gz cut off, streamed",
        "d.jsonl.gz",
        packed(pairs(300), cut=900),
        "--data_path: d.jsonl.gz",
        "sft",
        "--streaming",
    ),
    of_file("gz of another kind", "d.csv.gz", packed(GOOD), "--data_path: d.csv.gz"),
]

PLACES = [
    Case("no such file", "rw_eval", "--data_path nowhere.jsonl", "--data_path: no such file or folder: nowhere.jsonl"),
    Case("no such folder", "sft", "--data_path ./nowhere", "--data_path ./nowhere: no such file or folder"),
    Case("home of nobody", "sft", "--data_path ~nobody-here/x.jsonl", "--data_path ~nobody-here/x.jsonl: no such file"),
    Case("name that is too long", "sft", "--data_path " + "x" * 5000 + ".jsonl", "--data_path xxx"),
    Case(
        "hub name offline",
        "rw_eval",
        "--data_path someone/nothing",
        "someone/nothing is neither a local file or folder nor in the cache",
    ),
    Case("hub name offline, step 1", "sft", "--data_path someone/nothing", "someone/nothing is neither a local file"),
    Case("hub name of three parts", "sft", "--data_path a/b/c", "--data_path a/b/c: no such file or folder"),
    Case("hub name with odd signs", "rw_eval", "--data_path 'so me/thing!'", "--data_path"),
    Case("address of a page", "sft", "--data_path https://example.org/d.jsonl", "--data_path"),
    Case("split of a file", "rw_eval", "--data_path pairs.jsonl#train", "a file has no configurations or splits"),
    Case(
        "sharp without a split",
        "sft",
        "--data_path someone/set#",
        "expected a split, or configuration/split, after the #",
    ),
    Case("name of a weight alone", "sft", "--data_path :0.5", "--data_path"),
    Case(
        "weight of 0 for data",
        "sft",
        "--data_path pairs.jsonl:0",
        "--data_path pairs.jsonl:0: the weight after the colon must",
    ),
    Case(
        "weight below 0 for data",
        "sft",
        "--data_path pairs.jsonl:-1",
        "the weight after the colon must be a number above 0",
    ),
    Case(
        "weight of a word",
        "sft",
        "--data_path pairs.jsonl:heavy",
        "--data_path: pairs.jsonl:heavy is neither a local file",
    ),
    Case("weight for one of two", "sft", "--data_path pairs.jsonl:0.5 b.jsonl", "--data_path", {"b.jsonl": pairs(40)}),
    Case("empty folder", "rw_eval", "--data_path d", "--data_path: d holds no data files", {"d": folder}),
    Case(
        "folder of other files",
        "rw_eval",
        "--data_path d",
        "--data_path: d holds no data files",
        {"d/readme.md": "hello"},
    ),
    Case(
        "folder with a test file alone",
        "rw_eval",
        "--data_path d",
        "--data_path: d has no train split",
        {"d/test.jsonl": pairs(3), "d/eval.jsonl": pairs(3)},
    ),
    Case(
        "folder with a bad file",
        "sft",
        "--data_path d",
        "--data_path: d/train.jsonl, line 1: not valid JSON",
        {"d/train.jsonl": "x", "d/test.jsonl": pairs(3)},
    ),
    Case(
        "folder with a bad test file",
        "sft",
        "--data_path d",
        "--data_path: d/test.jsonl, line 1: not valid JSON",
        {"d/train.jsonl": pairs(40), "d/test.jsonl": "x"},
    ),
    Case(
        "folder with an empty test file",
        "sft",
        "--data_path d",
        "--data_path: d/test.jsonl is empty",
        {"d/train.jsonl": pairs(40), "d/test.jsonl": ""},
    ),
    Case(
        "folder of mixed columns",
        "sft",
        "--data_path d",
        "d/test.jsonl",
        {"d/train.jsonl": pairs(40), "d/test.jsonl": [{"text": "a"}]},
    ),
    Case(
        "no such subfolder",
        "rw_eval",
        "--data_path d#nowhere/train",
        "--data_path d#nowhere/train: no such folder",
        {"d/train.jsonl": pairs(9)},
    ),
    Case(
        "no such split",
        "rw_eval",
        "--data_path d#other",
        "--data_path: d has no split other; it has train",
        {"d/train.jsonl": pairs(9)},
    ),
    Case(
        "saved data set torn",
        "rw_eval",
        "--data_path d",
        "--data_path: cannot read d as a saved data set",
        {"d/dataset_dict.json": "{"},
    ),
    Case(
        "saved data set of nothing",
        "rw_eval",
        "--data_path d",
        "--data_path: ... d",
        {"d/dataset_dict.json": {"splits": []}},
    ),
    Case(
        "saved data set without files",
        "rw_eval",
        "--data_path d",
        "--data_path: cannot read d as a saved data set",
        {"d/state.json": "{}", "d/dataset_info.json": "{}"},
    ),
    Case("pipe", "rw_eval", "--data_path d.jsonl", "--data_path", {"d.jsonl": fifo}),
    Case("pipe, step 1", "sft", "--data_path d.jsonl", "--data_path", {"d.jsonl": fifo}),
    Case("pipe in a folder", "rw_eval", "--data_path d", "--data_path: d holds no data files", {"d/train.jsonl": fifo}),
    Case("device of zeros", "rw_eval", "--data_path /dev/zero", "--data_path"),
    Case("link to a device", "sft", "--data_path d.jsonl", "--data_path", {"d.jsonl": link("/dev/zero")}),
    Case("link in a circle", "rw_eval", "--data_path d.jsonl", "--data_path", {"d.jsonl": link("d.jsonl")}),
    Case(
        "link to nothing",
        "sft",
        "--data_path d.jsonl",
        "--data_path d.jsonl: no such file",
        {"d.jsonl": link("gone.jsonl")},
    ),
    Case(
        "folder of links in a circle",
        "rw_eval",
        "--data_path d",
        "--data_path: d holds no data files",
        {"d/a/b": link("..")},
    ),
    Case(
        "folder called as a file",
        "rw_eval",
        "--data_path d.jsonl",
        "--data_path: d.jsonl holds no data files",
        {"d.jsonl": folder},
    ),
    Case(
        "local/jsonfile without data",
        "sft",
        "--data_path local/jsonfile",
        "--data_path local/jsonfile: expected train.json and eval.json",
    ),
    Case(
        "no such column",
        "sft",
        "--chosen_column best",
        "--chosen_column best: pairs.jsonl (--data_path) has no such column",
    ),
    Case(
        "data of step 1 alone",
        "sft",
        "--sft_only_data_path nowhere.jsonl",
        "--sft_only_data_path nowhere.jsonl: no such file",
    ),
    Case(
        "bad data of step 1 alone",
        "sft",
        "--sft_only_data_path d.jsonl",
        "--sft_only_data_path: d.jsonl, line 1: not valid JSON",
        {"d.jsonl": "x"},
    ),
    Case(
        "plain text that is nowhere", "remax", "--unsupervised_dataset_name nowhere.txt", "--unsupervised_dataset_name"
    ),
    Case(
        "plain text without a column",
        "remax",
        "--unsupervised_dataset_name d.jsonl",
        "--unsupervised_dataset_name",
        {"d.jsonl": [{"a": 1}] * 40},
    ),
    Case(
        "plain text that is empty",
        "remax",
        "--unsupervised_dataset_name d.jsonl",
        "--unsupervised_dataset_name",
        {"d.jsonl": [{"text": ""}] * 40},
    ),
    Case(
        "plain text that is too short",
        "remax",
        "--unsupervised_dataset_name d.jsonl",
        "--unsupervised_dataset_name",
        {"d.jsonl": [{"text": "a"}]},
    ),
    Case(
        "data of the doctor",
        "doctor",
        "--data_path d.jsonl",
        "--data_path: d.jsonl, line 1: not valid JSON",
        {"d.jsonl": "x"},
    ),
]

MESSAGES = [
    of_rows("message without a role", dialogue({"content": "a"}), "line 2, column 'messages': expected messages"),
    of_rows("message without content", dialogue({"role": "user"}), "line 2, column 'messages': "),
    of_rows("message that is a text", dialogue("a"), "line 2"),
    of_rows("messages that are texts", [{"messages": ["a", "b"]}], "line 1, column 'messages': expected messages"),
    of_rows("messages that are one text", [{"messages": "a"}], "line 1, column 'messages'"),
    of_rows("messages that are null", [{"messages": [USER, ANSWER]}, {"messages": None}], "line 2, column 'messages'"),
    of_rows("no messages", dialogue(), "line 2, column 'messages': found an empty list"),
    of_rows("messages are a number", [{"messages": 3}], "line 1, column 'messages'"),
    of_rows("unknown role", dialogue({"role": "bot", "content": "a"}), "role 'bot' is not supported, expected system"),
    of_rows(
        "role of a tool", dialogue(USER, {"role": "tool", "content": "a"}), "role 'tool' is not supported with tools"
    ),
    of_rows("role that is a number", dialogue(USER, {"role": 3, "content": "a"}), "line 2"),
    of_rows("role that is null", dialogue(USER, {"role": None, "content": "a"}), "role None is not supported"),
    of_rows(
        "content that is null",
        dialogue(USER, {"role": "assistant", "content": None}),
        "the content of a message is NoneType",
    ),
    of_rows(
        "content that is a list",
        [{"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}],
        "line 1",
    ),
    of_rows(
        "last message is the user's",
        dialogue(USER, ANSWER, USER),
        "line 2, column 'messages': the last message must be the assistant's",
    ),
    of_rows(
        "answer without a question",
        dialogue(ANSWER),
        "line 2, column 'messages': expected a user's message before the answer",
    ),
    of_rows(
        "two answers in a row", dialogue(USER, ANSWER, ANSWER), "line 2, column 'messages': expected a user's message"
    ),
    of_rows(
        "system alone", dialogue({"role": "system", "content": "a"}), "line 2, column 'messages': the last message must"
    ),
    of_rows(
        "tools beside messages",
        [{"messages": [USER, ANSWER], "tools": [{"name": "a"}]}],
        "line 1, column 'tools': tools are not supported",
    ),
    of_rows("answers that are no list", [{"prompt": "a", "answers": "b"}], "line 1, column 'answers': found str"),
    of_rows(
        "answers that are null",
        [{"prompt": "a", "answers": ["b", "c"]}, {"prompt": "a", "answers": None}],
        "line 2, column 'answers': found missing or null",
    ),
    of_rows("answers that are numbers", [{"prompt": "a", "answers": [1, 2]}], "line 1, column 'answers[1]'"),
    of_rows(
        "scores of another length",
        [{"prompt": "a", "answers": ["b", "c"], "scores": [1]}],
        "line 1, column 'scores': found 1 numbers for 2 answers",
    ),
    of_rows(
        "scores that are texts",
        [{"prompt": "a", "answers": ["b", "c"], "scores": ["1", "2"]}],
        "line 1, column 'scores': found str '1', expected a number",
    ),
    of_rows(
        "scores and ranks",
        [{"prompt": "a", "answers": ["b", "c"], "scores": [1, 2], "ranks": [2, 1]}],
        "line 1, column 'scores': ranks give an order too",
    ),
    of_rows(
        "ranks that are true",
        [{"prompt": "a", "answers": ["b", "c"], "ranks": [True, False]}],
        "line 1, column 'ranks': found bool",
    ),
]

DEEP = [
    of_file("nested 100,000 deep", "d.jsonl", nested(100_000), "--data_path: d.jsonl, line 1: nested too deep"),
    of_file(
        "nested 100,000 deep, step 1",
        "d.jsonl",
        nested(100_000),
        "--data_path: d.jsonl, line 1: nested too deep",
        "sft",
    ),
    of_file("nested 2,000 deep", "d.jsonl", nested(2_000), "--data_path: d.jsonl, line 1: nested too deep"),
    of_file(
        "objects 100,000 deep",
        "d.jsonl",
        '{"prompt": ' * 100_000 + "1" + "}" * 100_000,
        "--data_path: d.jsonl, line 1: nested too deep",
    ),
    of_file("open brackets alone", "d.jsonl", "[" * 100_000, "--data_path: d.jsonl"),
    of_file(
        "list nested 100,000 deep", "d.json", "[" + nested(100_000) + "]", "--data_path: d.json ... nested too deep"
    ),
    of_file(
        "nested deep, streamed",
        "d.jsonl",
        nested(100_000),
        "--data_path: d.jsonl, line 1: nested too deep",
        "sft",
        "--streaming",
    ),
    of_file(
        "number of 5000 digits",
        "d.jsonl",
        f'{{"prompt": {"9" * 5000}}}',
        "--data_path: d.jsonl, line 1: Exceeds the limit",
    ),
    of_file("csv with a column twice", "d.csv", "prompt,chosen,chosen\na,b,c\n", "--data_path: d.csv ... chosen"),
    of_file("gz of 100 megabytes of zeros", "d.jsonl.gz", bomb, "--data_path: d.jsonl.gz, line 1: longer than"),
]

CASES = [*DEEP, *JSON_LINES, *JSON_LISTS, *CSV, *TABLES, *PLACES, *MESSAGES]
