"""The flags of the planner, `python -m remax.plan`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from remax.cli.flags import ConfigFlag, Count, CountOrZero, NonNegative, Positive, ZeroStage, flag
from remax.cli.parser import read_flags
from utils.run import UserError

GpuName = Literal["a100", "a100-40gb", "a800", "h100", "h200", "l40s", "rtx4090"]


@dataclass(kw_only=True)
class PlanArguments(ConfigFlag, group="models, machine and batch"):
    """All flags of the planner."""

    model: str = flag(
        help="the policy: a folder with a config.json, a name such as Llama-2-7b or Qwen2.5-1.5B, or a shape such as "
        "llama:2048,5632,22,32,4,32000 (hidden, feed-forward, layers, heads, key heads, vocabulary)"
    )
    reward_model: str | None = flag(None, "the reward model, and the start of PPO's critic; default: as --model")
    reward_fn: bool = flag(False, "the reward is a function: no reward model")
    gpus: Count = flag(8, "in all")
    gpu: GpuName = flag("a100", "its kind, for the time that a step takes")
    gpu_memory: Positive | None = flag(None, "of each GPU, in GiB; default: what GPUs of the kind have")
    algo: list[Literal["remax", "reinforce", "rloo", "grpo", "ppo", "raft", "superhf", "inpo"]] = flag(
        ["remax", "ppo"], "one or several"
    )
    samples_per_prompt: Count | None = flag(
        None, "answers per prompt; default 4 (rloo, grpo, raft), 8 (inpo), 16 (superhf), 1 (others)"
    )
    dtype: Literal["bf16", "fp16", "fp32"] = flag("bf16", "number format")
    zero: ZeroStage | None = flag(None, "stage of what is trained; default: what is best")
    offload: bool | None = flag(None, "its optimizer states in CPU memory; default: where nothing else fits")
    frozen_zero: Literal[0, 3] | None = flag(None, "stage of reference and reward model; default: what is best")
    offload_frozen: bool | None = flag(None, "their weights in CPU memory; default: where nothing else fits")
    gradient_checkpointing: bool | None = flag(None, "recompute activations; default: where nothing else fits")
    lora: CountOrZero = flag(0, "rank of adapters, which are then all that learns; 0: the whole model learns")
    share: Literal["none", "reference", "all"] = flag("none", "with --lora: as step 3's --share")
    prompt_len: Count = flag(256, "longest prompt in tokens")
    answer_len: Count = flag(256, "longest answer in tokens")
    batch: CountOrZero = flag(0, "prompts per GPU that are answered together; 0: as many as fit")
    micro_batch: CountOrZero = flag(8, "rows of a training forward; 0: all answers at once")
    eval_batch: CountOrZero = flag(16, "rows of an evaluation on each GPU; 0: none")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = flag(None, "attention kernel")
    prompts: CountOrZero = flag(0, "of the data set, for the hours that an epoch takes")
    seconds_per_step: NonNegative = flag(0.0, "of a step with the batch of the plan; default: the time model's")
    rates: str | None = flag(None, "instead: a run's folder, whose metrics.jsonl and run.json tell seconds per prompt")
    json: bool = flag(False, "print the plan as JSON")


def parse_plan(argv: Sequence[str] | None = None) -> PlanArguments:
    """The flags of the planner (default: of the command line), checked; UserError when something is wrong."""
    description = "What step 3 will hold in memory, the largest batch that fits, and the settings to take"
    args = read_flags(PlanArguments, argv, description, "python -m remax.plan [flags]")
    if not args.algo:
        raise UserError("--algo: is empty; expected one or several, such as remax ppo")
    if args.share != "none" and not args.lora:
        raise UserError(f"--share {args.share}: what models share must not learn; give --lora, the adapters' rank")
    if args.reward_fn and args.reward_model:
        raise UserError("--reward_fn with --reward_model: give one of them")
    if args.reward_fn and "ppo" in args.algo:
        raise UserError("--reward_fn with --algo ppo: the critic starts from a reward model; leave one of them out")
    if args.offload and args.zero == 0:
        raise UserError("--offload with --zero 0: offloading is a part of ZeRO; set --zero 1, 2 or 3")
    if args.zero == 0 and args.dtype != "fp32":
        raise UserError(f"--zero 0 with --dtype {args.dtype}: training in 16 bits needs --zero 1, 2 or 3")
    if args.offload_frozen and args.frozen_zero == 0:
        raise UserError("--offload_frozen with --frozen_zero 0: needs --frozen_zero 3")
    if args.seconds_per_step and args.rates:
        raise UserError("--seconds_per_step with --rates: give one of them")
    if (args.seconds_per_step or args.rates) and not args.prompts:
        raise UserError("--prompts: give the size of the data set, whose hours are asked for")
    if args.rates:
        for name in ("metrics.jsonl", "run.json"):
            if not (Path(args.rates) / name).is_file():
                raise UserError(f"--rates {args.rates}: has no {name}; expected the output folder of a run of step 3")
    return args
