"""Reading flags one by one: help, spelling, kinds and ranges."""

import dataclasses
from dataclasses import dataclass

import pytest

from remax.cli.flags import Count, Step1Arguments, Step2Arguments, Step3Arguments, flag
from remax.cli.parser import build_parser, read_flags
from utils.run import UserError


@dataclass(kw_only=True)
class Group:
    _argument_group_name = "a group"

    number_of_rows: Count = flag(3, "rows")


@dataclass(kw_only=True)
class Program(Group):
    pass


@pytest.mark.parametrize("arguments", [Step1Arguments, Step2Arguments, Step3Arguments])
def test_help_is_grouped_and_complete(arguments):
    text = build_parser(arguments, "Step").format_help()
    for field in dataclasses.fields(arguments):
        if field.init:
            assert f"--{field.name} " in text
            assert field.metadata["help"]
    assert text.count("(required)") == 1
    for group in ("data:", "run:", "optimizer (AdamW):", "memory:", "LoRA:", "retired (accepted, do nothing):"):
        assert f"\n{group}\n" in text
    assert "--data-path" not in text
    assert "(default: Dahoas/rm-static)" in text
    assert "(default: None)" not in text
    assert "optimizer steps until the learning rate is at its peak" in text


def test_flags_become_attributes():
    assert read_flags(Program, ["--number-of-rows", "5"], "A program") == Program(number_of_rows=5)
    assert read_flags(Program, [], "A program").number_of_rows == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--number_of_row 5", r"--number_of_row: unknown flag; did you mean --number_of_rows\?"),
        ("--number_of_rows five", r"--number_of_rows: invalid int value: 'five'"),
        ("--number_of_rows 0", r"--number_of_rows 0: must be at least 1"),
        ("five", r"five: belongs to no flag"),
        ("--generation_batch_numbers 2", r"--generation_batch_numbers: unknown flag; use --generation_batches"),
    ],
)
def test_bad_flags_are_named(line, message):
    with pytest.raises(UserError, match=message):
        read_flags(Program, line.split(), "A program")
