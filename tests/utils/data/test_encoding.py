import pytest
from datasets import Dataset

from utils.data.encoding import Encoder, Names, encode_rows
from utils.data.tokens import beginning, encode_prompts
from utils.run import UserError
from utils.tokenizer import load_tokenizer

PROMPT = "\n\nHuman: What is it?\n\nAssistant:"
ANSWER = " It is a thing."


def rows(*examples: tuple) -> Dataset:
    names = ("prompt", "chosen", "rejected")
    columns = {name: [(*example, None, None)[k] for example in examples] for k, name in enumerate(names)}
    return Dataset.from_dict(columns)


def encode(tmp_path, data, kind, tokenizer, max_len=64, overlong=None, **names):
    encoder = Encoder(kind, tokenizer, max_len, overlong)
    return encode_rows(data, encoder, cache_dir=str(tmp_path), names=Names("train", **names))


def test_supervised_rows(tmp_path, tokenizer, encode_pair):
    data = rows((PROMPT, ANSWER), (PROMPT, " yes"))
    encoded = encode(tmp_path, data, "supervised", tokenizer)
    assert encoded.column_names == ["input_ids", "prompt_length"]
    expected = [encode_pair(tokenizer, PROMPT, answer, 64) for answer in (ANSWER, " yes")]
    assert list(zip(encoded["input_ids"], encoded["prompt_length"], strict=True)) == expected


def test_ranking_rows_share_their_prompt(tmp_path, tokenizer, encode_pair):
    encoded = encode(tmp_path, rows((PROMPT, ANSWER, " no")), "ranking", tokenizer)
    row = encoded[0]
    assert (row["chosen_ids"], row["prompt_length"]) == encode_pair(tokenizer, PROMPT, ANSWER, 64)
    assert (row["rejected_ids"], row["prompt_length"]) == encode_pair(tokenizer, PROMPT, " no", 64)


def ranked_rows(*examples: tuple) -> Dataset:
    names = ("prompt", "chosen", "rejected", "answers", "ranks")
    return Dataset.from_dict({name: [example[k] for example in examples] for k, name in enumerate(names)})


def test_ranked_rows(tmp_path, tokenizer, encode_pair):
    answers = [" yes", ANSWER, "x", " no"]
    data = ranked_rows((PROMPT, " yes", " no", answers, [1, 2, 2, 3]), (PROMPT, ANSWER, " no", None, None))
    encoded = encode(tmp_path, data, "ranked", tokenizer)
    assert encoded.column_names == ["answers_ids", "ranks", "prompt_length"]
    expected = [[encode_pair(tokenizer, PROMPT, a, 64)[0] for a in row] for row in (answers, (ANSWER, " no"))]
    assert encoded["answers_ids"][:] == expected and encoded["ranks"][:] == [[1, 2, 2, 3], [1, 2]]
    assert set(encoded["prompt_length"]) == {encode_pair(tokenizer, PROMPT, "x", 64)[1]}


