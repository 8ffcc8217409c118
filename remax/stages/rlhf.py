"""What step 3 asks before it trains."""

from __future__ import annotations

from collections.abc import Iterable

from datasets import concatenate_datasets

from remax.checks.examination import examine
from remax.checks.findings import Report
from remax.checks.rewards import held_out_pairs
from remax.cli.flags import Step3Arguments
from remax.core.batches import Batch
from remax.core.sequences import Prompts
from remax.engines.policy import Actor, Reference
from remax.rewards.composite import CompositeReward, try_functions
from remax.stages.data import PromptData
from remax.stages.models import Tokenizer, reward_functions


def try_reward_functions(args: Step3Arguments, tokenizer: Tokenizer, held_out: Iterable[Batch]) -> None:
    """Asks the functions of --reward_fn about two held-out prompts, before any weights are read."""
    functions = [part.scorer for part in reward_functions(args, tokenizer)]
    if functions:
        try_functions(functions, next(iter(held_out))["prompt"][:2])


def examine_engines(
    args: Step3Arguments,
    actor: Actor,
    reward: CompositeReward,
    reference: Reference,
    tokenizer: Tokenizer,
    data: PromptData,
) -> Report:
    """The doctor's report on the models as they are about to be trained with."""
    prompts = next(iter(data.evaluation))
    pairs = None
    if reward.models:
        pairs = held_out_pairs(
            args.data_path,
            tokenizer,
            max_len=args.max_prompt_seq_len + args.max_answer_seq_len,
            cache_dir=args.data_output_path,
            columns=args.columns,
            announce=False,
            rows=concatenate_datasets([stream.held_out for stream in data.streams]) if data.streams else None,
        )
    return examine(
        actor,
        reward,
        tokenizer,
        Prompts(prompts["input_ids"], prompts["lengths"]),
        reference=reference,
        pairs=pairs,
        max_prompt_tokens=args.max_prompt_seq_len,
    )
