"""Is the pipeline sound before it trains? A few seconds of checks on the live models, each with its figure and remedy.

    python -m remax.doctor --actor_model_name_or_path A --reward_model_name_or_path R [--data_path D] [--json]

The checks are in `examination`, which step 3 calls with its own engines before the first step.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass

from remax.arguments import check_reward, import_functions, resolve_dtype
from remax.assembly import build_reward, reward_functions
from remax.command_line import read_flags
from remax.deepspeed_config import EngineConfig
from remax.examination import PROBE_TEXTS, built_in_prompts, examine
from remax.findings import Report
from remax.flags import Count, CountOrZero, Dtype, Fraction, NonNegative, Positive, flag
from remax.inference import FrozenActor
from remax.logprobs import Sampling
from remax.model_names import check_model
from remax.modeling import load_policy, quiet_libraries
from remax.reward_checks import held_out_pairs
from remax.reward_sources import reward_sources
from remax.rewards import try_functions
from remax.rollout import GenerationSettings
from utils.data.config import DataConfig
from utils.distributed import print0
from utils.run import run_main
from utils.tokenizer import load_tokenizer


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


def examine_folders(args: DoctorArguments) -> Report:
    """Loads the models into this process, without DeepSpeed, and examines them."""
    config, name, flag = EngineConfig(dtype=args.dtype), args.actor_model_name_or_path, "--actor_model_name_or_path"
    tokenizer = load_tokenizer(name, flag)
    models, _ = reward_sources(args.reward_model_name_or_path, args.reward_fn)
    own = [load_tokenizer(model.name, "--reward_model_name_or_path") for model in models]
    try_functions([part.scorer for part in reward_functions(args, tokenizer)], PROBE_TEXTS[:2])
    generation = GenerationSettings(
        args.max_answer_seq_len, tokenizer.pad_token_id, Sampling(args.temperature, args.top_p, args.top_k)
    )
    policy = load_policy(
        name, flag, dtype=config.torch_dtype, tokenizer=tokenizer, attn_implementation=args.attn_implementation
    )
    reward = build_reward(args, config, tokenizer, own)
    pairs = None
    if args.data_path and reward.models:
        pairs = held_out_pairs(
            DataConfig(data_path=args.data_path, cache_dir=args.data_output_path),
            tokenizer,
            max_len=args.max_prompt_seq_len + args.max_answer_seq_len,
            limit=args.pairs,
            batch_size=args.batch_size,
        )
    return examine(
        FrozenActor(policy, config, generation),
        reward,
        tokenizer,
        built_in_prompts(tokenizer, args.max_prompt_seq_len),
        pairs=pairs,
        max_prompt_tokens=args.max_prompt_seq_len,
        reload_limit=0 if args.skip_reload else sys.maxsize,
    )


def aside(args: DoctorArguments) -> redirect_stdout:
    """With --json, what is printed inside goes to stderr: what reading the data and functions say is no JSON."""
    return redirect_stdout(sys.stderr if args.json else sys.stdout)


def main() -> None:
    args = parse_doctor()
    quiet_libraries()
    with aside(args):
        report = examine_folders(args)
    print0(report.json() if args.json else report.table())
    if report.failures:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