def test_answers_that_are_not_distinct_are_left_out_and_counted(tmp_path, gpt2, capsys, encode_pair):
    length = len(encode_prompts(gpt2, [PROMPT])[0])
    long = " no" * 40
    cases = [
        (["A", " ", "B", "A ", "C"], [1, 2, 3, 3, 4], None, ["B", "C"]),  # A stands on two ranks
        (["A", "B", "B", "C"], [1, 2, 2, 3], None, ["A", "B", "C"]),
        (["A", " "], [1, 2], "with fewer than two distinct answers", []),
        (["A", "B", "A"], [1, 2, 3], "with fewer than two distinct answers", []),
        ([], [], "with fewer than two distinct answers", []),
        (["A", "B"], [1, 1], "whose answers are all tied", []),
        (["A", long + "x", long + "y", "B"], [1, 2, 3, 4], None, ["A", "B"]),
        (["A", long + "x", long + "y", "B"], [1, 2, 2, 4], None, ["A", long, "B"]),
        ([long + "x", long + "y", "B"], [1, 2, 2], "whose answers are equal after the cut", []),
    ]
    data = ranked_rows(*((PROMPT, None, None, answers, ranks) for answers, ranks, *_ in cases))
    data = data.add_column("origin", [f"line {k}" for k in range(len(cases))])
    record = []
    encoder, names = Encoder("ranked", gpt2, length + 12), Names("train")
    encoded = encode_rows(data, encoder, cache_dir=str(tmp_path), names=names, record=record)
    texts = [[gpt2.decode(ids[length:], skip_special_tokens=True) for ids in row] for row in encoded["answers_ids"]]
    kept = [
        [gpt2.decode(encode_pair(gpt2, PROMPT, a, length + 12)[0][length:], skip_special_tokens=True) for a in used]
        for _, _, reason, used in cases
        if reason is None
    ]
    assert texts == kept and encoded["ranks"][:] == [[1, 2], [1, 2, 3], [1, 2], [1, 2, 3]]
    out = capsys.readouterr().out
    for reason in ("with fewer than two distinct answers", "whose answers are all tied"):
        where = ", ".join(f"line {k}" for k, case in enumerate(cases) if case[2] == reason)
        assert f"{sum(case[2] == reason for case in cases)} {reason} ({where})" in out
    lost = sum(len(case[0]) - len(case[3]) for case in cases if case[2] is None)
    assert (
        lost == 7 and f"(train): {lost} answers of 4 rows left out: empty, or equal to another answer of the row" in out
    )
    assert record[0]["answers_left_out"] == lost and record[0]["kept"] == 4


def test_a_ranked_row_makes_room_for_its_longest_answer(tmp_path, gpt2):
    long = "\n\nHuman: " + "so " * 60 + "?\n\nAssistant:"
    data = ranked_rows((long, " a", " b", [" a", " b" * 4, " c"], [1, 2, 3]))
    (row,) = encode(tmp_path, data, "ranked", gpt2, max_len=32, overlong="cut")
    assert max(map(len, row["answers_ids"])) == 32 and all(ids[-1] == gpt2.eos_token_id for ids in row["answers_ids"])
    with pytest.raises(UserError, match="every prompt of --data_path alone is as long"):
        encode(tmp_path, data, "ranked", gpt2, max_len=32)


def test_prompt_rows_are_cut_on_the_left_and_reported(tmp_path, tokenizer, capsys):
    long = "\n\nHuman: " + "What is it? " * 20 + "\n\nAssistant:"
    encoded = encode(tmp_path, rows((PROMPT,), (long,)), "prompts", tokenizer, 40, length_flag="--max_prompt_seq_len")
    assert encoded["prompt"] == [PROMPT, long] and encoded[0]["input_ids"] == encode_prompts(tokenizer, [PROMPT])[0]
    first = beginning(tokenizer)
    whole = encode_prompts(tokenizer, [long])[0]
    assert encoded[1]["input_ids"] == first + whole[-(40 - len(first)) :]
    assert (
        f"--max_prompt_seq_len 40: 1 of 2 rows of --data_path (train) are too long: longer prompts, up to {len(whole)}"
        in (capsys.readouterr().out)
    )


def test_dropped_rows_are_counted_by_reason(tmp_path, gpt2, capsys, encode_pair):
    long = "What is it? " * 40
    data = rows(
        (PROMPT, " one", " two"),
        (PROMPT, " one", " one"),
        (PROMPT, " one", "one "),
        (PROMPT, " ", " two"),
        ("  ", " one", " two"),
        (PROMPT, " one", None),
        (long, " one", " two"),
        (PROMPT, " " + long + "one", " " + long + "two"),
    )
    encoded = encode(tmp_path, data, "ranking", gpt2)
    assert len(encoded) == 1 and encoded[0]["chosen_ids"] == encode_pair(gpt2, PROMPT, " one", 64)[0]
    line = capsys.readouterr().out.splitlines()[0]
    assert line == (
        "--data_path (train): 7 of 8 rows dropped: 1 whose answers are equal after the cut; 1 whose prompt alone fills "
        "--max_seq_len; 1 with an empty answer; 1 with an empty prompt; 2 with equal answers; 1 without an answer"
    )


