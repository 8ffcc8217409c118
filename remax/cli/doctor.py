"""The flags of the doctor."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass

from remax.cli.flags import Count, CountOrZero, Dtype, Fraction, NonNegative, Positive, flag
from remax.cli.model_names import check_model
from remax.cli.parser import read_flags
from remax.cli.validate import check_reward, import_functions, resolve_dtype


@dataclass(kw_only=True)
class DoctorFlags:
    _argument_group_name = "models, data and generation, as in step 3"

    actor_model_name_or_path: str = flag(help="the model of step 1: folder or hub name")
    reward_model_name_or_path: list[str] = flag([], "reward models of step 2: folders or hub names; name:0.5 weighs")
    normalize_reward: bool = flag(False, "reward models: score minus its mean over its standard deviation")
    reward_fn: list[str] = flag([], "functions of prompts and answers: module:function or file.py:function")
    reward_fn_timeout: NonNegative = flag(60.0, "seconds that such a function may take; 0: no limit")
    data_path: list[str] = flag([], "data whose held-out pairs the reward model ranks; without it that is skipped")
    data_output_path: str | None = flag(None, "folder for cached data; without it the datasets library's own")
    max_prompt_seq_len: Count = flag(256, "longest prompt in tokens")
    max_answer_seq_len: Count = flag(256, "longest answer in tokens")
    temperature: Positive = flag(1.0, "of the sampled answers")
    top_p: Fraction = flag(1.0, "sample from the most probable tokens with this total probability; 1: from all")
    top_k: CountOrZero = flag(0, "sample from the k most probable tokens; 0: from all")
    dtype: Dtype = flag("auto", "number format; auto: bf16 where the GPU has it, else fp32")
    attn_implementation: str | None = flag(None, "attention kernel; without it transformers chooses")
    batch_size: Count = flag(16, "pairs that are scored together")
    pairs: Count = flag(256, "held-out pairs to rank, at most")
    skip_reload: bool = flag(False, "do not write the actor to a temporary folder and read it again")
    json: bool = flag(False, "print the report as JSON")


@dataclass(kw_only=True)
class DoctorArguments(DoctorFlags):
    """All flags of the doctor."""


def parse_doctor(argv: list[str] | None = None) -> DoctorArguments:
    args = read_flags(
        DoctorArguments, argv, "Checks the models of step 3 before training", "python -m remax.doctor [flags]"
    )
    check_model("actor_model_name_or_path", args.actor_model_name_or_path)
    check_reward(args)
    with aside(args):
        import_functions(args)
    args.dtype = resolve_dtype("dtype", args.dtype, None)
    return args


def aside(args: DoctorArguments) -> redirect_stdout:
    """With --json, what is printed inside goes to stderr: what reading the data and functions say is no JSON."""
    return redirect_stdout(sys.stderr if args.json else sys.stdout)
