"""The flags of the programs that train nothing: prompt_eval.py of step 1, rw_eval.py of step 2, and those of remax."""

import math
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from remax.cli.flags import (
    Attention,
    ConfigFlag,
    Count,
    CountOrZero,
    Dtype,
    Flags,
    Fraction,
    NonNegative,
    Range,
    Rank,
    RewardSourceFlags,
    SamplingFlags,
    flag,
)
from remax.cli.model_names import check_model
from remax.cli.parser import read_flags
from remax.cli.validate import check_folder, check_reward, import_functions, resolve_dtype
from utils.files import read_text
from utils.run import UserError


@dataclass(kw_only=True)
class RetiredInRewardEval(Flags, group="retired (accepted, do nothing)"):
    num_padding_at_beginning: int | None = flag(None, "masks come from lengths")


@dataclass(kw_only=True)
class RewardEvalArguments(RetiredInRewardEval, ConfigFlag, group="model and data"):
    """All flags of rw_eval.py."""

    model_name_or_path: str = flag(help="the reward model: folder or hub name")
    data_path: str | None = flag(
        None,
        "what to score: a file with pairs or single answers in any shape that training takes; of a folder or hub name "
        "its test split; without it two built-in examples",
    )
    output: str | None = flag(None, "jsonl file to write: the rows of --data_path, each with its scores")
    max_seq_len: Count = flag(512, "longest prompt + answer in tokens; longer answers are cut")
    batch_size: Count = flag(32, "texts per device that are scored together")
    dtype: Dtype = flag("auto", "number format; auto: bf16 where the GPU has it, else fp32")
    data_output_path: str | None = flag(None, "folder for cached data; without it the datasets library's own")
    local_rank: Rank = flag(-1, "set by the launcher")
    notices: list[str] = field(default_factory=list, init=False)  # one line for each retired flag that was given


@dataclass(kw_only=True)
class DecodingFlags(Flags, group="answers: greedy, sampled, and by beam search when --num_beams is above 1"):
    max_new_tokens: Count = flag(100, "longest answer in tokens")
    num_return_sequences: Count = flag(1, "sampled answers per prompt, and answers shown of a beam search")
    num_beams: Count = flag(1, "answers that a beam search follows; 1: no beam search")
    num_beam_groups: Count = flag(1, "above 1 is refused: diverse beam search has left transformers")
    penalty_alpha: NonNegative = flag(0.0, "above 0 is refused: contrastive search has left transformers")
    seed: CountOrZero = flag(2023, "seed of the sampled answers, the same for both models")


@dataclass(kw_only=True)
class PromptEvalArguments(SamplingFlags, DecodingFlags, ConfigFlag, group="models and prompts"):
    """All flags of prompt_eval.py."""

    model_name_or_path_finetune: str = flag(help="the model after training: folder or hub name")
    model_name_or_path_baseline: str | None = flag(
        None, "the model before training, asked in the same words; without it the other is asked alone"
    )
    language: Literal["English", "Chinese", "Japanese"] = flag("English", "language of the built-in prompts")
    prompts_file: str | None = flag(
        None, "own prompts instead: a text file, one question a line, put as training would put it"
    )
    data_path: str | None = flag(
        None, "own prompts instead: a file in any shape that training takes; of a folder or hub name its test split"
    )
    num_prompts: CountOrZero = flag(10, "prompts to take from --prompts_file or --data_path; 0: all")
    output: str | None = flag(None, "jsonl file to write: a row for each prompt with the answers")
    dtype: Dtype = flag("auto", "number format; auto: bf16 where the GPU has it, else fp32")
    batch_size: Count = flag(8, "prompts that are answered together")
    data_output_path: str | None = flag(None, "folder for cached data; without it the datasets library's own")


HEAT = Range("0 for greedy answers, or at least 1e-6", lambda x: x == 0 or 1e-6 <= x < math.inf)
Heat = Annotated[float, HEAT]