def test_a_prompt_that_leaves_no_room_is_told_of_the_stage_s_own_flag(tmp_path, gpt2, capsys):
    data, flag = rows((PROMPT, " one"), ("What is it? " * 40, " one")), "--max_prompt_seq_len + --max_answer_seq_len"
    encode(tmp_path, data, "supervised", gpt2, length_flag=flag)
    assert capsys.readouterr().out.splitlines()[0] == (
        f"--data_path (train): 1 of 2 rows dropped: 1 whose prompt alone fills {flag}"
    )


def test_cut_answers_are_reported(tmp_path, gpt2, capsys):
    encoded = encode(tmp_path, rows((PROMPT, " yes" * 60), (PROMPT, " no")), "supervised", gpt2, 50)
    assert len(encoded[0]["input_ids"]) == 50 and gpt2.eos_token_id not in encoded[0]["input_ids"]
    assert capsys.readouterr().out == (
        "--max_seq_len 50: 1 of 2 rows of --data_path (train) are too long: longer answers are cut, and without an end "
        "token\n"
    )


LONG = "\n\nHuman: " + "What is it? " * 20 + "\n\nAssistant:"


@pytest.mark.parametrize("kind", ["supervised", "ranking"])
def test_long_prompts_that_are_cut_keep_their_end_and_leave_room_for_the_answer(
    tmp_path, tokenizer, kind, capsys, encode_pair
):
    data = rows((LONG, " yes", " no"), (PROMPT, " yes", " no"))
    row = encode(tmp_path, data, kind, tokenizer, 40, overlong="cut")[0]
    ids = row["input_ids" if kind == "supervised" else "chosen_ids"]
    first, n = beginning(tokenizer), row["prompt_length"]
    answer = encode_pair(tokenizer, LONG, " yes", 10**6)[0][len(encode_prompts(tokenizer, [LONG])[0]) :]
    assert ids[n:] == answer and len(ids) <= 40
    assert ids[:n] == first + encode_prompts(tokenizer, [LONG])[0][len(first) :][-(n - len(first)) :]
    if kind == "ranking":
        assert row["rejected_ids"][:n] == ids[:n] and row["rejected_ids"] != ids
    assert (
        "--max_seq_len 40: 1 of 2 rows of --data_path (train) are too long: longer prompts" in capsys.readouterr().out
    )


def test_a_cut_prompt_leaves_at_most_half_to_a_long_answer(tmp_path, gpt2):
    row = encode(tmp_path, rows((LONG, " yes" * 99)), "supervised", gpt2, 41, overlong="cut")[0]
    assert row["prompt_length"] == 21 and len(row["input_ids"]) == 41


def test_long_prompts_of_step_3_can_be_dropped(tmp_path, gpt2, capsys):
    encoded = encode(tmp_path, rows((PROMPT,), (LONG,)), "prompts", gpt2, 40, overlong="drop")
    assert encoded["prompt"] == [PROMPT]
    assert "1 of 2 rows dropped: 1 whose prompt is longer than --max_prompt_seq_len" in capsys.readouterr().out


def test_reports_name_the_first_rows(tmp_path, gpt2, capsys):
    data = rows(*[(PROMPT, " one", " one")] * 4, (PROMPT, " a" * 90, " b")).add_column(
        "origin", [f"line {i}" for i in range(2, 7)]
    )
    encode(tmp_path, data, "ranking", gpt2, 64)
    assert capsys.readouterr().out.splitlines() == [
        "--data_path (train): 4 of 5 rows dropped: 4 with equal answers (line 2, line 3, line 4, ...)",
        "--max_seq_len 64: 1 of 5 rows of --data_path (train) are too long: longer answers are cut, and without an end "
        "token (line 6)",
    ]


def test_plain_text_is_learned_from_its_first_token(tmp_path, tokenizer):
    data = Dataset.from_dict({"prompt": [None, None], "chosen": ["How are you today", ""], "rejected": [None] * 2})
    encoded = encode(tmp_path, data, "supervised", tokenizer)
    whole = [*encode_prompts(tokenizer, ["How are you today"])[0], tokenizer.eos_token_id]
    assert len(encoded) == 1 and encoded[0]["input_ids"] == whole and encoded[0]["prompt_length"] == 1
    for kind, need in (("ranking", "step 2 learns from pairs"), ("prompts", "step 3 starts from prompts")):
        with pytest.raises(UserError, match=need):
            encode(tmp_path, data, kind, tokenizer)


