"""The report of an examination."""

import pytest
import torch

from remax.checks import findings
from remax.checks.findings import FAILURE, OK, WARNING, Finding, Report, gap
from utils.run import UserError


def test_the_table_names_result_and_remedy():
    report = Report([Finding("a", OK, "1 of 1"), Finding("longer name", FAILURE, "0 of 1", "mend it")])
    assert report.table().splitlines() == [
        "check        result   figure",
        "a            ok       1 of 1",
        "longer name  FAILURE  0 of 1",
        "             remedy:  mend it",
    ]
    with pytest.raises(UserError, match="longer name: 0 of 1. mend it"):
        report.refuse_failures()
    Report([Finding("a", WARNING, "x", "y")]).refuse_failures()  # a warning does not stop training


def test_a_distance_is_that_of_all_ranks(monkeypatch):
    # Here 1 and 3; on the other rank 4 numbers that add up to 8, one of them 5: mean (4 + 8) / 6.
    monkeypatch.setattr(findings, "gather_objects", lambda mine: [mine, (8.0, 5.0, 4)])
    found = gap(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([2.0, 5.0, 0.0]), torch.tensor([True, True, False]))
    assert (found.mean, found.largest, found.count) == (2.0, 5.0, 6)
