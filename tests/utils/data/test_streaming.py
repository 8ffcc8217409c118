import json
import os
import subprocess
import sys
from itertools import islice

import pytest
import torch

from utils.data.batches import PairBatch, PromptBatch
from utils.data.config import DataConfig
from utils.data.loaders import build_loaders
from utils.data.streaming import blended, build_streaming_loaders, open_streams, shuffled
from utils.run import UserError

ROWS = [
    {"prompt": f"\n\nHuman: What is {i}?\n\nAssistant:", "chosen": f" It is {i}.", "rejected": f" No {i}."}
    for i in range(250)
]
MANY = [{**ROWS[0], "prompt": f"\n\nHuman: Who is {i}?\n\nAssistant:"} for i in range(8000)]


@pytest.fixture
def folder(tmp_path):
    """240 rows to train and 10 to evaluate."""
    for name, rows in (("train", ROWS[:240]), ("test", ROWS[240:])):
        write(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SIZES = {"max_len": 96, "train_batch_size": 4, "eval_batch_size": 4, "batches": 100, "rank": 0, "world_size": 1}


def build(tokenizer, stage, data_path, more=(), **changes):
    sizes = {name: changes.pop(name, usual) for name, usual in SIZES.items()}
    options = {"data_path": data_path, "sft_only_data_path": more, "streaming": True, "shuffle_buffer": 20}
    config = DataConfig(**{**options, **changes})
    streams = open_streams(config, stage, tokenizer)
    return build_streaming_loaders(streams, config, stage=stage, tokenizer=tokenizer, **sizes)


def rows_of(loader, pad: int) -> list[tuple]:
    """What each row of the batches holds, without its padding."""
    rows = []
    for batch in loader:
        for k in range(len(batch.weight)):
            row = {name: values[k].tolist() for name, values in vars(batch).items() if torch.is_tensor(values)}
            row = {k: [i for i in v if i != pad] if isinstance(v, list) else v for k, v in row.items()}
            rows.append(tuple(sorted((name, str(value)) for name, value in row.items())))
    return rows


def texts(tokenizer, loader) -> list[list[str]]:
    """The first answer, or the prompt, of each row of each batch."""
    found = []
    for batch in loader:
        pairs = isinstance(batch, PairBatch)
        ids, lengths = (batch.chosen_ids, batch.chosen_lengths) if pairs else (batch.input_ids, batch.lengths)
        answers = (tokenizer.decode(row[:n]) for row, n in zip(ids, lengths.tolist(), strict=True))
        found.append(batch.prompts if isinstance(batch, PromptBatch) else list(answers))
    return found


# ------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("stage", range(3))
def test_the_batches_hold_the_same_rows_as_without_streaming(folder, gpt2, stage, capsys):
    # Also rows that are dropped, in the text and in tokens, and cut.
    odd = [ROWS[5], {**ROWS[6], "chosen": " "}, {**ROWS[7], "prompt": "\n\nHuman: " + "long " * 60 + "\n\nAssistant:"}]
    odd += [{**ROWS[8], "chosen": " long" * 60}, {**ROWS[9], "rejected": ROWS[9]["chosen"]}]
    write(folder / "train.jsonl", ROWS[:240] + odd)
    split = ",".join("1" if k == stage else "0" for k in range(3))
    options = {"data_split": split, "record_in": folder / "run"}
    streamed = build(gpt2, stage, [str(folder)], train_batch_size=1, **options)
    rows = [rows_of(loader, gpt2.pad_token_id) for loader in streamed]
    reported = capsys.readouterr().out
    record = json.loads((folder / "run" / "data.json").read_text())
    config = DataConfig(data_path=[str(folder)], cache_dir=str(folder / "cache"), **options)
    stored = build_loaders(config, stage=stage, tokenizer=gpt2, max_len=96, train_batch_size=1, eval_batch_size=4)
    expected = [rows_of(loader, gpt2.pad_token_id) for loader in stored]
    assert sorted(rows[0]) == sorted(expected[0]) and rows[1] == expected[1]
    # What was dropped and cut is told in the same words, and stands in the record.
    for line in capsys.readouterr().out.splitlines():
        if "dropped" in line or "too long" in line:
            assert line.split(": ", 1)[1].split(" rows of ")[0] in reported
    entry, without = record["data"][0], json.loads((folder / "run" / "data.json").read_text())["data"]
    encoded = next(found for found in without if found.get("part") == "train")
    assert record["streaming"] and record["first_epoch_complete"] and record["code"] and record["tokenizer"]
    assert (entry["rows"], entry["dropped"]) == (245, without[0]["dropped"])
    assert entry["unusable"] == encoded["dropped"] and entry["kept"] == encoded["kept"] == len(rows[0])
    assert all(entry[name] == encoded[name] for name in ("cut_prompts", "cut_answers"))


def test_ranked_answers_reach_the_batches(tmp_path, gpt2, capsys):
    rows = [
        {"prompt": row["prompt"], "answers": [f" {i}", " b", " b", " c"], "scores": [1, 3, 3, i % 3]}
        for i, row in enumerate(ROWS)
    ]
    write(tmp_path / "train.jsonl", rows[:240])
    write(tmp_path / "test.jsonl", rows[240:])
    options = {"data_split": "0,1,0", "record_in": tmp_path}
    config = DataConfig(data_path=[str(tmp_path)], cache_dir=str(tmp_path / "cache"), **options)
    sizes = {"max_len": 96, "train_batch_size": 1, "eval_batch_size": 1}
    expected = build_loaders(config, stage=1, tokenizer=gpt2, **sizes)[0]
    said = capsys.readouterr().out
    stored = json.loads((tmp_path / "data.json").read_text())["data"]
    train = build(gpt2, 1, [str(tmp_path)], train_batch_size=1, **options)[0]
    as_lists = [
        sorted([value.tolist() for value in vars(batch).values()] for batch in loader) for loader in (train, expected)
    ]
    assert as_lists[0] == as_lists[1] and len(as_lists[0]) == 240
    assert "(train): 240 answers of 240 rows left out" in said and "(train): 240 answers of" in capsys.readouterr().out
    entry = json.loads((tmp_path / "data.json").read_text())["data"][0]
    assert entry["kind"] == "ranked" and entry["answers_left_out"] == 240 in [e.get("answers_left_out") for e in stored]
    pairs = build(gpt2, 1, [str(tmp_path)], best_and_worst=True, data_split="0,1,0")[0]
    assert isinstance(next(iter(pairs)), PairBatch)
    with pytest.raises(UserError, match="--use_margin: the data ranks several answers to a prompt"):
        build(gpt2, 1, [str(tmp_path)], need_margin=True)


def test_learned_turns_and_margins_reach_the_batches(tmp_path, gpt2):
    def message(i, role):
        return {"role": role, "content": f"{role} {i}"}

    turns = [{"messages": [message(i, r) for r in ("user", "assistant") * 2]} for i in range(100)]
    train, _ = build(gpt2, 0, [write(tmp_path / "x.jsonl", turns)], train_on="all", data_split="1,0,0")
    assert all(batch.loss_mask.any(1).all() for batch in train)
    rows = [{**row, "margin": i / 4} for i, row in enumerate(ROWS)]
    train, _ = build(gpt2, 1, [write(tmp_path / "y.jsonl", rows)], need_margin=True, train_batch_size=1)
    for batch, (text,) in zip(train, texts(gpt2, train), strict=True):
        number = text.split("It is ")[1].split(".")[0]
        assert batch.margin.tolist() == [int(number) / 4]
    with pytest.raises(UserError, match="--use_margin: none of the first rows has a number in a column `margin`"):
        build(gpt2, 1, [write(tmp_path / "z.jsonl", ROWS)], need_margin=True)
    assert next(iter(build(gpt2, 1, [str(tmp_path / "y.jsonl")])[0])).margin is None


def test_more_data_for_step_1_serves_it_wholly(tmp_path, folder, gpt2):
    more = [{"prompt": f"\n\nHuman: More {i}?\n\nAssistant:", "completion": " yes"} for i in range(60)]
    (tmp_path / "more").mkdir()
    write(tmp_path / "more/train.jsonl", more)
    write(tmp_path / "more/test.jsonl", more[:1])
    train, held_out = build(gpt2, 0, [str(folder)], [str(tmp_path / "more")], train_batch_size=1)
    found = [text for (text,) in texts(gpt2, train)]
    assert sum("More" in text for text in found) == 60 and 20 < len(found) - 60 < 80  # a fifth of 240: 48 +- 6
    assert sum(batch.weight.sum() for batch in held_out) == 11


# ------------------------------------------------------------------------------------------------------------ ranks


@pytest.mark.parametrize("stage", range(3))
def test_a_steps_rows_are_the_same_on_one_and_two_ranks(folder, gpt2, stage):
    alone = texts(gpt2, build(gpt2, stage, [str(folder)])[0])
    ranks = [
        texts(gpt2, build(gpt2, stage, [str(folder)], train_batch_size=2, rank=rank, world_size=2)[0])
        for rank in range(2)
    ]
    assert len(alone) == len(ranks[0]) == len(ranks[1]) > 5  # also where the last step has too few rows
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(step) for step in alone]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loader_goes_on_where_another_stopped(folder, gpt2, world_size):
    def loader(rank=0, world_size=1):
        size = 4 // world_size
        return build(gpt2, 2, [str(folder)], train_batch_size=size, rank=rank, world_size=world_size)[0]

    first = loader()
    first.sampler.set_epoch(1)
    expected = texts(gpt2, first)
    other = loader()
    other.sampler.set_epoch(1)
    batches = iter(other)
    for _ in range(3):
        next(batches)
    state = json.loads(json.dumps(other.sampler.state_dict()))
    assert {**state, "digest": None} == {"epoch": 1, "position": 12, "digest": None}
    rests = []
    for rank in range(world_size):
        resumed = loader(rank, world_size)
        resumed.sampler.load_state_dict(state)
        resumed.sampler.set_epoch(1)
        rests.append([batch.prompts for batch in resumed])
        resumed.sampler.set_epoch(2)
        assert len(list(resumed)) == len(expected)  # the next epoch is whole again
    steps = [sorted(sum(step, [])) for step in zip(*rests, strict=True)]
    assert steps == [sorted(step) for step in expected[3:]]
    changed = loader()
    changed.sampler.load_state_dict(state | {"digest": "0" * 24})  # as of other rows
    changed.sampler.set_epoch(1)
    with pytest.raises(UserError, match="the first 12 rows of epoch 2 are not those that were read before the check"):
        next(iter(changed))


