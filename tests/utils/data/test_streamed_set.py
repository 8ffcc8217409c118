import copy
import json

import datasets
import pytest

from utils.data.chat import template_of
from utils.data.encoding import ENCODERS, Encoder
from utils.data.preferences import ABOUT, TEXT, load_data_set
from utils.data.shapes import PLAIN, Form
from utils.data.splits import prompt_key
from utils.data.streamed_set import Counts, Repeats, is_held_out, open_stream, stage_of
from utils.run import UserError

ROWS = [
    {"prompt": f"\n\nHuman: What is {i % 300}?\n\nAssistant:", "chosen": f" It is {i}.", "rejected": " No."}
    for i in range(900)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stream(name, form=PLAIN, flag="--data_path"):
    return open_stream(name, None, cache_dir=None, flag=flag, form=form)


def training(opened, stage, shares=(2, 4, 4), seed=1234) -> list[dict]:
    return list(opened.training_texts(stage, shares, seed, Counts()))


def test_every_prompt_serves_one_stage_or_is_held_out(tmp_path):
    opened = stream(write(tmp_path / "x.jsonl", ROWS))
    parts = [training(opened, stage) for stage in range(3)]
    chosen = [[row["chosen"] for row in part] for part in (*parts, opened.held_out)]
    assert sorted(sum(chosen, [])) == sorted(row["chosen"] for row in ROWS)  # every row once
    prompts = [{row["prompt"] for row in part} for part in (*parts, opened.held_out)]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 300
    # Shares of the 300 prompts: a binomial's standard deviation is at most sqrt(300 / 4) = 8.7.
    for found, expected in zip(prompts, (57, 114, 114, 15), strict=True):
        assert abs(len(found) - expected) < 30


def test_what_a_row_serves_does_not_depend_on_the_others(tmp_path, monkeypatch):
    expected = training(stream(write(tmp_path / "x.jsonl", ROWS)), 1)
    backwards = training(stream(write(tmp_path / "y.jsonl", ROWS[::-1])), 1)
    assert [row["chosen"] for row in backwards] == [row["chosen"] for row in expected][::-1]
    monkeypatch.setattr("utils.data.streamed_set.TOGETHER", 7)  # in other chunks
    assert training(stream(str(tmp_path / "x.jsonl")), 1) == expected
    assert training(stream(str(tmp_path / "x.jsonl")), 1, seed=1) != expected


def test_a_prompt_serves_the_same_stage_under_every_chat_template(tmp_path, gpt2):
    # Step 2 may train a model whose template is another one than that of step 1, or none.
    def said(role, text):
        return [{"role": role, "content": text}]

    rows = [
        {"prompt": said("user", f"q {i}"), "chosen": said("assistant", "a"), "rejected": said("assistant", "b")}
        for i in range(300)
    ]
    name = write(tmp_path / "x.jsonl", rows)
    tokenizer = copy.deepcopy(gpt2)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    plain, templated = stream(name), stream(name, Form(template=template_of(tokenizer)))
    assert "[assistant]" in templated.held_out[0]["prompt"] != plain.held_out[0]["prompt"]
    assert plain.held_out["origin"] == templated.held_out["origin"]
    for stage in range(3):
        of_stage = [[row["origin"] for row in training(opened, stage)] for opened in (plain, templated)]
        assert of_stage[0] == of_stage[1] != []


def test_the_hash_keeps_to_the_shares():
    keys = [prompt_key(f"prompt {i}", None) for i in range(20_000)]
    stages = [stage_of(key, (2, 4, 4), 1234) for key in keys]
    # standard deviation: sqrt(20,000 * .4 * .6) = 69
    assert all(abs(stages.count(stage) - n) < 300 for stage, n in enumerate((4000, 8000, 8000)))
    assert {stage_of(key, (0, 1, 0), 1) for key in keys} == {1} and {stage_of(key, (1, 0, 0), 1) for key in keys} == {0}
    assert abs(sum(map(is_held_out, keys)) - 1000) < 150  # 5 %
    assert abs(sum(is_held_out(key) and stage == 0 for key, stage in zip(keys, stages, strict=True)) - 200) < 70


def test_the_rows_are_converted_and_dropped_as_without_streaming(tmp_path, capsys):
    rows = [
        *({"chosen": f" a{i}", "rejected": "b", "prompt": f"Q{i}?"} for i in range(30)),
        {"prompt": "Q3?", "chosen": " a3", "rejected": "b"},
        {"prompt": "Q4?", "chosen": " a4", "rejected": None, "margin": 1e99},
        {"prompt": "Q5?", "chosen": " a5", "rejected": "c", "margin": 2},
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    rows[31]["rejected"] = "b"
    write(folder / "train.jsonl", rows)
    write(folder / "test.jsonl", [*rows[:3], rows[0]])
    train, held_out = load_data_set(str(folder), cache_dir=str(tmp_path / "cache"))
    report = [line for line in capsys.readouterr().out.splitlines() if "dropped" in line]
    opened, counts = stream(str(folder)), Counts()
    found = [{name: row[name] for name in (*TEXT, *ABOUT)} for row in opened.texts("train", counts)]
    assert found == list(train) and list(opened.held_out) == list(held_out)
    assert (
        found[0]["prompt"] == "\n\nHuman: Q0?\n\nAssistant:" and found[-1]["margin"] == 2
    )  # bare prompts, late column
    assert counts.read == 33 and counts.dropped == {
        "that repeat an earlier row": (1, ["line 31"]),
        "with a margin that is not finite": (1, ["line 32"]),
    }
    streamed = capsys.readouterr().out
    assert report[1] in streamed and "(test): 1 of 4 rows dropped: 1 that repeat an earlier row (line 4)" in report[1]


def test_own_columns_and_files_of_one_split(tmp_path):
    own = [{"question": row["prompt"], "good": row["chosen"], "prompt": 7} for row in ROWS]
    write(tmp_path / "train-1.jsonl", own[:500])
    write(tmp_path / "train-2.jsonl", own[500:])
    opened = stream(str(tmp_path), form=Form({"prompt": "question", "chosen": "good"}))
    rows = list(opened.texts("train", Counts()))
    assert [row["chosen"] for row in rows] == [row["chosen"] for row in ROWS]
    assert rows[500]["origin"] == "train-2.jsonl line 1"
    with pytest.raises(UserError, match="--prompt_column ask: .*no such column; it has question, good, prompt"):
        stream(str(tmp_path), form=Form({"prompt": "ask"}))


def test_a_data_set_of_the_hub_is_streamed(tmp_path, monkeypatch):
    """There is no hub here: `load_dataset` is replaced by one that hands out local rows as the hub's would come."""
    calls = []

    def load(repository, configuration, **options):
        calls.append((repository, configuration, options["streaming"]))
        return datasets.IterableDatasetDict(
            {name: datasets.Dataset.from_list(rows).to_iterable_dataset() for name, rows in splits.items()}
        )

    splits = {"train": ROWS[:50], "test": ROWS[50:60]}
    monkeypatch.setattr("utils.data.sources.hub_is_reachable", lambda: True)
    monkeypatch.setattr("utils.data.sources.datasets.load_dataset", load)
    opened = stream("me/pairs#main/")
    assert calls == [("me/pairs", "main", True)]
    assert [row["chosen"] for row in opened.texts("train", Counts())] == [row["chosen"] for row in ROWS[:50]]
    assert [row["origin"] for row in opened.held_out] == [f"row {i}" for i in range(1, 11)]
    splits["train"] = [*ROWS[:3], {**ROWS[3], "chosen": None}]
    with pytest.raises(UserError, match=r"me/pairs \(train\), row 4, column 'chosen': found missing or null, expected"):
        list(stream("me/pairs").texts("train", Counts()))


def test_held_out_rows_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.streamed_set.HELD_OUT_ROWS", 5)
    opened = stream(write(tmp_path / "x.jsonl", ROWS))
    everything = [row for row in ROWS if is_held_out(prompt_key(row["prompt"], None))]
    assert len(everything) > 20 and [row["chosen"] for row in opened.held_out] == [
        row["chosen"] for row in everything[:5]
    ]
    counts = Counts()
    rows = list(opened.training_texts(0, (1, 0, 0), 1, counts))  # the others are not trained on either
    assert counts.held_out == len(everything) and len(rows) == 900 - len(everything)


def test_repetitions_are_found_within_a_window():
    repeats = Repeats(3)
    assert [repeats.has(key) for key in (1, 2, 1, 3, 1, 4, 5)] == [False, False, True, False, True, False, False]
    assert repeats.has(2)  # one of the last three new ones at least, of the last six at most
    for key in (6, 7, 8, 9, 10, 11):
        assert not repeats.has(key)
    assert not repeats.has(1) and len(repeats.recent) + len(repeats.older) <= 6


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [*ROWS, *ROWS, {**ROWS[7], "chosen": 4}],
            r"x.jsonl, line 1801, column 'chosen': found int '4', expected text",
        ),
        ([{**ROWS[0], "chosen": 4}, *ROWS[:9]], r"x.jsonl, line 2, column 'chosen': found str .*but number in line 1"),
        ([{"question": "a"}], "x.jsonl has the columns question; expected"),
        (
            ROWS[:1] * 4,
            "x.jsonl has no row for evaluation: none of its 4 rows falls to it by chance; give it a test sp",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, expected):
    with pytest.raises(UserError, match=expected):
        list(stream(write(tmp_path / "x.jsonl", rows)).texts("train", Counts()))


def test_encoders_need_no_more_than_these_columns(tmp_path, gpt2):
    # The streamed rows go to the encoders as the stored ones do.
    opened = stream(write(tmp_path / "x.jsonl", ROWS))
    rows = training(opened, 0)
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    for kind in ENCODERS:
        assert len(Encoder(kind, gpt2, 64).encode(batch)["dropped"]) == len(rows)
