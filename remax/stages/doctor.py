"""The doctor from its flags to its report."""

from __future__ import annotations

import sys

from remax.checks.examination import PROBE_TEXTS, built_in_prompts, examine
from remax.checks.findings import Report
from remax.checks.rewards import held_out_pairs
from remax.cli.evaluation import DoctorArguments, stdout_to_stderr
from remax.engines.base import FrozenEngine
from remax.engines.deepspeed_config import EngineConfig
from remax.engines.policy import Actor
from remax.generation.decoder import GenerationSettings
from remax.models.loading import load_config, quiet_libraries
from remax.models.policy import check_policy_config, load_policy
from remax.rewards.composite import try_functions
from remax.rewards.sources import reward_sources
from remax.stages.models import build_reward, reward_functions
from remax.stages.settings import sampling
from utils.data.config import DataConfig
from utils.distributed import print0
from utils.tokenizer import load_tokenizer


def examine_folders(args: DoctorArguments) -> Report:
    """Loads the models into this process, without DeepSpeed, and examines them."""
    config, name, flag = EngineConfig(dtype=args.dtype), args.actor_model_name_or_path, "--actor_model_name_or_path"
    check_policy_config(load_config(name, flag), name, flag)
    tokenizer = load_tokenizer(name, flag)
    models, _ = reward_sources(args.reward_model_name_or_path, args.reward_fn)
    own = [load_tokenizer(model.name, "--reward_model_name_or_path") for model in models]
    there = "the doctor's own prompts have no columns; step 3 examines models with those of its data before it trains"
    try_functions(reward_functions(args, tokenizer), PROBE_TEXTS[:2], there=lambda: there)
    generation = GenerationSettings(args.max_answer_seq_len, tokenizer.pad_token_id, sampling(args))
    policy = load_policy(
        name, flag, dtype=config.torch_dtype, tokenizer=tokenizer, attn_implementation=args.attn_implementation
    )
    reward = build_reward(args, config, tokenizer, own, policy.hf.generation_config.eos_token_id)
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
        Actor(FrozenEngine(policy, config), generation=generation),
        reward,
        tokenizer,
        built_in_prompts(tokenizer, args.max_prompt_seq_len),
        pairs=pairs,
        max_prompt_tokens=args.max_prompt_seq_len,
        reload_limit=0 if args.skip_reload else sys.maxsize,
    )


def run_doctor(args: DoctorArguments) -> None:
    """Prints the report; exit status 1 where something failed."""
    quiet_libraries()
    with stdout_to_stderr(args.json):
        report = examine_folders(args)
    print0(report.json() if args.json else report.table())
    if report.failures:
        sys.exit(1)
