import json
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from utils.data.batches import RankedBatch
from utils.data.config import DataConfig
from utils.data.loaders import EpochSampler, build_loaders, eval_order, local_rank_zero_first
from utils.data.streaming import build_streaming_loaders, open_streams
from utils.data.tokens import encode_prompts
from utils.run import UserError

ROWS = [
    {
        "prompt": f"\n\nHuman: What is {'so ' * (i % 3)}{i}?\n\nAssistant:",
        "chosen": " It is" + " so" * (i % 5) + f" {i}.",
        "rejected": f" No {i}.",
    }
    for i in range(50)
]


@pytest.fixture
def folder(tmp_path):
    """40 rows to train (8, 16, 16 for the stages) and 10 to evaluate."""
    for name, rows in (("train", ROWS[:40]), ("test", ROWS[40:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


SIZES = {"max_len": 96, "train_batch_size": 4, "eval_batch_size": 4, "rank": 0, "world_size": 1}


def build(folder, tokenizer, stage, **changes):
    sizes = {name: changes.pop(name, usual) for name, usual in SIZES.items()}
    config = DataConfig(**{"data_path": [str(folder)], "cache_dir": str(folder / "cache"), **changes})
    return build_loaders(config, stage=stage, tokenizer=tokenizer, **sizes)


def present(batch) -> set[str]:
    """The names of what a batch has."""
    return {name for name, value in vars(batch).items() if value is not None}


def texts(loader, tokenizer, ids="input_ids", lengths="lengths") -> list[list[str]]:
    """The text of each row of each batch."""
    return [
        [
            tokenizer.decode(row[:n])
            for row, n in zip(getattr(batch, ids), getattr(batch, lengths).tolist(), strict=True)
        ]
        for batch in loader
    ]


# --------------------------------------------------------------------------------------------------------- batches


def test_supervised_batches(folder, tokenizer, encode_pair):
    train, evaluation = build(folder, tokenizer, 0)
    assert len(train) == 2 and len(evaluation) == 3  # 40 * 2/10 / 4; ceil(10 / 4)
    pairs = {tuple(encode_pair(tokenizer, row["prompt"], row["chosen"], 96)[0]): row for row in ROWS}
    for batch in [*train, *evaluation]:
        assert present(batch) == {"input_ids", "lengths", "prompt_lengths", "weight"}
        ids, lengths = batch.input_ids, batch.lengths
        assert ids.dtype == lengths.dtype == batch.prompt_lengths.dtype == torch.int64
        assert ids.shape == (len(lengths), lengths.max())  # no wider than its longest row
        for row, n, prompt_length in zip(ids.tolist(), lengths.tolist(), batch.prompt_lengths.tolist(), strict=True):
            example = pairs[tuple(row[:n])]  # the end token included, also where it pads
            assert row[n:] == [tokenizer.pad_token_id] * (len(row) - n) and row[n - 1] == tokenizer.eos_token_id
            assert row[:prompt_length] == encode_prompts(tokenizer, [example["prompt"]])[0]


def test_the_rows_that_are_told_are_those_that_are_trained_on(folder, gpt2, capsys):
    train, evaluation = build(folder, gpt2, 1, train_batch_size=1, eval_batch_size=1)
    assert len(train) == 16 and len(evaluation) == 10  # 40 * 4/10
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("40 training rows, 10 to evaluate")
    assert lines[1] == f"--data_path {folder}: 16 of 40 training rows are for step 2 (--data_split 2,4,4)"
    assert lines[-1] == "step 2: 16 rows to train, 10 to evaluate"


def test_rows_that_no_stage_would_use_are_told(tmp_path, gpt2, capsys):
    path = tmp_path / "answers.jsonl"
    answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in answers))

    def told(**options) -> list[str]:
        build(tmp_path, gpt2, 0, train_batch_size=1, **options)
        return capsys.readouterr().out.splitlines()[1:]

    unused = "the others are kept for step 2 and step 3: where the data is for step 1 alone, --sft_only"
    shares, total = told(data_path=[str(path)])
    assert shares.startswith(
        f"--data_path {path}: 10 of 48 training rows are for step 1 (--data_split 2,4,4); {unused}"
    )
    assert total == "step 1: 10 rows to train, 2 to evaluate"
    assert told(data_path=[], sft_only_data_path=[str(path)]) == ["step 1: 48 rows to train, 2 to evaluate"]
    assert all(unused not in line for line in told(data_path=[str(path)], data_split="1,0,0"))


def test_ranking_batches(folder, gpt2, encode_pair):
    train, evaluation = build(folder, gpt2, 1)
    assert len(train) == 4 and len(evaluation) == 3
    for batch in [*train, *evaluation]:
        assert present(batch) == {
            *("chosen_ids", "chosen_lengths", "rejected_ids", "rejected_lengths", "prompt_lengths", "weight")
        }
        for k in range(len(batch.weight)):
            chosen, rejected = (
                getattr(batch, f"{name}_ids")[k, : getattr(batch, f"{name}_lengths")[k]]
                for name in ("chosen", "rejected")
            )
            number = gpt2.decode(rejected).split("No ")[1].split(".")[0]
            row = ROWS[int(number)]
            assert chosen.tolist() == encode_pair(gpt2, row["prompt"], row["chosen"], 96)[0]
            assert rejected.tolist() == encode_pair(gpt2, row["prompt"], row["rejected"], 96)[0]
            n = int(batch.prompt_lengths[k])
            assert chosen[:n].tolist() == rejected[:n].tolist() == encode_prompts(gpt2, [row["prompt"]])[0]


ANSWERS = [" Yes.", " It is", " No.", " Perhaps it is so."]
RANKED = [
    {
        "prompt": row["prompt"],
        "answers": [a + f" {i}" for a in ANSWERS[: 2 + i % 3]],
        "ranks": [1, 2, 2, 3][: 2 + i % 3],
    }
    for i, row in enumerate(ROWS)
]


@pytest.fixture
def ranked_folder(tmp_path):
    for name, rows in (("train", RANKED[:40]), ("test", RANKED[40:47])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def answers_of(batch, tokenizer) -> dict[int, list[tuple[str, int]]]:
    """Row -> its (text, rank)."""
    found = {}
    parts = zip(batch.row.tolist(), batch.input_ids, batch.lengths.tolist(), batch.ranks, strict=True)
    for row, ids, length, rank in parts:
        found.setdefault(row, []).append((tokenizer.decode(ids[:length], skip_special_tokens=True), int(rank)))
    return found


def test_ranked_batches(ranked_folder, gpt2):
    train, evaluation = build(ranked_folder, gpt2, 1)
    assert len(train) == 4 and len(evaluation) == 2
    expected = {tuple((r["prompt"] + a, k) for a, k in zip(r["answers"], r["ranks"], strict=True)) for r in RANKED}
    rows = 0
    for batch in [*train, *evaluation]:
        assert present(batch) == {"input_ids", "lengths", "prompt_lengths", "row", "ranks", "weight"}
        assert batch.input_ids.shape == (len(batch.row), batch.lengths.max())
        found = answers_of(batch, gpt2)
        assert list(found) == list(range(len(batch.weight)))  # a row's answers stay in one batch
        assert {tuple(answers) for answers in found.values()} <= expected
        prompts = [gpt2.decode(ids[:n]) for ids, n in zip(batch.input_ids, batch.prompt_lengths, strict=True)]
        assert all(prompt.endswith("?\n\nAssistant:") for prompt in prompts)
        rows += len(found)
    assert rows == 16 + 7


def test_ranked_rows_serve_the_other_stages_with_their_best_and_worst(ranked_folder, gpt2):
    best = {row["prompt"] + row["answers"][0] for row in RANKED}
    worst = {row["prompt"] + row["answers"][-1] for row in RANKED}
    train, held_out = build(ranked_folder, gpt2, 0)
    found = {
        text.removesuffix(gpt2.eos_token) for loader in (train, held_out) for b in texts(loader, gpt2) for text in b
    }
    assert found <= best and len(found) == 8 + 7
    train, held_out = build(ranked_folder, gpt2, 1, best_and_worst=True)
    for name, expected in (("chosen", best), ("rejected", worst)):
        batches = texts(train, gpt2, f"{name}_ids", f"{name}_lengths")
        assert {text.removesuffix(gpt2.eos_token) for batch in batches for text in batch} <= expected
    train, _ = build(ranked_folder, gpt2, 2)
    assert {prompt for batch in train for prompt in batch.prompts} <= {row["prompt"] for row in RANKED}


def test_pairs_and_ranked_rows_can_be_blended(ranked_folder, gpt2, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row | {"margin": 1.0}) + "\n" for row in ROWS[:20]))
    paths = [f"{ranked_folder}:0.5", f"{pairs}:0.5"]
    for order in (paths, paths[::-1]):
        train, held_out = build(ranked_folder, gpt2, 1, data_path=order, train_batch_size=2)
        sizes = [len(row) for batch in train for row in answers_of(batch, gpt2).values()]
        assert set(sizes) == {2, 3, 4} and len(sizes) == 14
        assert all(isinstance(batch, RankedBatch) for batch in held_out)
    with pytest.raises(UserError, match="--use_margin: the data ranks several answers to a prompt, without margins"):
        build(ranked_folder, gpt2, 1, data_path=paths, need_margin=True)