# ------------------------------------------------------------------------------------------------------------ order


def test_epochs_are_shuffled_anew_and_repeatable(folder, gpt2, capsys):
    def order(epoch, **changes):
        train, _ = build(gpt2, 2, [str(folder)], train_batch_size=1, data_split="0,0,1", **changes)
        train.sampler.set_epoch(epoch)
        return [text for (text,) in texts(gpt2, train)]

    first = order(0)
    assert len(first) == 240 and order(0) == first != order(1) and sorted(order(1)) == sorted(first)
    assert order(0, seed=7) != first
    assert capsys.readouterr().out.count("(train): 240 rows read") == 3  # of first epochs only
    in_file = [row["prompt"] for row in ROWS[:240]]
    assert order(0, shuffle_buffer=1) == in_file
    early = [in_file.index(text) for text in first]
    assert all(place <= k + 20 for k, place in enumerate(early))  # no row comes before the buffer could hold it


def test_the_buffer_hands_out_every_row_once():
    rows = list(range(1000))
    for size in (1, 10, 999, 1000, 5000):
        assert sorted(shuffled(iter(rows), size, 1, 2)) == rows
    assert list(shuffled(iter([]), 10, 1)) == []
    source = iter(rows)
    next(shuffled(source, 10, 1))
    assert next(source) == 11  # it holds ten rows, and has taken one for the row that it gave
    # A row waits 100 draws on average, geometrically.
    waits = [k - row for k, row in enumerate(shuffled(iter(range(20_000)), 100, 3, 0)) if row < 15_000]
    assert abs(sum(waits) / len(waits)) < 5 and max(waits) > 300