@dataclass(kw_only=True)
class AnswersArguments(ConfigFlag, group="model and questions"):
    """All flags of remax.answers."""

    model: str = flag(help="who answers: a folder (of PEFT, too) or hub name")
    benchmark: str = flag(
        help="alpaca_eval, mt_bench or arena_hard, or a file of own prompts (text: one a line; or any shape that "
        "training takes), answered in AlpacaEval's format"
    )
    questions: str | None = flag(
        None, "the benchmark's questions, the file that its project ships: alpaca_eval.json, question.jsonl"
    )
    output: str = flag(help="file to write; its name without the suffix is what the file calls the model")
    max_new_tokens: Count = flag(1024, "longest answer in tokens")
    temperature: Heat | None = flag(
        None, "of sampled answers; 0: greedy ones; without it greedy, and for mt_bench as it prescribes by category"
    )
    top_p: Fraction = flag(1.0, "sample from the most probable tokens with this total probability; 1: from all")
    seed: CountOrZero = flag(2023, "seed of the sampled answers")
    batch_size: Count = flag(8, "questions per device that are answered together")
    dtype: Dtype = flag("auto", "number format; auto: bf16 where the GPU has it, else fp32")
    data_output_path: str | None = flag(None, "folder for cached data; without it the datasets library's own")
    local_rank: Rank = flag(-1, "set by the launcher")


@dataclass(kw_only=True)
class WinrateArguments(ConfigFlag, group="answers and judge"):
    """All flags of remax.winrate."""

    answers: list[str] = flag(
        [],
        "files of answers in AlpacaEval's format, as remax.answers writes them (the words before the first flag): how "
        "often the first model wins over the second; of three or more, every pair, and ratings",
    )
    judge: str = flag(
        help="reward:MODEL, a reward model of step 2; lm:MODEL, a causal language model; or annotations:FILE, what "
        "alpaca_eval has written, with which files of answers are not needed"
    )
    lengths: bool = flag(False, "show how the rate depends on which answer is longer, and by how much")
    difficulty: str | None = flag(
        None,
        "AlpacaEval's df_gamed.csv, for its own length-controlled rate; for its prompts, baseline and judge alone. "
        "Without it lengths and a constant explain the verdicts (its variant `minimal`)",
    )
    output: str | None = flag(None, "json file to write: the verdicts, as annotations of alpaca_eval")
    json: bool = flag(False, "print the figures as JSON")
    max_seq_len: Count | None = flag(None, "longest text that the judge reads; default: its positions, at most 4096")
    batch_size: Count = flag(16, "texts per device that are judged together")
    dtype: Dtype = flag("auto", "number format; auto: bf16 where the GPU has it, else fp32")
    local_rank: Rank = flag(-1, "set by the launcher")


@dataclass(kw_only=True)
class ChatArguments(ConfigFlag, group="models"):
    """All flags of remax.chat."""

    model: str = flag(help="who answers: a folder (of PEFT, too) or hub name")
    against: str | None = flag(None, "a second model, asked the same and shown beside it")
    reward: str | None = flag(None, "a reward model for /score")
    system: str | None = flag(None, "a system message before the dialogue")
    max_new_tokens: Count = flag(512, "longest answer in tokens")
    temperature: Heat = flag(1.0, "of the answers; 0: greedy ones")
    top_p: Fraction = flag(1.0, "sample from the most probable tokens with this total probability; 1: from all")
    seed: CountOrZero = flag(2023, "seed of the answers")
    dtype: Dtype = flag("auto", "number format; auto: bf16 where the GPU has it, else fp32")


JUDGES = ("reward", "lm", "annotations")