def test_every_held_out_ranked_row_counts_once_on_two_ranks(ranked_folder, gpt2):
    found = []
    for rank in range(2):
        _, held_out = build(ranked_folder, gpt2, 1, rank=rank, world_size=2, eval_batch_size=3, train_batch_size=2)
        assert len(held_out) == 2
        for batch in held_out:
            rows = answers_of(batch, gpt2)
            found += [tuple(rows[row]) for row in range(len(batch.weight)) if batch.weight[row]]
    assert len(found) == len(set(found)) == 7


def test_prompt_batches_are_padded_on_the_left(folder, tokenizer):
    train, _ = build(folder, tokenizer, 2)
    assert len(train) == 4
    for batch in train:
        assert present(batch) == {"input_ids", "lengths", "weight", "prompts", "columns"} and batch.columns == {}
        assert batch.input_ids.shape == (4, batch.lengths.max())
        for row, n, prompt in zip(batch.input_ids.tolist(), batch.lengths.tolist(), batch.prompts, strict=True):
            assert row[len(row) - n :] == encode_prompts(tokenizer, [prompt])[0]
            assert row[: len(row) - n] == [tokenizer.pad_token_id] * (len(row) - n)


# ------------------------------------------------------------------------------------------------------------ ranks


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_steps_rows_are_the_same_on_one_and_two_ranks(folder, gpt2, stage):
    ids, lengths = ("chosen_ids", "chosen_lengths") if stage == 1 else ("input_ids", "lengths")

    def steps(world_size: int) -> list[set[str]]:
        per_rank = []
        for rank in range(world_size):
            options = {"train_batch_size": 4 // world_size, "rank": rank, "world_size": world_size}
            train, _ = build(folder, gpt2, stage, **options)
            per_rank.append([getattr(batch, ids)[getattr(batch, ids) != gpt2.pad_token_id].tolist() for batch in train])
        return [sorted(sum(rows, [])) for rows in zip(*per_rank, strict=True)]

    assert steps(1) == steps(2) == steps(4)
    assert lengths


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 16])
def test_every_eval_row_counts_once_and_ranks_agree_on_the_number_of_batches(folder, gpt2, world_size):
    seen, numbers = [], set()
    for rank in range(world_size):
        _, evaluation = build(folder, gpt2, 2, train_batch_size=1, rank=rank, world_size=world_size)
        batches = list(evaluation)
        numbers.add((len(evaluation), len(batches), tuple(len(batch.weight) for batch in batches)))
        for batch in batches:
            seen += [prompt for prompt, weight in zip(batch.prompts, batch.weight, strict=True) if weight == 1]
            assert set(batch.weight.tolist()) <= {0.0, 1.0} and batch.weight.dtype == torch.float32
    assert sorted(seen) == sorted(row["prompt"] for row in ROWS[40:])
    assert len(numbers) == 1


