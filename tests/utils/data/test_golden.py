"""What the data room makes of a fixed corpus, pinned for each version of its code.

A cache is found again by the version constant beside the code that filled it. So whoever changes the rows must raise
the constant, or tokens of older code would be used without a word; and whoever does not need not tokenize anew.
"""

import hashlib
import json
import runpy
from itertools import chain
from pathlib import Path

import pytest

from utils.data.adapters import ADAPTERS
from utils.data.chat import ChatTemplate
from utils.data.encoding import ENCODING_VERSION, Encoder
from utils.data.loaders import ORDER_VERSION, EpochSampler
from utils.data.preferences import READING_VERSION, load_data_set
from utils.data.shapes import Form, finish
from utils.data.splits import blend, stage_indices
from utils.data.streamed_set import is_held_out, stage_of
from utils.data.streaming import blended, shuffled
from utils.data.text import BLOCKS_VERSION, blocks

EXAMPLES = sorted((Path(__file__).parents[2] / "data").iterdir())  # a file of every accepted shape
COLUMNS = {"own_columns.jsonl": {"prompt": "question", "chosen": "good", "rejected": "bad"}}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK = "\n\nHuman: {}\n\nAssistant:"
EDGES = [
    {"prompt": ASK.format("Why?"), "chosen": " Because.", "rejected": " Because.", "margin": 1.0},
    {"prompt": ASK.format("Why not?"), "chosen": " ", "rejected": " No", "margin": None},
    {"prompt": ASK.format("so " * 40), "chosen": " yes", "rejected": " no", "margin": -0.5},
    {"prompt": ASK.format("é"), "chosen": " long" * 60, "rejected": " long" * 60 + " no", "margin": 2.0},
    {"prompt": " ", "chosen": " yes", "rejected": " no", "margin": 0.0},
    {"prompt": ASK.format("a\n\nAssistant: b\n\nHuman: c"), "chosen": " d<end>", "rejected": "e", "margin": 3.0},
]
OPTIONS = [
    *(("supervised", {"overlong": cut, "train_on": learned}) for cut in ("cut", "drop") for learned in ("last", "all")),
    *((kind, {"overlong": cut}) for kind in ("ranking", "ranked", "prompts") for cut in ("cut", "drop")),
]
# {constant: {its value: {what: digest}}}
GOLDEN = {
    "READING_VERSION": {
        2: {
            "alpaca.jsonl": "eae588a5de675a13",
            "best_first.json": "8201bee6801a59ff",
            "completions.csv": "595509e6f359d944",
            "conversations.jsonl": "370158e2962d75fc",
            "dialogues.jsonl": "2fd922c523280309",
            "labelled.jsonl": "006fa6c746d804c5",
            "messages.json": "50b425c4d2fcf48c",
            "own_columns.jsonl": "5f5c808eca8e6477",
            "pairs.arrow": "61275122235d9119",
            "pairs.jsonl": "831c7ecfc8c2d819",
            "pairs.jsonl.gz": "831c7ecfc8c2d819",
            "pairs.parquet": "61275122235d9119",
            "prompts.jsonl": "64f6064ff6b706ab",
            "ranked.jsonl": "fb46bbf01242712e",
            "sharegpt.jsonl": "f4b9417d03b1ed6d",
            "text.jsonl": "624fe45f5717d7c7",
            "whole_conversations.jsonl": "5f5c808eca8e6477",
            "edges.jsonl": "8da0fb3d7f8b0e3c",
            "adapters": "fb8248920ff15089",
        }
    },
    "ENCODING_VERSION": {
        2: {
            "supervised cut last": "2398bb98877904ae",
            "supervised cut all": "6a0cc54328ead01e",
            "supervised drop last": "978b9fd259a8db46",
            "supervised drop all": "2c7b8f8ad31fd2c4",
            "ranking cut": "98a45d304f69f7cf",
            "ranking drop": "202d4a8b1e607f53",
            "ranked cut": "f25212af0bec9744",
            "ranked drop": "a4882e16726dd3f7",
            "prompts cut": "4852dc06186e4ab8",
            "prompts drop": "b936f43f717b5af3",
        }
    },
    "BLOCKS_VERSION": {1: {"3": "08dcee9ac1c61348", "8": "de451cbc5e2f41d8"}},
    "ORDER_VERSION": {
        1: {
            "repeated prompts": "9600be79508d58b0",
            "single prompts": "5d3b0c74f94d14be",
            "two prompts": "45a5e83fadd88fa3",
            "blend": "f21fd2dd59c48fee",
            "epoch": "b70ebf87724acd49",
            "streamed stages": "00320cc14892fbcb",
            "streamed order": "8f2c0af890d06c89",
            "held out": "18a88913b0cb5f61",
        }
    },
}


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def check(constant: str, file: str, version: int, found: dict) -> None:
    """Compares with the digests of this version."""
    known = GOLDEN[constant]
    table = f"GOLDEN[{constant!r}] in {Path(__file__).name}"
    assert known.keys() == {version}, (
        f"{constant} is {version}: {table} must be {{{version}: {found}}}, and no other one"
    )
    assert found == known[version], (
        f"the rows of version {version} have changed: if that is meant, raise {constant} beside the code in "
        f"utils/data/{file}.py to {version + 1}, so that no older cache is used for it, and let {table} be "
        f"{{{version + 1}: {found}}}"
    )


