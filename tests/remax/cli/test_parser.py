"""Reading flags one by one: help, spelling, kinds and ranges."""

import dataclasses
from dataclasses import dataclass

import pytest

from remax.cli.evaluation import (
    AnswersArguments,
    ChatArguments,
    DoctorArguments,
    PromptEvalArguments,
    RewardEvalArguments,
    WinrateArguments,
)
from remax.cli.flags import Count, Flags, Step1Arguments, Step2Arguments, Step3Arguments, flag
from remax.cli.parser import build_parser, flags_of, read_flags
from remax.cli.planning import PlanArguments
from utils.run import UserError


@dataclass(kw_only=True)
class Group(Flags, group="a group"):
    number_of_rows: Count = flag(3, "rows")
    flag_of_two: bool = flag(False, "one or the other")


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


@pytest.mark.parametrize("arguments", [Step1Arguments, Step2Arguments, Step3Arguments])
def test_the_short_help_lists_the_usual_flags_and_says_where_the_others_are(arguments):
    flags = flags_of(arguments)
    text = build_parser(arguments, "Step", everything=False).format_help()
    basic = [name for name, flag in flags.items() if flag.basic]
    assert 20 <= len(basic) <= 40
    assert [name for name in flags if f"\n  --{name} " in text] == basic
    assert all(flag.basic for flag in flags.values() if flag.required)
    last = f"The {len(basic)} usual flags; --help all lists all {len(flags)}."
    assert text.splitlines()[-1] == last
    assert "retired" not in text
    assert last not in build_parser(arguments, "Step").format_help()


SMALL = [DoctorArguments, PlanArguments, PromptEvalArguments, RewardEvalArguments, AnswersArguments, WinrateArguments]
SMALL += [ChatArguments]


@pytest.mark.parametrize("arguments", SMALL)
def test_small_programs_list_every_flag_at_once(arguments):
    text = build_parser(arguments, "Program", everything=False).format_help()
    assert all(f"\n  --{name} " in text for name in flags_of(arguments))
    assert "--help all" not in text


@pytest.mark.parametrize(("rank", "line", "shown"), [("0", "--help", False), ("0", "-h all", True), ("1", "-h", None)])
def test_help_prints_on_rank_0_and_ends_the_program(capsys, monkeypatch, rank, line, shown):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop:
        read_flags(Step3Arguments, line.split(), "Step 3")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert bool(text) == (rank == "0") and ("--adam_beta1" in text) == bool(shown)


def test_flags_become_attributes():
    assert read_flags(Program, ["--number-of-rows", "5"], "A program") == Program(number_of_rows=5)
    assert read_flags(Program, [], "A program").number_of_rows == 3
    for line, value in [
        ("", False),
        ("--flag_of_two", True),
        ("--flag_of_two=no", False),
        ("--flag_of_two True", True),
    ]:
        assert read_flags(Program, line.split(), "A program").flag_of_two is value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--number_of_row 5", r"--number_of_row: unknown flag; did you mean --number_of_rows\?"),
        ("--number_of_rows five", r"--number_of_rows: invalid int value: 'five'"),
        ("--number_of_rows 0", r"--number_of_rows 0: must be at least 1"),
        ("five", r"five: belongs to no flag"),
        ("--flag_of_two maybe", r"--flag_of_two: is 'maybe'; expected true or false"),
        ("--generation_batch_numbers 2", r"--generation_batch_numbers: unknown flag; use --generation_batches"),
    ],
)
def test_bad_flags_are_named(line, message):
    with pytest.raises(UserError, match=message):
        read_flags(Program, line.split(), "A program")