@dataclass(kw_only=True)
class DoctorArguments(SamplingFlags, RewardSourceFlags, ConfigFlag, group="models, data and generation, as in step 3"):
    """All flags of the doctor."""

    actor_model_name_or_path: str = flag(help="the model of step 1: folder or hub name")
    data_path: list[str] = flag([], "data whose held-out pairs the reward model ranks; without it that is skipped")
    data_output_path: str | None = flag(None, "folder for cached data; without it the datasets library's own")
    max_prompt_seq_len: Count = flag(256, "longest prompt in tokens")
    max_answer_seq_len: Count = flag(256, "longest answer in tokens")
    dtype: Dtype = flag("auto", "number format; auto: bf16 where the GPU has it, else fp32")
    attn_implementation: Attention | None = flag(None, "attention kernel; without it transformers chooses")
    batch_size: Count = flag(16, "pairs that are scored together")
    pairs: Count = flag(256, "held-out pairs to rank, at most")
    skip_reload: bool = flag(False, "do not write the actor to a temporary folder and read it again")
    json: bool = flag(False, "print the report as JSON")


def parse_reward_eval(argv: Sequence[str] | None = None) -> RewardEvalArguments:
    """The flags of rw_eval.py (default: of the command line), checked; UserError when something is wrong."""
    args = read_flags(RewardEvalArguments, argv, "Scores texts with a reward model", "python rw_eval.py [flags]")
    check_model("model_name_or_path", args.model_name_or_path)
    if args.output and not args.data_path:
        raise UserError("--output: is for the scores of --data_path; give that too")
    check_output(args)
    check_folder("data_output_path", args.data_output_path)
    args.dtype = resolve_dtype("dtype", args.dtype)
    return args


def parse_prompt_eval(argv: Sequence[str] | None = None) -> PromptEvalArguments:
    """The flags of prompt_eval.py, as `parse_reward_eval`."""
    description = "Answers of a model to prompts, or of two to the same prompts, before and after training"
    args = read_flags(PromptEvalArguments, argv, description, "python prompt_eval.py [flags]")
    moved = (
        "has left transformers: since version 5 it is code that `generate` fetches from the hub and runs; leave the "
        "flag out, and use --num_beams for a beam search or --temperature, --top_p and --top_k for sampled answers"
    )
    if args.num_beam_groups > 1:
        raise UserError(f"--num_beam_groups {args.num_beam_groups}: diverse beam search {moved}")
    if args.penalty_alpha > 0:
        raise UserError(f"--penalty_alpha {args.penalty_alpha}: contrastive search {moved}")
    for name in ("model_name_or_path_baseline", "model_name_or_path_finetune"):
        check_model(name, getattr(args, name))
    if args.prompts_file and args.data_path:
        raise UserError("--prompts_file with --data_path: give one of them")
    if args.prompts_file:
        read_prompts_file(args.prompts_file)
    check_output(args)
    check_folder("data_output_path", args.data_output_path)
    args.dtype = resolve_dtype("dtype", args.dtype)
    return args


def read_prompts_file(file: str) -> str:
    """The text of --prompts_file."""
    return read_text(file, "--prompts_file", "a text file with a question a line")


def parse_doctor(argv: Sequence[str] | None = None) -> DoctorArguments:
    """The flags of the doctor, as `parse_reward_eval`."""
    description = "Checks the models of step 3 before training"
    args = read_flags(DoctorArguments, argv, description, "python -m remax.doctor [flags]")
    check_model("actor_model_name_or_path", args.actor_model_name_or_path)
    check_reward(args)
    check_folder("data_output_path", args.data_output_path)
    with stdout_to_stderr(args.json):
        import_functions(args)
    args.dtype = resolve_dtype("dtype", args.dtype)
    return args


KNOWN_BENCHMARKS = {"alpaca_eval": ".json", "mt_bench": ".jsonl", "arena_hard": ".jsonl"}  # and the files' suffixes