@pytest.fixture(scope="module")
def bpe():
    """A tokenizer that nothing trains: bytes, and a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("Ġ", "a"),
        ("Ġ", "t"),
        ("h", "e"),
        ("Ġt", "he"),
        ("i", "s"),
        ("Ġ", "is"),
        ("Ċ", "Ċ"),
        ("s", "o"),
        (":", "Ġ"),
    ]
    words = ["<end>", "<pad>", *alphabet, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", chat_template=CHATML)


@pytest.fixture(scope="module")
def texts(tmp_path_factory, bpe) -> dict[str, list[dict]]:
    """{file: its rows as text, without and with a chat template}, in the order of the file."""
    folder = tmp_path_factory.mktemp("golden")
    found = {}
    edges = folder / "edges.jsonl"
    edges.write_text("".join(json.dumps(row) + "\n" for row in EDGES))
    for path in (*EXAMPLES, edges):
        for template in (None, ChatTemplate(bpe)):
            form = Form(COLUMNS.get(path.name, {}), template)
            splits = load_data_set(str(path), cache_dir=str(folder / "cache"), form=form, announce=False)
            rows = sorted((row for split in splits for row in split), key=lambda row: int(row["origin"].split()[-1]))
            found.setdefault(path.name, []).append(rows)
    return found


def test_reading(texts):
    found = {name: digest(rows) for name, rows in texts.items()}
    known = runpy.run_path(str(Path(__file__).with_name("test_adapters.py")))["KNOWN"]
    found["adapters"] = digest([vars(finish(ADAPTERS[name](row))) for name, row, _ in known])
    check("READING_VERSION", "preferences", READING_VERSION, found)


def test_encoding(texts, bpe):
    found = {}
    for kind, options in OPTIONS:
        rows = [
            Encoder(kind, bpe, max_len, **options).encode({name: [row[name] for row in some] for name in some[0]})
            for some in chain.from_iterable(texts.values())
            for max_len in (24, 60, 300)
        ]
        found[" ".join((kind, *options.values()))] = digest(rows)
    check("ENCODING_VERSION", "encoding", ENCODING_VERSION, found)


def test_blocks(bpe):
    documents = {"content": ["The cat is so-so.\n\nIs it?", "", None, "the end"]}
    found = {str(n): digest(blocks(documents, column="content", tokenizer=bpe, block=n)) for n in (3, 8)}
    check("BLOCKS_VERSION", "text", BLOCKS_VERSION, found)


def test_order(tmp_path):
    keys = [i * i % 53 for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?", "chosen": "a"}) + "\n" for i in keys))
    held_out = load_data_set(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path))
    streams = [iter(range(start, start + 50)) for start in (0, 100)]
    sampler = EpochSampler(50, 4, rank=1, world_size=2, seed=3)
    sampler.set_epoch(2)
    found = {
        "repeated prompts": digest([stage_indices(keys, "2,4,4", stage) for stage in range(3)]),
        "single prompts": digest([stage_indices(range(100), "1,0,3", stage, 5) for stage in (0, 2)]),
        "two prompts": digest([stage_indices([1, 2] * 9, "1,1,1", stage) for stage in range(3)]),
        "blend": digest(blend([50, 80, 9], [0.5, 1, 0.25])),
        "epoch": digest(list(sampler)),
        "streamed stages": digest([(stage_of(key, [2, 4, 4], 7), is_held_out(key)) for key in range(999)]),
        "streamed order": digest(list(map(int, shuffled(blended(streams, [1, 3]), 16, 2023, 1)))),
        "held out": digest([rows["origin"][:] for rows in held_out]),
    }
    check("ORDER_VERSION", "loaders", ORDER_VERSION, found)
