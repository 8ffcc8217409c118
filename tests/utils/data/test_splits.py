import itertools

import pytest

from utils.data.splits import blend, stage_indices
from utils.run import UserError


@pytest.mark.parametrize("data_split", ["2,4,4", "1,1,1", "0.5,0.25,0.25", "6, 3, 1"])
@pytest.mark.parametrize("n_rows", [7, 100, 1001])
def test_stages_partition_the_rows(n_rows, data_split):
    parts = [stage_indices(n_rows, data_split, stage) for stage in range(3)]
    assert sorted(itertools.chain(*parts)) == list(range(n_rows))  # every row once
    shares = [float(share) for share in data_split.split(",")]
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - n_rows * share / sum(shares)) <= 1


def test_the_partition_is_fixed_and_shuffled():
    assert stage_indices(10, "2,4,4", 0) == stage_indices(10, "2,4,4", 0) == sorted(stage_indices(10, "2,4,4", 0))
    assert stage_indices(1000, "2,4,4", 0) != list(range(200))
    assert stage_indices(1000, "2,4,4", 0, seed=1) != stage_indices(1000, "2,4,4", 0, seed=2)
    # RandomState(1234).permutation(10) = [7 2 9 1 0 8 4 5 6 3]
    assert [stage_indices(10, "2,4,4", stage) for stage in range(3)] == [[2, 7], [0, 1, 8, 9], [3, 4, 5, 6]]


def test_one_stage_may_take_all():
    assert stage_indices(5, "0,10,0", 1) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("data_split", ["", "2,4", "2,4,4,1", "a,b,c", "-1,4,4", "0,0,0", "nan,1,1", "inf,1,1"])
def test_three_numbers_are_expected(data_split):
    with pytest.raises(UserError, match="--data_split .*: expected three shares like 2,4,4"):
        stage_indices(10, data_split, 0)


@pytest.mark.parametrize(("n_rows", "data_split", "stage"), [(10, "0,5,5", 0), (2, "2,4,4", 0), (0, "2,4,4", 2)])
def test_an_empty_stage_is_refused(n_rows, data_split, stage):
    with pytest.raises(UserError, match=rf"no row is left for step {stage + 1} out of {n_rows}"):
        stage_indices(n_rows, data_split, stage)


def test_a_blend_has_its_proportions_and_no_row_twice():
    # 100 and 50 rows, 1 : 3 -> total = min(100 / .25, 50 / .75) = 66.7, so round(16.7) and 50 rows
    first, second = blend([100, 50], [0.5, 1.5], seed=3)
    assert (len(first), second) == (17, list(range(50)))
    assert first == sorted(set(first)) and set(first) < set(range(100)) and first != list(range(17))
    assert blend([100, 50], [0.25, 0.75], seed=3) == [first, second]
    assert blend([100, 50], [0.25, 0.75], seed=4)[0] != first
    assert [len(rows) for rows in blend([1000, 2], [1e-6, 1.0])] == [1, 2]  # at least one row of each