def parse_answers(argv: Sequence[str] | None = None) -> AnswersArguments:
    """The flags of remax.answers, as `parse_reward_eval`."""
    description = "Answers of a model to a benchmark's questions, in the file that the benchmark's judge takes"
    args = read_flags(AnswersArguments, argv, description, "python -m remax.answers [flags]")
    check_model("model", args.model)
    known = args.benchmark in KNOWN_BENCHMARKS
    if known and not args.questions:
        raise UserError(
            f"--benchmark {args.benchmark}: give its questions, too, by --questions FILE; docs/evaluation.md says "
            "where each project keeps them"
        )
    if not known and args.questions:
        raise UserError(
            f"--benchmark {args.benchmark}: with --questions expected one of {', '.join(KNOWN_BENCHMARKS)}; own "
            "prompts are named by --benchmark alone"
        )
    if not known and not Path(args.benchmark).is_file():
        names = ", ".join(KNOWN_BENCHMARKS)
        raise UserError(f"--benchmark {args.benchmark}: no such file; expected one of {names}, or a file of prompts")
    suffix = KNOWN_BENCHMARKS.get(args.benchmark, ".json")
    if Path(args.output).suffix != suffix:
        raise UserError(f"--output {args.output}: expected a name that ends in {suffix}, by which its readers go")
    check_output(args)
    if Path(args.output).exists():
        raise UserError(f"--output {args.output}: is there already; remove it, or choose another name")
    check_folder("data_output_path", args.data_output_path)
    args.dtype = resolve_dtype("dtype", args.dtype)
    return args


def parse_winrate(argv: Sequence[str] | None = None) -> WinrateArguments:
    """The flags of remax.winrate, as `parse_reward_eval`; bare words at the start are --answers."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--answers")
    description = "How often one model's answers are preferred to another's, with intervals and controlled for length"
    args = read_flags(WinrateArguments, words, description, "python -m remax.winrate A.json B.json ... [flags]")
    kind, _, name = args.judge.partition(":")
    if kind not in JUDGES or not name:
        raise UserError(f"--judge {args.judge}: expected reward:MODEL, lm:MODEL or annotations:FILE")
    if kind != "annotations":
        check_model("judge", name)
        if len(args.answers) < 2:
            raise UserError(
                f"{len(args.answers)} files of answers are given; expected two or more, such as A.json B.json"
            )
    elif args.output:
        raise UserError("--output: is for the verdicts of a model; the annotations are a file already")
    if repeated := [file for i, file in enumerate(args.answers) if file in args.answers[:i]]:
        raise UserError(f"--answers {repeated[0]}: is given twice")
    for flag_name, file in [("answers", file) for file in args.answers] + [("difficulty", args.difficulty)]:
        if file is not None and not Path(file).is_file():
            raise UserError(f"--{flag_name} {file}: no such file (looked from {Path.cwd()})")
    check_output(args)
    args.dtype = resolve_dtype("dtype", args.dtype)
    return args


def parse_chat(argv: Sequence[str] | None = None) -> ChatArguments:
    """The flags of remax.chat, as `parse_reward_eval`."""
    args = read_flags(ChatArguments, argv, "A dialogue with a model, or with two", "python -m remax.chat [flags]")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("WORLD_SIZE is above 1: a dialogue takes one process; start it with python")
    for name in ("model", "against", "reward"):
        check_model(name, getattr(args, name))
    args.dtype = resolve_dtype("dtype", args.dtype)
    return args


def stdout_to_stderr(wanted: bool) -> redirect_stdout:
    """With --json, what reading data and functions prints goes to stderr: it is no JSON."""
    return redirect_stdout(sys.stderr if wanted else sys.stdout)


def check_output(args: RewardEvalArguments | PromptEvalArguments | AnswersArguments | WinrateArguments) -> None:
    """`--output` is a file that can be written, and none of those that are read."""
    if not args.output:
        return
    output = Path(args.output)
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; expected the name of a file")
    if output.exists() and not output.is_file():  # such as /dev/stdout, which the finished file would replace
        raise UserError(f"--output {output}: is no file; expected the name of one")
    for name in ("data_path", "prompts_file", "benchmark", "questions", "answers", "difficulty", "config"):
        value = getattr(args, name, None)
        which, files = ("a", value) if isinstance(value, list) else ("the", [value])
        if output.exists() and any(file and Path(file).exists() and output.samefile(file) for file in files):
            raise UserError(f"--output {output}: is {which} file of --{name}; choose another name")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: no such folder can be made ({error.strerror})") from error
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise UserError(f"--output {output}: may not be written; choose another place")
