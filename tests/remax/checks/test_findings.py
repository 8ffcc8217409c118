"""The report of an examination."""

import pytest

from remax.checks.findings import FAILURE, OK, WARNING, Finding, Report
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
