import itertools
import random

import pytest

from utils.data.splits import blend, prompt_key, stage_indices
from utils.run import UserError


@pytest.mark.parametrize("data_split", ["2,4,4", "1,1,1", "0.5,0.25,0.25", "6, 3, 1"])
@pytest.mark.parametrize("n_rows", [7, 100, 1001])
def test_stages_partition_the_rows(n_rows, data_split):
    parts = [stage_indices(range(n_rows), data_split, stage) for stage in range(3)]
    assert sorted(itertools.chain(*parts)) == list(range(n_rows))  # every row once
    shares = [float(share) for share in data_split.split(",")]
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - n_rows * share / sum(shares)) <= 1


def test_the_partition_is_fixed_and_shuffled():
    assert (
        stage_indices(range(10), "2,4,4", 0)
        == stage_indices(range(10), "2,4,4", 0)
        == sorted(stage_indices(range(10), "2,4,4", 0))
    )
    assert stage_indices(range(1000), "2,4,4", 0) != list(range(200))
    assert stage_indices(range(1000), "2,4,4", 0, seed=1) != stage_indices(range(1000), "2,4,4", 0, seed=2)
    # RandomState(1234).permutation(10) = [7 2 9 1 0 8 4 5 6 3]
    assert [stage_indices(range(10), "2,4,4", stage) for stage in range(3)] == [[2, 7], [0, 1, 8, 9], [3, 4, 5, 6]]


def test_one_stage_may_take_all():
    assert stage_indices(range(5), "0,10,0", 1) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("data_split", ["", "2,4", "2,4,4,1", "a,b,c", "-1,4,4", "0,0,0", "nan,1,1", "inf,1,1"])
def test_three_numbers_are_expected(data_split):
    with pytest.raises(UserError, match="--data_split .*: expected three shares like 2,4,4"):
        stage_indices(range(10), data_split, 0)


@pytest.mark.parametrize(("n_rows", "data_split", "stage"), [(10, "0,5,5", 0), (2, "2,4,4", 0), (0, "2,4,4", 2)])
def test_an_empty_stage_is_refused(n_rows, data_split, stage):
    with pytest.raises(UserError, match=rf"no row is left for step {stage + 1} out of {n_rows}"):
        stage_indices(range(n_rows), data_split, stage)


def stages_of(prompts, data_split="2,4,4", **options) -> list[list[int]]:
    """The prompts of the rows of each stage; every row is in one."""
    parts = [stage_indices(prompts, data_split, stage, **options) for stage in range(3)]
    assert sorted(itertools.chain(*parts)) == list(range(len(prompts)))
    return [[prompts[i] for i in part] for part in parts]


def test_a_prompt_serves_one_stage_and_the_shares_are_kept():
    # As in real preference data: 736 prompts, 12,548 rows, some prompts with far more rows than others.
    draw = random.Random(0)
    prompts = [draw.choice(range(1 + k)) for k in draw.choices(range(736), k=12_548)]
    parts = stages_of(prompts)
    first, second, third = map(set, parts)
    assert not (first & second or first & third or second & third)
    largest = max(map(prompts.count, set(prompts)))
    assert largest > 50  # and yet prompts of few rows even the shares out
    assert [abs(len(part) - share * 12_548) <= 1 for part, share in zip(parts, (0.2, 0.4, 0.4), strict=True)]
    assert stages_of(prompts) == parts != stages_of(prompts, seed=2)


def test_prompts_of_one_row_are_shuffled_as_if_there_were_no_others():
    # RandomState(1234).permutation(12) = [7 8 11 2 9 10 1 0 4 5 6 3]. Rows 7 and 2 share a prompt, which goes to the
    # first of the stages that lack most, step 2. The others in that order: 8 11 | 9 10 1 | 0 4 5 6 3.
    prompts = [0, 1, 77, 3, 4, 5, 6, 77, 8, 9, 10, 11]
    assert [stage_indices(prompts, "2,5,5", stage) for stage in range(3)] == [
        [8, 11],
        [1, 2, 7, 9, 10],
        [0, 3, 4, 5, 6],
    ]


@pytest.mark.parametrize("data_split", ["2,4,4", "8,1,1", "1,1,98"])
def test_a_prompt_that_dominates_leaves_rows_for_every_stage(data_split):
    # 90 rows of one prompt and 10 others: it goes to a stage with the largest share, and every stage gets something.
    parts = stages_of([0] * 90 + list(range(1, 11)), data_split)
    assert all(parts) and sum(0 in part for part in parts) == 1
    assert all(stages_of([0] * 90 + [1] * 5 + [2] * 5, data_split))  # as many prompts as stages


def test_a_share_that_rounds_to_no_row_is_refused():
    # 1 % of 20 rows is 0.2 of a row; where two rows share each prompt as well.
    for prompts in (range(20), [k // 2 for k in range(20)]):
        assert len(stage_indices(prompts, "1,98,1", 1)) == 20
        with pytest.raises(UserError, match="--data_split 1,98,1: no row is left for step 1 out of 20; give"):
            stage_indices(prompts, "1,98,1", 0)


def test_rows_are_divided_where_prompts_are_too_few(capsys):
    assert [len(part) for part in stages_of([5] * 10, name="my.jsonl")] == [2, 4, 4]
    assert "my.jsonl has 1 different prompts: their rows are divided among the stages" in capsys.readouterr().out
    two = [5] * 5 + [6] * 5  # enough for two stages
    assert [{two[i] for i in stage_indices(two, "0,1,1", stage)} for stage in (1, 2)] in ([{5}, {6}], [{6}, {5}])


def test_a_blend_has_its_proportions_and_no_row_twice():
    # 100 and 50 rows, 1 : 3 -> total = min(100 / .25, 50 / .75) = 66.7, so round(16.7) and 50 rows
    first, second = blend([100, 50], [0.5, 1.5], seed=3)
    assert (len(first), second) == (17, list(range(50)))
    assert first == sorted(set(first)) and set(first) < set(range(100)) and first != list(range(17))
    assert blend([100, 50], [0.25, 0.75], seed=3) == [first, second]
    assert blend([100, 50], [0.25, 0.75], seed=4)[0] != first
    assert [len(rows) for rows in blend([1000, 2], [1e-6, 1.0])] == [1, 2]  # at least one row of each


def test_plain_texts_are_told_apart_by_themselves():
    # They have no prompt: with one key for all of them, all would fall to one stage.
    keys = [prompt_key(None, f"text {i}") for i in range(60)]
    assert len(set(keys)) == 60 and prompt_key(None, "text 0") == keys[0]
    assert prompt_key("a prompt", "one answer") == prompt_key("a prompt", "another")
    assert [len(stage_indices(keys, "1,1,1", stage)) for stage in range(3)] == [20, 20, 20]