def test_a_blend_keeps_its_proportions_at_every_moment():
    rows = list(blended([iter("a" * 100), iter("b" * 100), iter("c" * 100)], [3.0, 1.5, 0.5]))
    for n in range(1, len(rows) + 1):
        for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
            assert abs(rows[:n].count(name) - n * share) <= 1
    assert rows.count("a") == 100 and 166 <= len(rows) <= 168  # it ends with the first data set
    assert "".join(blended([iter("aaaaa"), iter("bb")], [None, None])) == "ababaaa"  # all rows without weights


def test_data_sets_are_blended_by_weight(tmp_path, folder, gpt2):
    other = write(tmp_path / "other.jsonl", [{**row, "prompt": row["prompt"].replace("What", "Who")} for row in ROWS])
    train, _ = build(gpt2, 2, [f"{folder}:0.75", f"{other}:0.25"], train_batch_size=1, data_split="0,0,1")
    found = [text for (text,) in texts(gpt2, train)]
    assert sum("What" in text for text in found) == 240 and sum("Who" in text for text in found) == 80
    with pytest.raises(UserError, match="give each data set a weight"):
        build(gpt2, 2, [f"{folder}:0.75", other])


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("stage", "changes", "expected"),
    [
        (
            0,
            {"train_batch_size": 100},
            r"--per_device_train_batch_size 100: \d\d training rows are too few for one bat",
        ),
        (2, {"train_batch_size": 99, "world_size": 2}, "--per_device_generation_batch_size 99: .* of 198 on 2 ranks"),
        (0, {"data_split": "0,5,5"}, "--data_split 0,5,5: .* has no row for step 1 among 240"),
        (1, {"max_len": 5}, r"--max_seq_len 5: every prompt of --data_path .* \(up to \d+ tokens\)"),
        (2, {"max_len": 5}, "--max_prompt_seq_len 5: every prompt of --data_path"),
    ],
)
def test_bad_input_names_its_flag_before_training(folder, gpt2, stage, changes, expected):
    with pytest.raises(UserError, match=expected):
        build(gpt2, stage, [str(folder)], **changes)


