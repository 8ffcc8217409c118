"""The table of docs/data.md, row by row: what it says is accepted is, and serves the steps that it says."""

import re
from pathlib import Path

import pytest

from utils.data.batches import RankedBatch
from utils.data.config import DataConfig
from utils.data.loaders import build_loaders
from utils.run import UserError

ROOT = Path(__file__).resolve().parents[3]
REAL = ROOT.parent / "shared" / "data"
ROW = re.compile(
    r"^\| \[[^\]]+\]\(\.\./tests/data/(?P<file>[^)]+)\)(?P<flags>[^|]*) \|[^|]+\|(?P<steps>.+)\|$", re.MULTILINE
)
COLLECTION = ROOT / "docs" / "data.md"
EXAMPLES = {
    found["file"]: (found["flags"], [step.strip() != "–" for step in found["steps"].split("|")])
    for found in ROW.finditer(COLLECTION.read_text(encoding="utf-8"))
}


def test_every_example_file_is_in_the_table():
    assert set(EXAMPLES) == {path.name for path in (ROOT / "tests" / "data").iterdir()}
    assert len(EXAMPLES) > 10 and all(len(steps) == 3 for _, steps in EXAMPLES.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_serves_the_steps_that_the_table_says(tmp_path, gpt2, name):
    flags, serves = EXAMPLES[name]
    columns = dict(re.findall(r"--(prompt|chosen|rejected)_column (\w+)", flags))
    for stage, accepted in enumerate(serves):
        path, options = str(ROOT / "tests" / "data" / name), {"cache_dir": str(tmp_path), "data_split": "1,1,1"}
        config = DataConfig(data_path=[path], columns=columns, **options)
        sizes = {"max_len": 300, "train_batch_size": 1, "eval_batch_size": 1}
        if not accepted:
            with pytest.raises(UserError, match=f"step {stage + 1} (learns|starts) from"):
                build_loaders(config, stage=stage, tokenizer=gpt2, **sizes)
            continue
        train, held_out = build_loaders(config, stage=stage, tokenizer=gpt2, **sizes)
        assert len(train) in (1, 2) and len(held_out) == 1  # six rows, one of them held out, over three steps
        for batch in (*train, *held_out):
            text = "".join(gpt2.decode(ids[0]) for name, ids in vars(batch).items() if name.endswith("_ids"))
            assert (isinstance(batch, RankedBatch)) == (stage == 1 and name in ("ranked.jsonl", "best_first.json"))
            assert name == "text.jsonl" or ("Human: " in text and text.count("Assistant:") >= 1)


@pytest.mark.skipif(not REAL.is_dir(), reason="the sample data is not beside this repository")
@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("formats/hh_dialogue", (0, 1, 2)),
        ("formats/conversational", (0, 1, 2)),
        ("formats/prompt_completion", (0, 2)),
        ("alpaca_prefs/test.jsonl.gz", (1,)),
    ],
)
def test_real_data_of_every_shape_gives_batches(tmp_path, gpt2, name, stages):
    for stage in stages:
        config = DataConfig(data_path=[str(REAL / name)], cache_dir=str(tmp_path))
        sizes = {"max_len": 256, "train_batch_size": 8, "eval_batch_size": 8}
        train, _ = build_loaders(config, stage=stage, tokenizer=gpt2, **sizes)
        batch = next(iter(train))
        assert len(batch) == 8
        assert stage != 1 or (batch.margin is not None) == name.startswith("alpaca")
