"""From the command line to a typed object, flag by flag: parsing, help, spelling, ranges, retired flags.

What flags say together is for `arguments` to judge.
"""

import argparse
import dataclasses
import difflib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from remax.cli.config_file import read_config
from remax.cli.flags import WHY_RETIRED, Range
from utils.run import UserError, rank_of_launcher

AnyArguments = TypeVar("AnyArguments")
USAGE = "deepspeed main.py [flags]"
ALL_FLAGS = "(all flags: --help all)"
LARGEST = 2**31 - 1  # whole numbers: what C code takes as one
SMALLEST_FLOAT, LARGEST_FLOAT = 2.0**-126, 3.4e38  # normal float32 numbers
SHORT = 35  # a program with fewer flags shows all of them in its --help

# Flags of older DeepSpeed-Chat scripts that have another name here.
RENAMED = {
    "--per_device_train_batch_size": "--per_device_generation_batch_size",
    "--per_device_mini_train_batch_size": "--per_device_training_batch_size",
    "--generation_batch_numbers": "--generation_batches",
    "--deepspeed_config": "--zero_stage or --actor_zero_stage, --offload, --dtype or --actor_dtype",
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a flag takes."""

    type: type  # of one value
    several: bool = False  # a list of such values
    choices: tuple[Any, ...] | None = None  # the values that are allowed, None: all
    allowed: Range | None = None

    @classmethod
    def of(cls, annotation: Any) -> "Kind":
        """From an annotation: `X`, `X | None`, `list[X]`, `Literal[...]`, `Annotated[X, Range]`."""
        if get_origin(annotation) in (Union, types.UnionType):
            (annotation,) = (part for part in get_args(annotation) if part is not types.NoneType)
        origin, parts = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            return cls(parts[0], allowed=parts[1])
        if origin is Literal:
            return cls(type(parts[0]), choices=parts)
        if origin is list:
            return dataclasses.replace(cls.of(parts[0]), several=True)
        return cls(annotation)

    @property
    def metavar(self) -> str | None:
        return None if self.choices else {int: "N", float: "X", str: "TEXT", bool: "true|false"}[self.type]

    @property
    def words(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[self.type]

    @property
    def convert(self) -> Callable[[str], Any]:
        """Makes a value of a word of the command line."""
        if self.choices:
            known = {str(choice): choice for choice in self.choices}
            return lambda word: known.get(word, word)
        return _boolean if self.type is bool else self.type

    def from_file(self, value: Any) -> Any:
        """A value as yaml and json have it, converted like a word of the command line (yaml takes 1e-5 for a text).

        Raises:
            ValueError: it is of another kind, with what was expected.
        """
        if isinstance(value, list) and not self.several:
            raise ValueError(f"is a list; expected {self.words}")
        converted = []
        for item in value if isinstance(value, list) else [value]:
            try:
                if self.type is str and not isinstance(item, str):
                    raise ValueError
                converted.append(self.convert(str(item)))
                if self.choices and converted[-1] not in self.choices:
                    raise ValueError
            except (ValueError, argparse.ArgumentTypeError):
                raise ValueError(f"is {item!r}; expected {self.words}") from None
            if fault := self.fault(converted[-1]):
                raise ValueError(f"is {converted[-1]!r}; {fault}")
        return converted if self.several else converted[0]

    def fault(self, value: Any) -> str | None:
        """What is wrong with a number out of its range, or with a text that says nothing; several: with one of them."""
        if self.type is str and not value.strip():
            return "expected some text"
        if self.type is str and "\0" in value:
            return "expected text without zero bytes"
        if self.allowed is not None and not self.allowed.holds(value):
            return f"must be {self.allowed.words}"
        if self.type is int and abs(value) > LARGEST:
            return f"must be at most {LARGEST}"
        if self.type is float and value != 0 and not SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT:
            return f"must be between {SMALLEST_FLOAT:g} and {LARGEST_FLOAT:g}, as the number is a float32"
        return None


def _boolean(word: str) -> bool:
    if word.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if word.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"is {word!r}; expected true or false")


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a program."""

    kind: Kind
    group: str | None  # the title that it stands under in the help
    default: Any  # MISSING: the flag is required
    help: str
    basic: bool  # most runs need it

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def full_help(self) -> str:
        if self.required:
            return f"{self.help} (required)"
        if self.default is None or self.default is False or self.default == []:
            return self.help
        shown = " ".join(self.default) if self.kind.several else str(self.default)
        return f"{self.help} (default: {shown.replace('%', '%%')})"


def flags_of(arguments: type) -> dict[str, Flag]:
    """The flags of a program by name. The groups that hold required flags come first, as in the help."""
    hints = get_type_hints(arguments, include_extras=True)
    flags = {}
    for field in dataclasses.fields(arguments):
        if field.init:
            owner = next(cls for cls in arguments.__mro__ if field.name in inspect.get_annotations(cls))
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            kind, group = Kind.of(hints[field.name]), getattr(owner, "_group", None)
            flags[field.name] = Flag(kind, group, default, field.metadata["help"], field.metadata["basic"])
    first = {flag.group for flag in flags.values() if flag.required}
    return dict(sorted(flags.items(), key=lambda item: item[1].group not in first))


class _Parser(argparse.ArgumentParser):
    """Raises UserError instead of printing the usage on every rank."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} {ALL_FLAGS}")


class _Help(argparse.Action):
    """Prints `text(everything)` on rank 0 and ends the program."""

    def __init__(self, *args: Any, text: Callable[[bool], str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.text = text

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        if rank_of_launcher() == 0:
            print(self.text(values == "all"), end="")
        parser.exit()


def build_parser(
    arguments: type, description: str, usage: str = USAGE, everything: bool = True
) -> argparse.ArgumentParser:
    """The parser of a program; its namespace holds the flags that were given, no defaults.

    Args:
        arguments: the program's dataclass; the base class that declares a flag names its group.
        everything: whether the help lists every flag, or only those that most runs need.
    """
    flags = flags_of(arguments)
    everything = everything or len(flags) < SHORT
    shown = [name for name, flag in flags.items() if everything or flag.basic]
    epilog = None if everything else f"The {len(shown)} usual flags; --help all lists all {len(flags)}."
    parser = _Parser(description=description, usage=usage, epilog=epilog, allow_abbrev=False, add_help=False)
    parser.add_argument(
        "-h",
        "--help",
        action=_Help,
        default=argparse.SUPPRESS,
        nargs="?",
        choices=["all"],
        metavar="all",
        text=lambda everything: build_parser(arguments, description, usage, everything).format_help(),
        help="show the usual flags, or all of them",
    )
    groups: dict[str | None, Any] = {None: parser}
    for name, flag in flags.items():
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        options: dict[str, Any] = {"nargs": "*"} if flag.kind.several else {}
        if flag.kind.type is bool:
            options = {"nargs": "?", "const": True}
        action = groups[flag.group].add_argument(
            *dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]),
            type=flag.kind.convert,
            choices=flag.kind.choices,
            metavar=flag.kind.metavar,
            default=argparse.SUPPRESS,
            help=flag.full_help if name in shown else argparse.SUPPRESS,
            **options,
        )
        action.option_strings = action.option_strings[:1]  # --some-flag works as --some_flag does, but is not listed
    return parser


def read_flags(
    arguments: type[AnyArguments], argv: Sequence[str] | None, description: str, usage: str = USAGE
) -> AnyArguments:
    """The flags of a program (argv None: of the command line), each checked for itself.

    Raises:
        UserError: an unknown flag, a value of another kind, a number out of its range; on the command line or in the
            file of --config.
    """
    flags = flags_of(arguments)
    namespace, unknown = build_parser(arguments, description, usage).parse_known_args(argv)
    given = vars(namespace)
    if unknown:
        name = unknown[0].split("=")[0]
        belongs = f"{' '.join(unknown)}: belongs to no flag; write --flag value, and quote values with spaces"
        raise UserError(f"{name}: {_correction(name, flags)}" if name.startswith("-") else belongs)
    if "config" in given:
        given = values_of_file(given["config"], flags, getattr(arguments, "stage", None)) | given
    missing = [f"--{name}" for name, flag in flags.items() if flag.required and name not in given]
    if missing:
        raise UserError(f"the following arguments are required: {', '.join(missing)} {ALL_FLAGS}")
    args = arguments(**given)
    for name, flag in flags.items():
        found = getattr(args, name)
        for value in [] if found is None else found if flag.kind.several else [found]:
            if fault := flag.kind.fault(value):
                raise UserError(f"--{name} {str(value).strip() or repr(value)}: {fault}")
    note_retired(args)
    return args


def values_of_file(file: str, flags: Mapping[str, Flag], stage: str | None) -> dict[str, Any]:
    """What the file of --config sets: null is the default; the launcher's `local_rank` is left out.

    Args:
        stage: of the program, as run.json names it; None: the program is no stage.

    Raises:
        UserError: no such file, or it sets something else than flags of this program to values that they take.
    """
    where, (content, run_of) = f"--config {file}", read_config(file)
    if run_of is not None and run_of != stage:
        raise UserError(f"{where}: is a run of {run_of}, not of {stage or 'this program'}")
    values: dict[str, Any] = {}
    keys: dict[str, Any] = {}  # by the flag that they name
    for key, value in content.items():
        name = str(key).removeprefix("--").replace("-", "_")
        if name not in flags:
            if run_of is not None:
                continue  # such as the notices of a run
            raise UserError(f"{where}: {key}: {_correction(f'--{name}', flags)}")
        if name in keys:
            raise UserError(f"{where}: {key}: is the same flag as {keys[name]}; expected once")
        keys[name] = key
        if name == "config" and run_of is None:
            raise UserError(f"{where}: {key}: a file cannot name another one")
        if value is None or name in ("config", "local_rank"):
            continue
        if run_of is not None and name == "overwrite_output_dir":
            continue  # leave to replace something was given once, not for ever
        try:
            values[name] = flags[name].kind.from_file(value)
        except ValueError as error:
            raise UserError(f"{where}: {key}: {error}") from None
    return values


def _correction(name: str, known: Iterable[str]) -> str:
    if name in RENAMED:
        return f"unknown flag; use {RENAMED[name]}"
    close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1)
    return "unknown flag" + (f"; did you mean --{close[0]}?" if close else "") + f" {ALL_FLAGS}"


def note_retired(args: Any) -> None:
    """One line for each reason, naming the retired flags that were given."""
    given: dict[str, list[str]] = {}
    for name, reason in WHY_RETIRED.items():
        value = getattr(args, name, None)
        if value is not None and value is not False:  # 0 was given too
            given.setdefault(reason, []).append(f"--{name}")
    for reason, names in given.items():
        args.notices.append(f"{', '.join(names)}: without effect; {reason}")
