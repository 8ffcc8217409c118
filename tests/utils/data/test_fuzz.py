"""Any file on its way to batches: it is refused by a stated error, or every row is in a batch or in the record."""

import csv
import io
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.data.batches import PromptBatch, RankedBatch
from utils.data.config import DataConfig
from utils.data.loaders import build_loaders
from utils.run import UserError

SETTINGS = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PIECES = [
    "\n\nHuman: ",
    "\n\nAssistant:",
    "Assistant:",
    "a",
    "b ",
    " yes",
    "1",
    "é",
    "猫",
    "🙂",
    "\x00",
    "\u2028",
    "<s>",
    "</s>",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=5).map("".join) | st.text(max_size=8)
DIALOGUES = TEXTS.map(lambda text: f"\n\nHuman: {text}\n\nAssistant:")
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXTS}), max_size=4
)
ANSWERED = st.tuples(TEXTS, TEXTS).map(
    lambda both: [{"role": "user", "content": both[0]}, {"role": "assistant", "content": both[1]}]
)
THREE = st.lists(TEXTS, min_size=3, max_size=3)
NUMBERS = st.integers(-2, 3) | st.floats() | st.none()
ODD = st.none() | st.integers(-3, 3) | st.floats() | st.booleans() | st.lists(TEXTS, max_size=2)
COLUMNS = {
    "pairs": {"prompt": DIALOGUES | TEXTS, "chosen": TEXTS, "rejected": TEXTS},
    "margins": {"prompt": DIALOGUES, "chosen": TEXTS, "rejected": TEXTS, "margin": st.floats() | st.none()},
    "dialogues": {"chosen": DIALOGUES | TEXTS, "rejected": DIALOGUES},
    "conversations": {"prompt": MESSAGES, "chosen": ANSWERED, "rejected": ANSWERED},
    "best first": {"prompt": TEXTS, "answers": st.lists(TEXTS, max_size=4)},
    "scores": {"prompt": DIALOGUES, "answers": THREE, "scores": st.lists(NUMBERS, min_size=3, max_size=3)},
    "ranks": {"prompt": DIALOGUES, "answers": st.lists(ANSWERED, min_size=2, max_size=2), "ranks": st.just([1, 2])},
    "odd ranks": {"prompt": TEXTS, "answers": THREE | ODD, "ranks": st.lists(NUMBERS, min_size=2, max_size=4) | ODD},
    "completions": {"prompt": TEXTS, "completion": TEXTS},
    "messages": {"messages": ANSWERED | MESSAGES},
    "prompts": {"prompt": TEXTS},
    "text": {"text": TEXTS},
    "odd": {"prompt": TEXTS | ODD, "chosen": TEXTS | ODD, "rejected": TEXTS},
}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SERVES = {"completions": (0, 2), "messages": (0, 2), "prompts": (2,), "text": (0,)}  # others serve all stages


def sound(shape: str) -> list[dict]:
    """Rows that can be used, so that a file is not refused for having none."""
    values = {
        "prompt": "\n\nHuman: {}\n\nAssistant:",
        "chosen": " {}",
        "rejected": " no",
        "margin": 1.5,
        "text": "a {}",
    }
    values |= {"completion": "yes {}"}
    if shape == "dialogues":
        values |= {"chosen": "\n\nHuman: {}\n\nAssistant: a", "rejected": "\n\nHuman: {}\n\nAssistant: b"}
    rows = []
    for i in range(12):
        row = {name: v.format(i) if isinstance(v, str) else v for name, v in values.items() if name in COLUMNS[shape]}
        if "answers" in COLUMNS[shape]:
            row |= {"answers": [f" {i}", " no", " maybe"]}
            row |= {name: [3, 1.5, 1.5] for name in ("scores", "ranks") if name in COLUMNS[shape]}
        if shape in ("conversations", "messages", "ranks"):
            user, assistant = ({"role": role, "content": f"{role[0]}{i}"} for role in ("user", "assistant"))
            row = {"messages": [user, assistant]}
            if shape == "ranks":
                row = {"answers": [[user, {**assistant, "content": text}] for text in "ab"], "ranks": [1, 2]}
                row["prompt"] = f"u{i}"
            if shape == "conversations":
                row = {"prompt": [user], "chosen": [user, assistant], "rejected": [user, {**assistant, "content": "b"}]}
        rows.append(row)
    return rows