def test_margins_stand_beside_the_pairs_where_there_are_some(tmp_path, gpt2):
    data = rows((PROMPT, " yes", " no"), (PROMPT, " 1", " 2"))
    assert "margin" not in encode(tmp_path, data, "ranking", gpt2).column_names
    encoded = encode(tmp_path, data.add_column("margin", [None, 1.5]), "ranking", gpt2)
    assert encoded["margin"] == [None, 1.5]


@pytest.mark.parametrize("kind", ["supervised", "ranking", "prompts"])
def test_a_length_that_no_prompt_fits_is_refused(tmp_path, gpt2, kind):
    longest = len(encode_prompts(gpt2, [PROMPT + "??"])[0])
    data = rows((PROMPT, " yes", " no"), (PROMPT + "??", " yes", " no"))
    with pytest.raises(UserError, match=rf"--max_seq_len 4: every prompt of .*\(up to {longest} tokens\)"):
        encode(tmp_path, data, kind, gpt2, 4)


def test_long_eval_prompts_are_only_cut(tmp_path, gpt2):
    names = Names("eval", length_flag="--max_prompt_seq_len")
    encoded = encode_rows(rows((PROMPT,)), Encoder("prompts", gpt2, 4), cache_dir=str(tmp_path), names=names)
    assert encoded[0]["input_ids"] == encode_prompts(gpt2, [PROMPT])[0][-4:]


@pytest.mark.parametrize("kind", ["ranking", "ranked"])
def test_a_ranked_row_without_a_better_and_a_worse_answer_says_so(tmp_path, gpt2, kind, capsys):
    tied = (PROMPT, " A", None, [" A", " B"], [1, 1])
    alone = (PROMPT, " A", None, [" A", " "], [1, 2])
    encoded = encode(tmp_path, ranked_rows(tied, (PROMPT, " A", " B", [" A", " B"], [1, 2]), alone), kind, gpt2)
    assert len(encoded) == 1
    assert "1 whose answers are all tied; 1 with fewer than two distinct answers" in capsys.readouterr().out
    with pytest.raises(UserError, match="no usable row is left for train: 2 whose answers are all tied"):
        encode(tmp_path, ranked_rows(tied, tied), kind, gpt2)


@pytest.mark.parametrize(
    ("kind", "example", "need"),
    [
        ("supervised", (PROMPT,), "step 1 learns from answers: expected a column chosen or completion"),
        ("ranking", (PROMPT, " yes"), "step 2 learns from pairs: expected the columns chosen and rejected"),
        ("ranking", (PROMPT, " yes", " yes"), "no usable row is left for train: 1 with equal answers"),
    ],
)
def test_a_data_set_that_does_not_serve_the_stage_is_refused(tmp_path, gpt2, kind, example, need):
    with pytest.raises(UserError, match=f"--data_path x.jsonl: .*{need}"):
        encode(tmp_path, rows(example), kind, gpt2, data_flag="--data_path x.jsonl")


def test_the_cache_is_used_and_knows_what_it_depends_on(tmp_path, tokenizer_folders, monkeypatch, capsys):
    gpt2, qwen = (load_tokenizer(str(tokenizer_folders[kind])) for kind in ("gpt2", "qwen"))
    data = rows((PROMPT, ANSWER), (PROMPT, " "))
    first = encode(tmp_path, data, "supervised", gpt2)
    report = capsys.readouterr().out
    monkeypatch.setattr("utils.data.encoding.to_columns", lambda rows: pytest.fail("mapped again"))
    second = encode(tmp_path, data, "supervised", gpt2)
    assert second.to_dict() == first.to_dict() and capsys.readouterr().out == report != ""
    for other in ({"tokenizer": qwen}, {"max_len": 32}, {"kind": "prompts"}, {"data": rows((PROMPT, " other"))}):
        with pytest.raises(pytest.fail.Exception, match="mapped again"):
            encode(tmp_path, **{"data": data, "kind": "supervised", "tokenizer": gpt2, **other})
