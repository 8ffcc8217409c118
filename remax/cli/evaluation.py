"""The flags of the two evaluation programs, prompt_eval.py of step 1 and rw_eval.py of step 2."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from remax.cli.flags import Count, CountOrZero, Dtype, Fraction, NonNegative, Positive, flag
from remax.cli.model_names import check_model
from remax.cli.parser import read_flags
from remax.cli.validate import resolve_dtype
from utils.run import UserError


@dataclass(kw_only=True)
class RewardEvalFlags:
    _argument_group_name = "model and data"

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
    local_rank: int = flag(-1, "set by the launcher")


@dataclass(kw_only=True)
class RetiredInRewardEval:
    _argument_group_name = "retired (accepted, do nothing)"

    num_padding_at_beginning: int | None = flag(None, "masks come from lengths")


@dataclass(kw_only=True)
class RewardEvalArguments(RetiredInRewardEval, RewardEvalFlags):
    """All flags of rw_eval.py.   notices: one line for each retired flag that was given."""

    notices: list[str] = field(default_factory=list, init=False)


@dataclass(kw_only=True)
class AskFlags:
    _argument_group_name = "models and prompts"

    model_name_or_path_baseline: str = flag(help="the model before training: folder or hub name")
    model_name_or_path_finetune: str = flag(help="the model after training: folder or hub name")
    language: Literal["English", "Chinese", "Japanese"] = flag("English", "language of the built-in prompts")
    prompts_file: str | None = flag(None, "own prompts instead: a text file, one question a line")
    data_path: str | None = flag(
        None, "own prompts instead: a file in any shape that training takes; of a folder or hub name its test split"
    )
    num_prompts: CountOrZero = flag(10, "prompts to take from --prompts_file or --data_path; 0: all")
    output: str | None = flag(None, "jsonl file to write: a row for each prompt with the answers of both models")
    dtype: Dtype = flag("auto", "number format; auto: bf16 where the GPU has it, else fp32")
    batch_size: Count = flag(8, "prompts that are answered together")
    data_output_path: str | None = flag(None, "folder for cached data; without it the datasets library's own")


@dataclass(kw_only=True)
class DecodingFlags:
    _argument_group_name = "answers: greedy, sampled, and by beam search when --num_beams is above 1"

    max_new_tokens: Count = flag(100, "longest answer in tokens")
    num_return_sequences: Count = flag(1, "sampled answers per prompt, and answers shown of a beam search")
    temperature: Positive = flag(1.0, "of the sampled answers")
    top_p: Fraction = flag(1.0, "sample from the most probable tokens with this total probability; 1: from all")
    top_k: CountOrZero = flag(0, "sample from the k most probable tokens; 0: from all")
    num_beams: Count = flag(1, "answers that a beam search follows; 1: no beam search")
    num_beam_groups: Count = flag(1, "above 1 is refused: diverse beam search has left transformers")
    penalty_alpha: NonNegative = flag(0.0, "above 0 is refused: contrastive search has left transformers")
    seed: int = flag(2023, "seed of the sampled answers, the same for both models")


@dataclass(kw_only=True)
class PromptEvalArguments(DecodingFlags, AskFlags):
    """All flags of prompt_eval.py."""


def parse_reward_eval(argv: Sequence[str] | None = None) -> RewardEvalArguments:
    """The flags of rw_eval.py (default: of the command line), checked; UserError when something is wrong."""
    args = read_flags(RewardEvalArguments, argv, "Scores texts with a reward model", "python rw_eval.py [flags]")
    check_model("model_name_or_path", args.model_name_or_path)
    if args.output and not args.data_path:
        raise UserError("--output: is for the scores of --data_path; give that too")
    _check_output(args)
    args.dtype = resolve_dtype("dtype", args.dtype, None)
    return args


def parse_prompt_eval(argv: Sequence[str] | None = None) -> PromptEvalArguments:
    """The flags of prompt_eval.py, as `parse_reward_eval`."""
    description = "Answers of two models to the same prompts, before and after training"
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
    if args.prompts_file and not Path(args.prompts_file).is_file():
        raise UserError(f"--prompts_file {args.prompts_file}: no such file (looked from {Path.cwd()})")
    _check_output(args)
    args.dtype = resolve_dtype("dtype", args.dtype, None)
    return args


def _check_output(args: Any) -> None:
    """`--output` is a file that can be written, and not the one that is read."""
    if not args.output:
        return
    output = Path(args.output)
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; expected the name of a file")
    if args.data_path and output.exists() and Path(args.data_path).exists() and output.samefile(args.data_path):
        raise UserError(f"--output {output}: is the file of --data_path; choose another name")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: no such folder can be made ({error.strerror})") from error
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise UserError(f"--output {output}: may not be written; choose another place")