FILES = st.sampled_from(sorted(COLUMNS)).flatmap(
    lambda shape: st.tuples(
        st.sampled_from(SERVES.get(shape, (0, 1, 2))),
        st.lists(st.fixed_dictionaries(COLUMNS[shape]), min_size=1, max_size=8).map(lambda rows: sound(shape) + rows),
    )
)


def content(rows: list[dict], suffix: str) -> str:
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    if suffix == ".json":
        return json.dumps(rows)
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def to_batches(tokenizer, data: bytes, suffix: str, stage: int, **options) -> tuple[int, int, int] | None:
    """(rows read, rows in the record as dropped, rows in batches); None when the file is refused."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"rows{suffix}"
        file.write_bytes(data)
        split = ",".join("1" if k == stage else "0" for k in range(3))
        options |= {"cache_dir": f"{folder}/cache", "record_in": folder, "data_split": split}
        config, sizes = DataConfig(data_path=[str(file)], **options), {"train_batch_size": 1, "eval_batch_size": 2}
        try:
            loaders = build_loaders(config, stage=stage, tokenizer=tokenizer, max_len=40, **sizes)
        except UserError as error:
            assert str(error).startswith("--") and "\n" not in str(error)
            return None
        batched = 0
        for loader in loaders:
            for batch in loader:
                batched += int(batch.weight.sum())
                check(batch)
        entries = json.loads((Path(folder) / "data.json").read_text(encoding="utf-8"))["data"]
        dropped = sum(reason["rows"] for entry in entries for reason in entry["dropped"].values())
        return next(entry["rows"] for entry in entries if "split" in entry), dropped, batched


def check(batch) -> None:
    """No batch holds a row without a prompt or, where answers are learned, without a token of one."""
    if isinstance(batch, PromptBatch):
        assert (batch.lengths >= 1).all()
        return
    assert (batch.prompt_lengths >= 1).all()
    if isinstance(batch, RankedBatch):  # every row has answers of at least two ranks
        for row in range(len(batch)):
            assert len(batch.ranks[batch.row == row].unique()) >= 2
    for name in ("lengths", "chosen_lengths", "rejected_lengths"):
        if (lengths := getattr(batch, name, None)) is not None:
            assert (lengths > batch.prompt_lengths).all() and (lengths <= 40).all()
    if getattr(batch, "loss_mask", None) is not None:
        assert (batch.loss_mask.sum(1) >= 1).all()
    if getattr(batch, "margin", None) is not None:
        assert batch.margin.isfinite().all()


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folders):
    from utils.tokenizer import load_tokenizer

    plain = [load_tokenizer(str(tokenizer_folders[kind])) for kind in ("gpt2", "llama", "slow")]
    chatting = [load_tokenizer(str(tokenizer_folders[kind]), chat_template=TEMPLATE) for kind in ("qwen", "llama")]
    return plain + chatting


@SETTINGS
@given(
    file=FILES,
    suffix=st.sampled_from([".jsonl", ".json", ".csv"]),
    kind=st.integers(0, 4),
    overlong=st.sampled_from([None, "cut", "drop"]),
    train_on=st.sampled_from(["last", "all"]),
)
def test_every_row_is_in_a_batch_or_in_the_record(tokenizers, file, suffix, kind, overlong, train_on):
    stage, rows = file
    data = content(rows, suffix).encode("utf-8", "surrogatepass")
    found = to_batches(tokenizers[kind], data, suffix, stage, overlong=overlong, train_on=train_on)
    if found:
        read, dropped, batched = found
        assert read == dropped + batched
        assert read == len(rows) or suffix == ".csv"  # a csv reader leaves out lines without any value


@SETTINGS
@given(
    file=FILES,
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet", ".arrow"]),
    cut=st.integers(0, 200),
    noise=st.binary(max_size=6),
)
def test_broken_files_are_refused_by_a_stated_error(tokenizers, file, suffix, cut, noise):
    rows = file[1]
    plain = ".jsonl" if suffix not in (".json", ".csv") else suffix
    data = content(rows, plain).encode("utf-8", "surrogatepass")
    found = to_batches(tokenizers[0], data[:cut] + noise + data[cut:], suffix, 0)
    assert found is None or found[0] == found[1] + found[2]