def test_a_bad_row_stops_the_training_when_it_comes(folder, gpt2, capsys):
    write(folder / "train.jsonl", [*MANY[:5000], {**ROWS[0], "rejected": 5}])
    train, _ = build(gpt2, 1, [str(folder)], record_in=folder)
    batches = iter(train)
    with pytest.raises(UserError, match=r"train.jsonl, line 5001, column 'rejected': found int '5', expected text"):
        next(batches)
        list(batches)
    assert "(train, so far): 5000 rows read" in capsys.readouterr().out


def test_a_training_that_ends_early_has_its_report_too(folder, gpt2, capsys):
    write(folder / "train.jsonl", [*ROWS[:10], *ROWS[:5], *MANY])
    train, _ = build(gpt2, 1, [str(folder)], record_in=folder)
    assert len(list(islice(train, 3))) == 3
    read = int(capsys.readouterr().out.split("(train, so far): ")[1].split(" rows read")[0])
    assert 2000 < read < 3500  # about 2500, of which two fifths make the 1000 that are encoded together
    record = json.loads((folder / "data.json").read_text())
    assert not record["first_epoch_complete"] and record["data"][0]["rows"] == read
    entry = record["data"][0]  # every row that was read is accounted for
    assert entry["of_this_stage"] == entry["kept"] == 1000
    assert read == 5 + entry["held_out"] + entry["of_other_stages"] + entry["of_this_stage"]
    assert record["data"][0]["dropped"] == {
        "that repeat an earlier row": {"rows": 5, "first": ["line 11", "line 12", "line 13"]}
    }


# ---------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import resource, sys
from utils.data.config import DataConfig
from utils.data.streaming import build_streaming_loaders, open_streams
from utils.tokenizer import load_tokenizer

tokenizer = load_tokenizer(sys.argv[1])
for folder in sys.argv[2:]:
    config = DataConfig(data_path=[folder], shuffle_buffer=500)
    streams = open_streams(config, 2, tokenizer)
    sizes = dict(max_len=64, train_batch_size=50, eval_batch_size=50, batches=9)
    train, _ = build_streaming_loaders(streams, config, stage=2, tokenizer=tokenizer, **sizes)
    rows = sum(len(batch.prompts) for batch in train)
    print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_and_disk_do_not_grow_with_the_data(tmp_path, tokenizer_folders):
    """Peak memory over 30,000 rows (150 MB) is that over 8,000 (40 MB), but for 35 MB; and nothing is written."""
    row = {"chosen": " because" * 300, "rejected": " never" * 400}
    folders = [tmp_path / "few", tmp_path / "many"]
    for folder, n in zip(folders, (8000, 30_000), strict=True):
        folder.mkdir()
        for split, first, last in (("train", 0, n), ("test", n, n + 20)):
            with (folder / f"{split}.jsonl").open("w") as file:
                for i in range(first, last):
                    file.write(json.dumps({"prompt": f"\n\nHuman: Why {i}?\n\nAssistant:", **row}) + "\n")
    assert (folders[1] / "train.jsonl").stat().st_size > 140e6
    home = tmp_path / "home"
    home.mkdir()
    environment = {"HF_HOME": str(home), "TMPDIR": str(home), "HOME": str(home), "PYTHONPATH": os.environ["PYTHONPATH"]}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tokenizer_folders["gpt2"]), *map(str, folders)],
        env={**environment, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (few, before), (many, after) = (map(int, line.split()) for line in done.stdout.splitlines() if line[0].isdigit())
    assert many > 3 * few > 3 * 3000
    assert after - before < 35_000  # KiB: of 22,000 rows only the keys, 2 MB, and noise
    assert sum(file.stat().st_size for file in home.rglob("*") if file.is_file()) < 100_000
