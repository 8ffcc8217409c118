"""From the command line to a typed object, flag by flag: parsing, spelling, ranges, retired flags.

What flags say together is for `arguments` to judge.
"""

import argparse
import difflib
import os
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from remax.cli.flags import WHY_RETIRED
from utils.run import UserError

AnyArguments = TypeVar("AnyArguments")

USAGE = "deepspeed main.py [flags]"

# Flags of older DeepSpeed-Chat scripts that have another name here.
RENAMED = {
    "--per_device_train_batch_size": "--per_device_generation_batch_size",
    "--per_device_mini_train_batch_size": "--per_device_training_batch_size",
    "--generation_batch_numbers": "--generation_batches",
    "--deepspeed_config": "--zero_stage or --actor_zero_stage, --offload, --dtype or --actor_dtype",
}


class _Parser(HfArgumentParser):
    """Raises UserError instead of printing the usage on every rank; only rank 0 prints the help."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (all flags: --help)")

    def print_help(self, file: Any = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super().print_help(file)


def build_parser(arguments: type, description: str, usage: str = USAGE) -> _Parser:
    """The parser of a program: a group of flags for each dataclass that `arguments` is made of."""
    # A dataclass keeps its fields last base first, so the groups are listed that way round too.
    groups = [base for base in reversed(arguments.__bases__) if hasattr(base, "_argument_group_name")]
    parser = _Parser(
        groups,
        description=description,
        usage=usage,
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,
    )
    for action in parser._actions:
        if action.dest == "help":
            continue
        action.option_strings = action.option_strings[:1]  # --some-flag works as --some_flag does, but is not listed
        if action.required:
            action.help += " (required)"
        elif action.default is not None and action.default is not False and action.default != []:
            action.help += (
                f" (default: {' '.join(action.default) if isinstance(action.default, list) else '%(default)s'})"
            )
        if action.choices is None:
            action.metavar = {int: "N", float: "X", str: "TEXT"}.get(action.type, "true|false")
    return parser


def read_flags(
    arguments: type[AnyArguments],
    argv: Sequence[str] | None,
    description: str,
    usage: str = USAGE,
) -> AnyArguments:
    """The flags of a program (argv None: of the command line), each checked for itself.

    Raises:
        UserError: an unknown flag, a value of another kind, a number out of its range.
    """
    namespace, unknown = build_parser(arguments, description, usage).parse_known_args(argv)
    if unknown:
        raise UserError(unknown_flags(unknown, [f"--{name}" for name in vars(namespace)]))
    args = arguments(**vars(namespace))
    check_ranges(args)
    note_retired(args)
    return args


def unknown_flags(unknown: Sequence[str], known: Sequence[str]) -> str:
    name = unknown[0].split("=")[0]
    if not name.startswith("-"):
        return f"{' '.join(unknown)}: belongs to no flag; write --flag value, and quote values with spaces"
    if name in RENAMED:
        return f"{name}: unknown flag; use {RENAMED[name]}"
    close = difflib.get_close_matches(name.replace("-", "_").replace("__", "--", 1), known, n=1)
    return f"{name}: unknown flag" + (f"; did you mean {close[0]}?" if close else "") + " (all flags: --help)"


def note_retired(args: Any) -> None:
    """One line for each reason, naming the retired flags that were given."""
    given: dict[str, list[str]] = {}
    for name, reason in WHY_RETIRED.items():
        value = getattr(args, name, None)
        if value is not None and value is not False:  # 0 was given too
            given.setdefault(reason, []).append(f"--{name}")
    for reason, names in given.items():
        args.notices.append(f"{', '.join(names)}: without effect; {reason}")


def check_ranges(args: Any) -> None:
    """Each number against the Range of its annotation (also inside `X | None`)."""
    for name, annotation in get_type_hints(type(args), include_extras=True).items():
        candidates = [annotation] if get_origin(annotation) is Annotated else get_args(annotation)
        for candidate in candidates:
            if get_origin(candidate) is not Annotated:
                continue
            allowed, value = candidate.__metadata__[0], getattr(args, name)
            if value is not None and not allowed.holds(value):
                raise UserError(f"--{name} {value}: must be {allowed.words}")