def test_samplers_share_the_rows_in_turn():
    ranks = [list(EpochSampler(11, 2, rank=rank, world_size=2, seed=3)) for rank in range(2)]
    order = list(EpochSampler(11, 4, seed=3))
    # Global batch 4 of 11 rows: two steps, 8 rows; rank r takes r, r + 2, ...
    assert ranks == [order[0::2], order[1::2]] and len(order) == 8 == len(set(order))
    # 5 rows on 2 ranks: row 5 does not exist, it is a filler
    assert [list(eval_order(5, rank, 2)) for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]


def test_a_state_saved_on_two_ranks_serves_one():
    order = list(EpochSampler(12, 4, seed=3))
    for rank in range(2):
        sampler = EpochSampler(12, 2, rank=rank, world_size=2, seed=3)
        rows = iter(sampler)
        assert [next(rows) for _ in range(4)] == order[rank:8:2]
        assert sampler.state_dict() == {"epoch": 0, "position": 8}
        alone = EpochSampler(12, 4, seed=3)
        alone.load_state_dict(sampler.state_dict())
        assert list(alone) == order[8:]


def test_the_first_rank_of_a_machine_goes_first(monkeypatch):
    for local_rank, expected in (("0", ["work", "barrier"]), ("1", ["barrier", "work"])):
        events = []
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setattr("utils.data.loaders.barrier", lambda events=events: events.append("barrier"))
        with local_rank_zero_first():
            events.append("work")
        assert events == expected
        with pytest.raises(UserError), local_rank_zero_first():
            raise UserError("bad data")
        assert events[2:] == ["barrier"]  # the others are let go, into the same error


# ------------------------------------------------------------------------------------------------------------ order


def test_epochs_are_shuffled_anew_and_repeatable(folder, gpt2):
    first, second = (build(folder, gpt2, 2)[0] for _ in range(2))
    orders = []
    for epoch in (0, 1, 0):
        for loader in (first, second):
            loader.sampler.set_epoch(epoch)
        orders.append([prompt for batch in first for prompt in batch.prompts])
        assert orders[-1] == [prompt for batch in second for prompt in batch.prompts]
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    other, _ = build(folder, gpt2, 2, seed=7)
    assert [prompt for batch in other for prompt in batch.prompts] not in orders


def test_global_generators_are_neither_read_nor_moved(folder, gpt2):
    def prompts():
        return [batch.prompts for loader in build(folder, gpt2, 2) for batch in loader]

    torch.manual_seed(0)
    first = prompts()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert prompts() == first
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loader_goes_on_where_another_stopped(folder, gpt2, world_size):
    whole, stopped = (build(folder, gpt2, 2, train_batch_size=2)[0] for _ in range(2))
    for loader in (whole, stopped):
        loader.sampler.set_epoch(3)
    batches = [batch.prompts for batch in whole]
    running = iter(stopped)
    for _ in range(4):
        next(running)
    state = stopped.sampler.state_dict()
    assert state == {"epoch": 3, "position": 8}  # rows handed out to all ranks together
    resumed = []
    for rank in range(world_size):
        options = {"train_batch_size": 2 // world_size, "rank": rank, "world_size": world_size}
        loader, _ = build(folder, gpt2, 2, **options)
        loader.sampler.load_state_dict(state)
        loader.sampler.set_epoch(3)
        resumed.append([batch.prompts for batch in loader])
        assert len(list(loader)) == len(loader)  # the next pass is a whole one
    assert [sorted(sum(parts, [])) for parts in zip(*resumed, strict=True)] == [sorted(batch) for batch in batches[4:]]


def test_at_an_epochs_end_nothing_is_left(folder, gpt2):
    train, _ = build(folder, gpt2, 2)
    assert len(list(train)) == 4
    again, _ = build(folder, gpt2, 2)
    again.sampler.load_state_dict(train.sampler.state_dict())
    assert list(again) == [] and len(list(again)) == 4


# ----------------------------------------------------------------------------------------------------------- stages


def test_stages_share_no_training_row(folder, gpt2):
    prompts = []
    for stage in range(3):
        train, evaluation = build(folder, gpt2, stage, train_batch_size=1)
        ids, lengths = ("chosen_ids", "chosen_lengths") if stage == 1 else ("input_ids", "lengths")
        rows = sum(texts(train, gpt2, ids, lengths), []) if stage < 2 else [p for batch in train for p in batch.prompts]
        prompts.append({row.split("Assistant:")[0] for row in rows})
        assert sum(len(batch.weight) for batch in evaluation) == 10  # every stage is measured on all eval rows
    assert [len(found) for found in prompts] == [8, 16, 16] and len(set.union(*prompts)) == 40


def test_stages_share_no_prompt(gpt2, tmp_path):
    # 8 prompts with 5 answers each: 1 or 2, 3 and 3 of them serve the stages.
    rows = [
        {"prompt": f"\n\nHuman: Why {i % 8}?\n\nAssistant:", "chosen": f" {i}", "rejected": " no"} for i in range(40)
    ]
    for name, content in (("train", rows), ("test", ROWS[40:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    prompts = []
    for stage in range(3):
        loader, _ = build(tmp_path, gpt2, stage, train_batch_size=1)
        ids, starts = ("chosen_ids" if stage == 1 else "input_ids"), ("lengths" if stage == 2 else "prompt_lengths")
        prompts.append([gpt2.decode(getattr(batch, ids)[0, : getattr(batch, starts)[0]]) for batch in loader])
    assert sorted(map(len, prompts)) == [10, 15, 15] and len(set().union(*prompts)) == 8
    assert sum(len(set(part)) for part in prompts) == 8


def test_each_data_set_is_split_on_its_own(folder, gpt2, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    for name in ("train", "test"):
        rows = [{"prompt": f"\n\nHuman: More {i}?\n\nAssistant:", "completion": f" {i}"} for i in range(10)]
        (more / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone, _ = build(folder, gpt2, 0, train_batch_size=1)
    both, evaluation = build(folder, gpt2, 0, train_batch_size=1, data_path=[str(folder), str(more)])
    found = sum(texts(both, gpt2), [])
    assert len(found) == 8 + 2 and set(sum(texts(alone, gpt2), [])) < set(found)
    assert sum(len(batch.weight) for batch in evaluation) == 20
    wholly, _ = build(folder, gpt2, 0, train_batch_size=1, sft_only_data_path=[str(more)])
    assert len(wholly) == 8 + 10
    later, _ = build(folder, gpt2, 2, train_batch_size=1, sft_only_data_path=[str(more)])
    assert len(later) == 16


def test_data_sets_are_blended_by_weight(folder, gpt2, tmp_path, capsys):
    more = tmp_path / "more.jsonl"
    rows = [{"prompt": f"\n\nHuman: More {i}?\n\nAssistant:", "chosen": f" {i}", "rejected": " no"} for i in range(21)]
    more.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [f"{folder}:0.75", f"{more}:0.25"]
    options = {"data_path": names, "data_split": "0,0,1", "train_batch_size": 1}
    train, _ = build(folder, gpt2, 2, **options)
    prompts = [prompt for batch in train for prompt in batch.prompts]
    # 40 and 20 rows: min(40 / .75, 20 / .25) = 53.3 in all
    assert len(set(prompts)) == len(prompts) == 53 and sum("More" in prompt for prompt in prompts) == 13
    assert "40 of 40 rows in the blend" in capsys.readouterr().out
    again, _ = build(folder, gpt2, 2, **options)
    assert [prompt for batch in again for prompt in batch.prompts] == prompts
    with pytest.raises(UserError, match=r"--data_path: give each data set a weight \(name:0.3\), or none"):
        build(folder, gpt2, 2, data_path=[names[0], str(more)])


def test_margins_reach_the_batches(folder, gpt2, tmp_path):
    path = tmp_path / "margins.jsonl"
    path.write_text("".join(json.dumps({**row, "margin": i / 4}) + "\n" for i, row in enumerate(ROWS)))
    options = {"train_batch_size": 1, "data_split": "0,1,0"}
    train, _ = build(folder, gpt2, 1, data_path=[str(path)], **options)
    for batch in train:
        number = gpt2.decode(batch.rejected_ids[0]).split("No ")[1].split(".")[0]
        assert batch.margin.tolist() == [int(number) / 4]
    train, _ = build(folder, gpt2, 1, data_path=[str(path), str(folder)], **options)
    assert sum(batch.margin is not None for batch in train) == len(train) == 48 + 40  # 0 for rows without one
    assert all(batch.margin is None for loader in build(folder, gpt2, 1) for batch in loader)
    with pytest.raises(UserError, match="--use_margin: no row of the data has a number in a column `margin`"):
        build(folder, gpt2, 1, need_margin=True)
    build(folder, gpt2, 1, data_path=[str(path)], need_margin=True)


def test_the_record_says_what_was_read_and_is_the_same_for_the_same_data(folder, gpt2, tokenizer_folders, tmp_path):
    from utils.tokenizer import load_tokenizer

    def record(**changes) -> dict:
        tokenizer = changes.pop("tokenizer", gpt2)
        build(folder, tokenizer, 0, record_in=tmp_path / "run", **changes)
        return json.loads((tmp_path / "run" / "data.json").read_text())

    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n" + json.dumps({**ROWS[1], "chosen": " "}) + "\n")
    first = record()
    read, *_ = first["data"]
    assert read["rows"] == 42 and read["kept"] == 41
    assert read["dropped"] == {"that repeat an earlier row": {"rows": 1, "first": ["line 41"]}}
    assert first["train_rows"] <= 9 and first["eval_rows"] == 10 and first["data_split"] == "2,4,4"
    assert record() == first == record(cache_dir=str(tmp_path / "elsewhere"))
    qwen = record(tokenizer=load_tokenizer(str(tokenizer_folders["qwen"])))
    assert qwen["tokenizer"]["fingerprint"] != first["tokenizer"]["fingerprint"] and qwen["code"] == first["code"]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:40]))
    assert record()["data"][0]["fingerprint"] != read["fingerprint"]


def test_a_rank_that_waits_in_vain_says_for_what(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")

    def late():
        raise RuntimeError("Timed out after 1000 ms\nwaiting for rank 0")

    monkeypatch.setattr("utils.data.loaders.barrier", late)
    expected = (
        r"has waited in vain for the first rank of its machine .* DEEPSPEED_TIMEOUT .*\(Timed out after 1000 ms wait"
    )
    with pytest.raises(UserError, match=expected), local_rank_zero_first():
        raise AssertionError("the data is not there")


def test_a_rank_that_waits_says_so(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("utils.data.loaders.REMIND_AFTER", 0.02)
    monkeypatch.setattr("utils.data.loaders.barrier", lambda: time.sleep(0.2))
    with local_rank_zero_first():
        assert "for the first rank of its machine to prepare the data" in capsys.readouterr().out


def test_a_second_start_maps_nothing(folder, gpt2, monkeypatch):
    first = [batch.prompts for loader in build(folder, gpt2, 2) for batch in loader]
    for name in ("preferences.normalise_batch", "encoding.to_columns"):
        monkeypatch.setattr(f"utils.data.{name}", lambda *_, **__: pytest.fail("mapped again"))
    assert [batch.prompts for loader in build(folder, gpt2, 2) for batch in loader] == first


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("stage", "changes", "expected"),
    [
        (
            0,
            {"train_batch_size": 9},
            "--per_device_train_batch_size 9: 8 training rows are too few for one batch of 9 on",
        ),
        (2, {"train_batch_size": 9, "world_size": 2}, "--per_device_generation_batch_size 9: 16 .* of 18 on 2 ranks"),
        (0, {"data_split": "0,5,5"}, "--data_split 0,5,5: no row is left for step 1 out of 40"),
        (1, {"max_len": 5}, r"--max_seq_len 5: every prompt of --data_path .* \(up to \d+ tokens\)"),
        (2, {"max_len": 5}, "--max_prompt_seq_len 5: every prompt of --data_path"),
        (2, {"data_path": ["nothing.jsonl"]}, "--data_path: no such file or folder: nothing.jsonl"),
        (0, {"sft_only_data_path": ["nothing.jsonl"]}, "--sft_only_data_path: no such file or folder: nothing.jsonl"),
    ],
)
def test_bad_input_names_its_flag(folder, gpt2, stage, changes, expected):
    with pytest.raises(UserError, match=expected):
        build(folder, gpt2, stage, **changes)


def test_a_data_set_without_pairs_does_not_serve_step_2(folder, gpt2):
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Q{i}", "completion": "A"}) + "\n" for i in range(20)))
    with pytest.raises(
        UserError, match=f"--data_path {path}: no row has an answer `rejected`; step 2 learns from pairs"
    ):
        build(folder, gpt2, 1, data_path=[str(path)])


# ------------------------------------------------------------------------------------------------- columns of the rows


@pytest.fixture
def questions(tmp_path):
    """Two data sets with a test split each, whose further columns differ: what each prompt's row holds, by prompt."""
    rows: dict[str, dict] = {}
    for name in ("sums", "essays"):
        (tmp_path / name).mkdir()
        for split, numbers in (("train", range(12)), ("test", range(12, 15))):
            of_split = []
            for i in numbers:
                question = f"{name} {i}?"
                of_split.append({"question": question, "label": "x"})
                if name == "sums":
                    of_split[-1] |= {"answer": f"#### {i}", "tests": [{"in": i, "out": None}], "day": "2024-01-05"}
                rows[f"\n\nHuman: {question}\n\nAssistant:"] = of_split[-1]
            lines = "".join(json.dumps(row) + "\n" for row in of_split)
            (tmp_path / name / f"{split}.jsonl").write_text(lines)
    return rows


@pytest.mark.parametrize(
    ("keep", "names"),
    [
        ((), set()),
        (("answer", "nowhere", "question"), {"answer", "question"}),
        (("*",), {"question", "label", "answer", "tests", "day"}),
    ],
)
def test_columns_that_are_kept_stay_with_their_rows(questions, gpt2, tmp_path, keep, names):
    options = {
        "columns": {"prompt": "question"},
        "data_split": "0,0,1",
        "cache_dir": str(tmp_path),
        "keep": frozenset(keep),
    }
    config = DataConfig(data_path=[str(tmp_path / name) for name in ("sums", "essays")], **options)
    sizes = {"max_len": 64, "train_batch_size": 4, "eval_batch_size": 4}
    streams = open_streams(replace(config, streaming=True), 2, gpt2)
    streamed = build_streaming_loaders(streams, config, stage=2, tokenizer=gpt2, batches=6, **sizes)
    seen = []
    for loader in (*build_loaders(config, stage=2, tokenizer=gpt2, **sizes), *streamed):
        for batch in loader:
            assert set(batch.columns) == names
            for k, prompt in enumerate(batch.prompts):
                # None where the row's file has no such column
                assert {n: v[k] for n, v in batch.columns.items()} == {n: questions[prompt].get(n) for n in names}
            seen += batch.prompts
    assert set(seen) == set(questions)


def test_rows_that_differ_in_a_kept_column_do_not_repeat_one_another(gpt2, tmp_path):
    lines = [{"prompt": f"{i % 4}?", "solution": i} for i in range(8)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    sizes = {"max_len": 64, "train_batch_size": 1, "eval_batch_size": 1}
    for keep, count in (((), 4), (("solution",), 8)):
        config = DataConfig(
            data_path=[str(tmp_path)], data_split="0,0,1", cache_dir=str(tmp_path), keep=frozenset(keep)
        )
        train, held_out = build_loaders(config, stage=2, tokenizer=gpt2, **sizes)
        assert len(train) == len(held_out) == count
