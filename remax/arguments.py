"""Every flag of the three stages: one owner each, with its help, default and range in one place.

`parse_step1`, `parse_step2` and `parse_step3` return one flat, typed object whose attributes are named as the flags. By
then everything that can be known without loading a model has been checked, "auto" values and defaults that depend on
other flags are filled in, and retired flags have been noted; a bad flag is a UserError naming it. torch is imported
only after the other checks, so a refusal takes about a second.
"""

import argparse
import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from utils.data.names import exists, parse_name
from utils.run import UserError

if TYPE_CHECKING:
    from remax.algorithms import Algorithm

Scheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
ZeroStage = Literal[0, 1, 2, 3]
Penalty = Literal[
    "none",
    "one_step",
    "full_step",
    "full_kl_one_step",
    "full_kl_full_step",
    "kl_onestep",
    "kl",
    "full_kl_onestep",
    "full_kl",
]


@dataclass(frozen=True)
class Range:
    """What a number must fulfil; stands in the annotation, beside the type."""

    words: str
    holds: Callable[[float], bool]


Count = Annotated[int, Range("at least 1", lambda n: n >= 1)]
CountOrZero = Annotated[int, Range("0 or more", lambda n: n >= 0)]
Positive = Annotated[float, Range("above 0", lambda x: 0 < x < math.inf)]
NonNegative = Annotated[float, Range("0 or more", lambda x: 0 <= x < math.inf)]
Fraction = Annotated[float, Range("above 0 and at most 1", lambda x: 0 < x <= 1)]
BelowOne = Annotated[float, Range("at least 0 and below 1", lambda x: 0 <= x < 1)]


def flag(default: Any = dataclasses.MISSING, help: str = "") -> Any:
    """A dataclass field that becomes a command-line flag; without a default it is required."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


# ------------------------------------------------------------------------------------------------ flags of every stage


@dataclass(kw_only=True)
class DataFlags:
    _argument_group_name = "data"

    data_path: list[str] = flag(
        ["Dahoas/rm-static"],
        "hub names, folders or files (jsonl, json, csv, parquet, arrow; .gz), several allowed; "
        "name#configuration/split chooses, name:0.3 weighs",
    )
    prompt_column: str | None = flag(None, "the data's column of prompts, where it is not called `prompt`")
    chosen_column: str | None = flag(None, "the data's column of good answers, where it is not called `chosen`")
    rejected_column: str | None = flag(None, "the data's column of bad answers, where it is not called `rejected`")
    chat_template: str | None = flag(
        None,
        "Jinja template that writes lists of messages, a file or the text itself; without it the tokenizer's own, else "
        "Human/Assistant. Saved with the model",
    )
    overlong: Literal["cut", "drop"] | None = flag(
        None, "prompts longer than the limit: keep their end, or go; default: drop (steps 1, 2), cut (step 3)"
    )
    data_split: str = flag("2,4,4", "shares of the data for the three stages; no row serves two of them")
    data_seed: int = flag(1234, "seed of that split; the same in all stages, or they share rows")
    data_output_path: str | None = flag(None, "folder for cached data; without it the datasets library's own")
    preprocessing_num_workers: Count | None = flag(None, "processes for reading and tokenizing; without it one")


@dataclass(kw_only=True)
class RunFlags:
    _argument_group_name = "run"

    output_dir: str = flag("output", "folder for the models, metrics.jsonl and run.json")
    seed: int = flag(2023, "seed of everything but the data split; each rank adds its number")
    local_rank: int = flag(-1, "set by the launcher")
    num_train_epochs: Count = flag(1, "passes over the training data")
    max_steps: CountOrZero = flag(0, "stop after so many optimizer steps; 0: at the end of the epochs")
    logging_steps: Count = flag(10, "optimizer steps between console lines")
    eval_steps: CountOrZero = flag(0, "optimizer steps between evaluations; 0: once an epoch")
    max_eval_batches: CountOrZero = flag(0, "batches (per device) an evaluation reads; 0: all")
    per_device_eval_batch_size: Count = flag(16, "rows per device in evaluation")
    enable_tensorboard: bool = flag(False, "write TensorBoard events too")
    tensorboard_path: str | None = flag(None, "folder for them; without it <output_dir>/tensorboard")


@dataclass(kw_only=True)
class OptimizerFlags:
    _argument_group_name = "optimizer (AdamW)"

    lr_scheduler_type: Scheduler = flag("cosine", "course of the learning rate over the optimizer steps")
    adam_beta1: BelowOne = flag(0.9, "decay of the mean gradient")
    adam_beta2: BelowOne = flag(0.95, "decay of the mean squared gradient")
    gradient_clipping: NonNegative = flag(1.0, "largest norm of the whole gradient; 0: no limit")
    gradient_accumulation_steps: Count = flag(
        1, "steps 1, 2: micro-batches per optimizer step; step 3: multiplies --generation_batches"
    )


@dataclass(kw_only=True)
class MemoryFlags:
    _argument_group_name = "memory"

    offload: bool = flag(False, "optimizer states of every trained model in CPU memory (ZeRO 1-3)")
    offload_parameters: bool = flag(False, "parameters of the trained model in CPU memory too (ZeRO 3)")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = flag(
        None, "attention kernel; without it transformers chooses"
    )


@dataclass(kw_only=True)
class OnlyLora:
    only_optimize_lora: bool = flag(False, "train the LoRA adapters alone, nothing else")


# ------------------------------------------------------------------------------------------------------ steps 1 and 2


@dataclass(kw_only=True)
class SupervisedDataFlags(DataFlags):
    sft_only_data_path: list[str] = flag([], "more data, all of it for this stage")
    train_on: Literal["last", "all"] = flag("last", "dialogues of several turns: learn the last answer, or all of them")


@dataclass(kw_only=True)
class FinetuneFlags:
    _argument_group_name = "model and training"

    model_name_or_path: str = flag(help="the model to train: hub name or folder")
    dtype: Dtype = flag("auto", "number format; auto: bf16 where the GPU has it, else fp32")
    bf16: bool = flag(False, "the same as --dtype bf16")
    zero_stage: ZeroStage = flag(0, "what the ranks share out: nothing, optimizer states, + gradients, + parameters")
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, a third slower")
    disable_dropout: bool = flag(False, "no dropout in training")
    per_device_train_batch_size: Count = flag(16, "rows per device and micro-batch")
    max_seq_len: Count = flag(512, "longest prompt + answer in tokens")
    learning_rate: Positive = flag(1e-5, "peak learning rate")
    weight_decay: NonNegative = flag(0.0, "AdamW weight decay, not on biases and norms")
    num_warmup_steps: CountOrZero = flag(0, "optimizer steps until the learning rate is at its peak")
    print_loss: bool = flag(False, "a console line for every optimizer step, whatever --logging_steps")


@dataclass(kw_only=True)
class LoraFlags(OnlyLora):
    _argument_group_name = "LoRA"

    lora_dim: CountOrZero = flag(0, "rank of the adapters; 0: no LoRA")
    lora_module_name: str = flag("decoder.layers.", "part of the names of the modules that get adapters")
    lora_learning_rate: Positive = flag(5e-4, "peak learning rate of the adapters")


@dataclass(kw_only=True)
class PreferenceFlags:
    _argument_group_name = "loss"

    loss: Literal["ranking", "dpo", "r-dpo"] = flag(
        "ranking",
        "ranking: a reward model; dpo, r-dpo: no reward model but a policy straight from the pairs, against its start",
    )
    use_margin: bool = flag(False, "ranking: the data's column `margin` is how much more the chosen answer must score")
    label_smoothing: BelowOne = flag(0.0, "ranking: share of the preferences taken to be wrong")
    center_rewards_coefficient: NonNegative = flag(0.0, "ranking: weight of (chosen + rejected score)^2")
    dpo_beta: Positive = flag(0.1, "dpo, r-dpo: reward per nat of log-ratio (the paper compares with .05)")
    length_alpha: NonNegative = flag(0.01, "r-dpo: weight of the difference of lengths, per token")
    reference_zero_stage: ZeroStage = flag(0, "dpo, r-dpo: 3 shares the reference's parameters out")
    offload_reference_model: bool = flag(
        False, "dpo, r-dpo: the reference's parameters in CPU memory (makes its ZeRO stage 3)"
    )


# -------------------------------------------------------------------------------------------------------------- step 3


@dataclass(kw_only=True)
class ActorFlags:
    _argument_group_name = "actor (the trained policy) and reference (its frozen start)"

    actor_model_name_or_path: str = flag(help="the fine-tuned model of step 1: folder or hub name")
    actor_dtype: Dtype = flag("auto", "number format, the reference's too; auto: bf16 where the GPU has it, else fp32")
    actor_bf16: bool = flag(False, "the same as --actor_dtype bf16")
    actor_zero_stage: ZeroStage = flag(
        0, "what the ranks share out: nothing, optimizer states, + gradients, + parameters"
    )
    reference_zero_stage: ZeroStage = flag(0, "3: the reference's parameters are shared out")
    offload_reference_model: bool = flag(False, "reference's parameters in CPU memory (makes its ZeRO stage 3)")
    actor_gradient_checkpointing: bool = flag(False, "recompute activations: less memory, a third slower")
    disable_actor_dropout: bool = flag(False, "no dropout in training")
    actor_learning_rate: Positive = flag(9.65e-6, "peak learning rate")
    actor_weight_decay: NonNegative = flag(0.0, "AdamW weight decay, not on biases and norms")
    num_warmup_steps: CountOrZero = flag(100, "optimizer steps until the learning rate is at its peak")
    best_by: Literal["reward", "objective"] = flag(
        "reward",
        "keep the model with the highest evaluation reward, or with the highest reward - kl_ctl * KL, which a reward "
        "model that is easily fooled calls for",
    )
    save_at_final: bool = flag(False, "save the last model as well as the best one")
    enable_ema: bool = flag(False, "keep and save a moving average of the actor's weights")


@dataclass(kw_only=True)
class ActorLoraFlags(OnlyLora):
    _argument_group_name = "LoRA"

    actor_lora_dim: CountOrZero = flag(0, "rank of the adapters; 0: no LoRA")
    actor_lora_module_name: str = flag("decoder.layers.", "part of the names of the modules that get adapters")
    actor_lora_learning_rate: Positive = flag(5e-4, "peak learning rate of the adapters")


@dataclass(kw_only=True)
class RewardFlags:
    _argument_group_name = "reward model"

    reward_model_name_or_path: str = flag(help="the reward model of step 2: folder or hub name")
    reward_dtype: Dtype = flag("auto", "number format; auto: bf16 where the GPU has it, else fp32")
    reward_bf16: bool = flag(False, "the same as --reward_dtype bf16")
    reward_zero_stage: ZeroStage = flag(0, "3: the reward model's parameters are shared out")
    offload_reward_model: bool = flag(False, "its parameters in CPU memory (makes its ZeRO stage 3)")
    disable_reward_dropout: bool = flag(
        False, "no dropout in a critic made from it; the reward model itself never has any"
    )


@dataclass(kw_only=True)
class RolloutFlags:
    _argument_group_name = "rollout"

    per_device_generation_batch_size: Count = flag(16, "prompts per device that are answered together")
    generation_batches: Count = flag(1, "such batches before the one optimizer step")
    per_device_training_batch_size: Count = flag(16, "answers per device and micro-batch of the update")
    max_prompt_seq_len: Count = flag(256, "longest prompt in tokens")
    max_answer_seq_len: Count = flag(256, "longest answer in tokens")
    max_greedy_seq_len: CountOrZero = flag(0, "longest greedy answer (ReMax-fast: 128); 0: as --max_answer_seq_len")
    temperature: Positive = flag(1.0, "of the sampled answers")
    top_p: Fraction = flag(1.0, "sample from the most probable tokens with this total probability; 1: from all")
    top_k: CountOrZero = flag(0, "sample from the k most probable tokens; 0: from all")
    logprobs_of: Literal["sampling", "model"] = flag(
        "sampling",
        "what the update differentiates when temperature, top_p or top_k are set: what is drawn from (exact) "
        "or the model's own (as published; biased)",
    )
    two_pass_rollout: bool = flag(False, "decode sampled and greedy answers one after the other instead of together")
    zero3_generation: Literal["gather", "synced"] = flag(
        "gather",
        "actor at ZeRO 3: collect its parameters once per rollout (must fit on each device), or layer by layer at "
        "every token",
    )


@dataclass(kw_only=True)
class AlgorithmFlags:
    _argument_group_name = "algorithm"

    algo: Literal["remax", "reinforce", "rloo", "grpo", "ppo"] = flag("remax", "how an answer's advantage is estimated")
    samples_per_prompt: Count | None = flag(None, "answers per prompt; default 4 (rloo, grpo: at least 2), 1 (others)")
    baseline_decay: BelowOne = flag(0.0, "reinforce: decay of a moving-average baseline; 0: no baseline")
    gamma: Fraction | None = flag(
        None,
        "discount per token to the answer's end; default 0.95 (remax, reinforce), 1 (others); 1 is Algorithm 1",
    )
    clip_reward_value: NonNegative = flag(5.0, "largest size of what --clip_on names; 0: no limit")
    clip_on: Literal["difference", "reward"] | None = flag(
        None,
        "clip the reward minus its baseline, or the reward; default: difference (remax, reinforce), reward (others)",
    )
    loss_aggregation: Literal["sequence", "token", "sequence_mean"] | None = flag(
        None,
        "sequence: sum over an answer's tokens, mean over answers (Algorithm 1); token: mean over all tokens; "
        "sequence_mean: mean over an answer's tokens, then over answers; default: token (ppo), sequence_mean (grpo), "
        "sequence (others)",
    )
    entropy_coef: NonNegative = flag(0.0, "weight of an entropy bonus in the loss")
    unsupervised_dataset_name: str | None = flag(None, "plain text mixed into the loss: hub name, folder or file")
    unsupervised_dataset_config_name: str | None = flag(None, "its configuration on the hub")
    unsup_coef: NonNegative = flag(27.8, "weight of that text's loss")


@dataclass(kw_only=True)
class KlFlags:
    _argument_group_name = "KL to the reference"

    penalty: Penalty | None = flag(
        None,
        "one_step: a token pays its own KL; full_step: and that of the tokens after it (with k1 the exact gradient); "
        "full_kl_...: the same with the KL over the vocabulary; the last four are older names, kl and full_kl of "
        "the full step. Default: full_step (rloo, ppo), one_step (others)",
    )
    kl_ctl: NonNegative | None = flag(
        None, "weight of the KL, reward per nat; full_step needs about a tenth of one_step's; default 0.1 (grpo 0.04)"
    )
    kl_in: Literal["reward", "loss"] | None = flag(None, "where the KL enters; default: reward for k1, loss for others")
    kl_estimator: Literal["k1", "k2", "k3", "full"] | None = flag(
        None,
        "k1: -log r, k2: (log r)^2/2, k3: r - 1 - log r, with r = reference/policy of the drawn token; full: over the "
        "vocabulary; default: k3 (grpo), k1 (others)",
    )
    normalize_kl: bool = flag(False, "charge the mean of an answer's KL over its tokens instead of the sum")
    target_kl: NonNegative = flag(1.0, "stop when the KL in evaluation, in nats per token, reaches this; 0: never")
    adaptive_kl: bool = flag(False, "adapt --kl_ctl so that the KL stays near --adaptive_kl_target")
    adaptive_kl_target: Positive = flag(6.0, "in nats per answer")
    adaptive_kl_horizon: Count = flag(10_000, "answers over which a KL 20 %% off its target moves the weight by 20 %%")


@dataclass(kw_only=True)
class PpoFlags:
    _argument_group_name = "ppo only"

    ppo_epochs: Count = flag(1, "passes over each rollout")
    ppo_mini_batches: Count = flag(1, "optimizer steps in one pass")
    cliprange: Positive = flag(0.2, "the policy's ratio counts within 1 +- this")
    cliprange_value: Positive = flag(0.2, "a value counts within this of the one at rollout time")
    lam: Annotated[float, Range("0 to 1", lambda x: 0 <= x <= 1)] = flag(0.95, "lambda of generalised advantages")
    critic_model_name_or_path: str | None = flag(None, "start of the critic; default: the reward model")
    critic_learning_rate: Positive = flag(5e-6, "peak learning rate")
    critic_weight_decay: NonNegative = flag(0.0, "AdamW weight decay, not on biases and norms")
    critic_zero_stage: ZeroStage | None = flag(None, "default: the actor's")
    critic_dtype: Dtype | None = flag(None, "default: the actor's")
    offload_critic: bool = flag(False, "the critic's optimizer states in CPU memory, also without --offload")
    critic_gradient_checkpointing: bool = flag(False, "recompute activations: less memory, a third slower")


@dataclass(kw_only=True)
class WatchFlags:
    _argument_group_name = "watching and checking"

    print_answers: bool = flag(False, "show a prompt with its answers at every console line")
    save_answers: bool = flag(False, "write the answers of every evaluation to <output_dir>")
    log_variance: bool = flag(False, "measure the advantages' variance under several baselines")
    log_variance_gradient_steps: CountOrZero = flag(
        0, "with --log_variance: optimizer steps between measurements of the gradient's variance; 0: never"
    )
    skip_doctor: bool = flag(False, "do not check models, tokenizer and generation before training")
    logprob_chunk_size: Count = flag(1024, "tokens whose logits are in memory at once")
    enable_test_mode: bool = flag(False, "stop after --test_stop_step optimizer steps (after one if that is 0)")
    test_stop_step: CountOrZero = flag(0, "with --enable_test_mode")


# ------------------------------------------------------------------------------------------------------- retired flags


@dataclass(kw_only=True)
class Retired:
    _argument_group_name = "retired (accepted, do nothing)"

    deepspeed: bool = flag(False, "DeepSpeed is always used")


@dataclass(kw_only=True)
class RetiredInStep2(Retired):
    num_padding_at_beginning: int | None = flag(None, "masks come from lengths")


@dataclass(kw_only=True)
class RetiredInStep3(RetiredInStep2):
    enable_hybrid_engine: bool = flag(False, "hybrid engine")
    unpin_actor_parameters: bool = flag(False, "hybrid engine")
    release_inference_cache: bool = flag(False, "hybrid engine")
    tp_gather_partition_size: int | None = flag(None, "hybrid engine")
    inference_tp_size: int | None = flag(None, "hybrid engine; above 1 is refused")
    memory_efficient_linear: bool = flag(False, "hybrid engine")
    enable_mixed_precision_lora: bool = flag(False, "quantised ZeRO++ weights")


HYBRID_ENGINE = (
    "answers are always generated by the model's own `generate`, because DeepSpeed's hybrid engine has returned "
    "gibberish, or nothing, on several model families"
)
WHY_RETIRED = {
    "deepspeed": "DeepSpeed is always used",
    "num_padding_at_beginning": "masks come from the lengths of prompt and answer, whatever the tokenizer pads with",
    "enable_hybrid_engine": HYBRID_ENGINE,
    "unpin_actor_parameters": HYBRID_ENGINE,
    "release_inference_cache": HYBRID_ENGINE,
    "tp_gather_partition_size": HYBRID_ENGINE,
    "inference_tp_size": HYBRID_ENGINE,
    "memory_efficient_linear": HYBRID_ENGINE,
    "enable_mixed_precision_lora": "ZeRO++ quantisation is left out; the base model keeps its number format under LoRA",
}


# -------------------------------------------------------------------------------------------------- what main.py sees


@dataclass(kw_only=True)
class Arguments:
    """What the three stages have in common.

    notices: one line for each retired flag that was given, and each flag that acts otherwise than it says. For rank 0
    to print.
    """

    notices: list[str] = dataclasses.field(default_factory=list, init=False)

    @property
    def columns(self) -> dict[str, str]:
        """{"prompt": its name in the data, ...}, as far as names were given."""
        names = {"prompt": self.prompt_column, "chosen": self.chosen_column, "rejected": self.rejected_column}
        return {ours: theirs for ours, theirs in names.items() if theirs is not None}

    @property
    def tensorboard_dir(self) -> str | None:
        """Folder for TensorBoard's files, None when it is off."""
        if not self.enable_tensorboard:
            return None
        return self.tensorboard_path or str(Path(self.output_dir) / "tensorboard")


@dataclass(kw_only=True)
class FinetuneArguments(Arguments):
    """Steps 1 and 2."""

    @property
    def console_every(self) -> int:
        """Optimizer steps between console lines."""
        return 1 if self.print_loss else self.logging_steps


@dataclass(kw_only=True)
class Step1Arguments(
    FinetuneArguments, Retired, MemoryFlags, LoraFlags, RunFlags, OptimizerFlags, SupervisedDataFlags, FinetuneFlags
):
    """All flags of supervised fine-tuning."""


@dataclass(kw_only=True)
class Step2Arguments(
    FinetuneArguments,
    RetiredInStep2,
    MemoryFlags,
    LoraFlags,
    RunFlags,
    OptimizerFlags,
    DataFlags,
    PreferenceFlags,
    FinetuneFlags,
):
    """All flags of learning from preferences."""


@dataclass(kw_only=True)
class Step3Arguments(
    Arguments,
    RetiredInStep3,
    MemoryFlags,
    ActorLoraFlags,
    WatchFlags,
    RunFlags,
    OptimizerFlags,
    PpoFlags,
    KlFlags,
    AlgorithmFlags,
    RolloutFlags,
    DataFlags,
    RewardFlags,
    ActorFlags,
):
    """All flags of reinforcement learning."""

    @property
    def rollout_batches(self) -> int:
        """Generation batches before an optimizer step."""
        return self.generation_batches * self.gradient_accumulation_steps

    @property
    def answers_per_rollout(self) -> int:
        """Sampled answers on one device before an optimizer step (ppo: before its inner epochs)."""
        return self.per_device_generation_batch_size * self.rollout_batches * self.samples_per_prompt

    @property
    def stop_step(self) -> int:
        """The optimizer step after which to stop early; 0: none."""
        stops = [self.max_steps, max(1, self.test_stop_step) if self.enable_test_mode else 0]
        return min((step for step in stops if step > 0), default=0)


AnyArguments = TypeVar("AnyArguments", bound=Arguments)


def parse_step1(argv: Sequence[str] | None = None) -> Step1Arguments:
    """The flags of step 1 (default: of the command line), checked and completed; UserError when something is wrong."""
    args = _parse(Step1Arguments, argv, "Step 1: supervised fine-tuning", stage=0)
    _check_finetune(args)
    return args


def parse_step2(argv: Sequence[str] | None = None) -> Step2Arguments:
    """The flags of step 2, as `parse_step1`."""
    args = _parse(Step2Arguments, argv, "Step 2: reward model", stage=1)
    _check_finetune(args)
    _check_preference_loss(args)
    return args


def parse_step3(argv: Sequence[str] | None = None) -> Step3Arguments:
    """The flags of step 3, as `parse_step1`."""
    args = _parse(Step3Arguments, argv, "Step 3: reinforcement learning from human feedback", stage=2)
    _check_step3(args)
    return args


# ------------------------------------------------------------------------------------------------------------- parsing

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


def build_parser(arguments: type[Arguments], description: str) -> _Parser:
    """The parser of one stage: a group of flags for each dataclass that `arguments` is made of."""
    # A dataclass keeps its fields last base first, so the groups are listed that way round too.
    groups = [base for base in reversed(arguments.__bases__) if hasattr(base, "_argument_group_name")]
    parser = _Parser(
        groups,
        description=description,
        usage="deepspeed main.py [flags]",
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


def _parse(arguments: type[AnyArguments], argv: Sequence[str] | None, description: str, stage: int) -> AnyArguments:
    """Reads the flags and checks each for itself."""
    parser = build_parser(arguments, description)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(unknown_flags(unknown, [f"--{name}" for name in vars(namespace)]))
    args = arguments(**vars(namespace))
    check_ranges(args)
    _check_data(args, stage)
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


def note_retired(args: Arguments) -> None:
    """One line for each reason, naming the retired flags that were given."""
    given: dict[str, list[str]] = {}
    for name, reason in WHY_RETIRED.items():
        value = getattr(args, name, None)
        if value is not None and value is not False:  # 0 was given too
            given.setdefault(reason, []).append(f"--{name}")
    for reason, names in given.items():
        args.notices.append(f"{', '.join(names)}: without effect; {reason}")


# -------------------------------------------------------------------------------------------------------------- checks


def check_ranges(args: Arguments) -> None:
    """Each number against the Range of its annotation (also inside `X | None`)."""
    for name, annotation in get_type_hints(type(args), include_extras=True).items():
        candidates = [annotation] if get_origin(annotation) is Annotated else get_args(annotation)
        for candidate in candidates:
            if get_origin(candidate) is not Annotated:
                continue
            allowed, value = candidate.__metadata__[0], getattr(args, name)
            if value is not None and not allowed.holds(value):
                raise UserError(f"--{name} {value}: must be {allowed.words}")


def _check_data(args: Any, stage: int) -> None:
    """The split, and the data files that are named as paths."""
    try:
        shares = [float(share) for share in args.data_split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= share < math.inf for share in shares):
        raise UserError(f"--data_split {args.data_split}: expected three numbers, 0 or more, such as 2,4,4")
    if shares[stage] == 0:
        raise UserError(
            f"--data_split {args.data_split}: leaves nothing for step {stage + 1}; its share must be above 0"
        )
    for name in ("data_path", "sft_only_data_path"):
        for path in getattr(args, name, []):
            source = parse_name(path, f"--{name}").name
            if _looks_local(source) and not exists(source):
                raise UserError(f"--{name} {path}: no such file or folder (looked from {Path.cwd()})")


def _looks_local(name: str) -> bool:
    """True for what can only be a path.

    A hub name is `name` or `owner/name`, without a leading dot or a data suffix; and `output/step1` is none where there
    is a folder `output`.
    """
    suffixes = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".gz", "/")
    path = Path(name)
    return (
        name.startswith(("/", ".", "~"))
        or name.endswith(suffixes)
        or name.count("/") > 1
        or path.exists()
        or ("/" in name and path.parent.is_dir())
    )


def check_model(flag_name: str, name: str | None) -> None:
    """A model that is named as a path must be a folder with a config.json."""
    if name is None:
        return
    path, looked = Path(name), f"(looked from {Path.cwd()})"
    if name == "":
        raise UserError(f"--{flag_name}: is empty; expected a folder or a hub name")
    if path.is_dir():
        if not (path / "config.json").is_file():
            inside = ", ".join(sorted(p.parent.name for p in path.glob("*/config.json"))[:3])
            raise UserError(
                f"--{flag_name} {name}: the folder has no config.json, so it holds no Hugging Face model"
                + (f"; its subfolder has one: {inside}" if inside else "")
            )
    elif path.exists():
        raise UserError(f"--{flag_name} {name}: is a file; expected the folder of a Hugging Face model, or a hub name")
    elif _looks_local(name):
        raise UserError(f"--{flag_name} {name}: no such folder {looked}; train or download the model first")


def _check_finetune(args: Any) -> None:
    check_model("model_name_or_path", args.model_name_or_path)
    _check_lora(args.lora_dim, args.only_optimize_lora, "lora_dim")
    _check_offload(args, "zero_stage", "offload", "offload_parameters")
    args.dtype = resolve_dtype("dtype", args.dtype, "bf16" if args.bf16 else None)
    _no_bf16_without_zero(args, "dtype", "zero_stage")


def _check_preference_loss(args: Step2Arguments) -> None:
    """Flags that --loss does not read must be at their defaults."""
    direct = ("dpo", "r-dpo")
    readers = dict.fromkeys(("use_margin", "label_smoothing", "center_rewards_coefficient"), ("ranking",))
    readers |= dict.fromkeys(("dpo_beta", "reference_zero_stage", "offload_reference_model"), direct)
    readers["length_alpha"] = ("r-dpo",)
    defaults = {f.name: f.default for f in dataclasses.fields(PreferenceFlags)}
    for name, losses in readers.items():
        if getattr(args, name) != defaults[name] and args.loss not in losses:
            raise UserError(f"--{name} with --loss {args.loss}: only --loss {' and '.join(losses)} read it")
    _resolve_frozen(args, "reference_zero_stage", "offload_reference_model")


def _check_lora(dim: int, only: bool, dim_flag: str) -> None:
    if only and dim == 0:
        raise UserError(
            f"--only_optimize_lora: there is nothing to train without LoRA; set --{dim_flag}, for example 128"
        )


def _check_offload(args: Any, stage_flag: str, offload_flag: str, parameters_flag: str | None = None) -> None:
    stage = getattr(args, stage_flag)
    if getattr(args, offload_flag) and stage == 0:
        raise UserError(
            f"--{offload_flag} with --{stage_flag} 0: offloading is a part of ZeRO; set --{stage_flag} 1, 2 or 3"
        )
    if parameters_flag and getattr(args, parameters_flag) and stage != 3:
        raise UserError(f"--{parameters_flag} with --{stage_flag} {stage}: needs --{stage_flag} 3")


def resolve_dtype(flag_name: str, dtype: str, alias: str | None) -> str:
    """fp32, bf16 or fp16 from the flag, its older alias and the device."""
    if alias is not None and dtype not in ("auto", alias):
        raise UserError(
            f"--{flag_name} {dtype} with --{flag_name.replace('dtype', alias)}: contradict one another; give one"
        )
    dtype = alias or dtype
    if dtype in ("fp32", "bf16"):
        return dtype
    import torch  # two seconds: after the checks that need no device

    on_gpu = torch.cuda.is_available()
    if dtype == "fp16" and not on_gpu:
        raise UserError(f"--{flag_name} fp16: DeepSpeed has no fp16 on a CPU; use fp32 or bf16")
    if dtype == "auto":
        dtype = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return dtype


def _no_bf16_without_zero(args: Any, dtype_flag: str, stage_flag: str) -> None:
    """Raises stage 0 to 1 for a bf16 model that is trained: at stage 0 DeepSpeed keeps no fp32 master weights."""
    if getattr(args, dtype_flag) == "bf16" and getattr(args, stage_flag) == 0:
        setattr(args, stage_flag, 1)
        args.notices.append(f"--{stage_flag} 0: ZeRO 1 is used, since bf16 training without fp32 master weights drifts")


# ------------------------------------------------------------------------------------------------------ checks, step 3

SEVERAL_ANSWERS = ("rloo", "grpo")


def _check_step3(args: Step3Arguments) -> None:
    for name in ("actor_model_name_or_path", "reward_model_name_or_path", "critic_model_name_or_path"):
        check_model(name, getattr(args, name))
    _check_lora(args.actor_lora_dim, args.only_optimize_lora, "actor_lora_dim")
    if args.inference_tp_size is not None and args.inference_tp_size != 1:
        raise UserError(
            f"--inference_tp_size {args.inference_tp_size}: generation is not split over devices; leave it out, and "
            "use --actor_zero_stage 3 for a model that is too large for one"
        )
    if args.unsupervised_dataset_config_name and not args.unsupervised_dataset_name:
        raise UserError("--unsupervised_dataset_config_name: has no effect without --unsupervised_dataset_name")
    if args.test_stop_step and not args.enable_test_mode:
        args.notices.append("--test_stop_step: without effect, as --enable_test_mode is not set")
    if args.log_variance_gradient_steps and not args.log_variance:
        raise UserError("--log_variance_gradient_steps: has no effect without --log_variance")
    if args.max_greedy_seq_len > args.max_answer_seq_len:
        raise UserError(
            f"--max_greedy_seq_len {args.max_greedy_seq_len}: must not exceed --max_answer_seq_len "
            f"({args.max_answer_seq_len})"
        )
    _check_other_algorithms(args)
    _check_frozen_and_offload(args)
    _resolve_algorithm(args)
    _check_batches(args)
    _resolve_dtypes(args)


def _check_other_algorithms(args: Step3Arguments) -> None:
    """Flags that --algo does not read must be at their defaults."""
    readers = {f.name: ("ppo",) for f in dataclasses.fields(PpoFlags)} | {
        "max_greedy_seq_len": ("remax",),
        "two_pass_rollout": ("remax",),
        "baseline_decay": ("reinforce",),
    }
    defaults = {f.name: f.default for f in dataclasses.fields(Step3Arguments)}
    for name, algorithms in readers.items():
        if getattr(args, name) != defaults[name] and args.algo not in algorithms:
            reason = f"only --algo {', '.join(algorithms)} reads it"
            if name in ("ppo_epochs", "ppo_mini_batches"):
                reason = (
                    "a rollout gets one step, since the estimate holds for the policy that wrote it; only ppo has more"
                )
            raise UserError(f"--{name} {getattr(args, name)} with --algo {args.algo}: {reason}")


def _resolve_algorithm(args: Step3Arguments) -> None:
    """Refuses what the algorithm cannot do and fills in the flags whose default is the algorithm's."""
    if args.gamma is None:
        args.gamma = 0.95 if args.algo in ("remax", "reinforce") else 1.0
    samples = args.samples_per_prompt
    if samples == 1 and args.algo in SEVERAL_ANSWERS:
        raise UserError(
            f"--samples_per_prompt 1 with --algo {args.algo}: it compares the answers to a prompt; 2 or more"
        )
    if samples is not None and samples > 1 and args.algo not in SEVERAL_ANSWERS:
        raise UserError(
            f"--samples_per_prompt {samples} with --algo {args.algo}: it takes one answer per prompt; use "
            f"--algo {' or '.join(SEVERAL_ANSWERS)}"
        )
    if args.penalty == "none":
        for name in ("kl_in", "kl_estimator", "adaptive_kl", "normalize_kl"):
            if getattr(args, name):
                raise UserError(f"--{name} with --penalty none: there is no KL penalty; leave one of them out")
    algorithm = make_algorithm(args)
    args.samples_per_prompt = algorithm.samples_per_prompt
    args.clip_on = algorithm.clip_on
    args.loss_aggregation = algorithm.loss_aggregation
    args.kl_ctl = algorithm.kl.coefficient
    if args.penalty != "none":
        args.penalty = ("full_kl_" if algorithm.kl.estimator == "full" else "") + algorithm.kl.reach
        args.kl_in, args.kl_estimator = algorithm.kl.where, algorithm.kl.estimator


def make_algorithm(args: Step3Arguments, **more: Any) -> "Algorithm":
    """The algorithm that the flags describe.

    Args:
        more: settings that are no flags, such as `sum_across_ranks`.

    Raises:
        UserError: flags that contradict one another, or that this algorithm cannot follow.
    """
    from remax.algorithms import ALGORITHMS, build_algorithm, build_penalty  # imports torch: after the cheaper checks

    settings: dict[str, Any] = {
        "gamma": args.gamma,
        "clip_reward_value": args.clip_reward_value,
        "clip_on": args.clip_on,
        "loss_aggregation": args.loss_aggregation,
        "entropy_coef": args.entropy_coef,
        "samples_per_prompt": args.samples_per_prompt,
    }
    if args.algo == "reinforce":
        settings["baseline_decay"] = args.baseline_decay
    if args.algo == "ppo":
        settings["epochs"] = args.ppo_epochs
        settings |= {name: getattr(args, name) for name in ("lam", "cliprange", "cliprange_value")}
    kl_flags = ("penalty", "kl_ctl", "kl_in", "kl_estimator", "normalize_kl", "adaptive_kl")
    try:
        penalty = build_penalty(
            ALGORITHMS[args.algo]().kl,
            penalty=args.penalty,
            kl_ctl=args.kl_ctl,
            kl_estimator=args.kl_estimator,
            kl_in=args.kl_in,
            normalize_kl=args.normalize_kl,
            kl_target=args.adaptive_kl_target if args.adaptive_kl else None,
            kl_horizon=args.adaptive_kl_horizon,
        )
        return build_algorithm(args.algo, kl=penalty, **settings, **more)
    except ValueError as error:
        values = {name: getattr(args, name) for name in ("algo", *kl_flags, "clip_on", "loss_aggregation")}
        values = {name: value for name, value in values.items() if value is not None and value is not False}
        given = " ".join(f"--{name} {value}".removesuffix(" True") for name, value in values.items())
        raise UserError(f"{given}: {error}") from error


def _check_batches(args: Step3Arguments) -> None:
    """Micro-batches, and ppo's mini-batches, must cut the rollout evenly."""
    answers, micro = args.answers_per_rollout, args.per_device_training_batch_size
    terms = "--per_device_generation_batch_size x --generation_batches x --gradient_accumulation_steps"
    terms += " x --samples_per_prompt" if args.samples_per_prompt > 1 else ""
    if answers % args.ppo_mini_batches:
        raise UserError(
            f"--ppo_mini_batches {args.ppo_mini_batches}: must divide the {answers} answers of a rollout ({terms})"
        )
    mini = answers // args.ppo_mini_batches
    if mini % micro:
        what = (
            f"the {answers} answers of a rollout ({terms})"
            if mini == answers
            else f"the {mini} answers of a mini-batch"
        )
        fitting = max(n for n in range(1, min(micro, mini) + 1) if mini % n == 0)
        raise UserError(f"--per_device_training_batch_size {micro}: must divide {what}; for example {fitting}")


def _check_frozen_and_offload(args: Step3Arguments) -> None:
    """ZeRO stages and offloading, model by model."""
    _check_offload(args, "actor_zero_stage", "offload", "offload_parameters")
    if args.zero3_generation == "synced" and args.actor_zero_stage != 3:
        raise UserError(
            f"--zero3_generation synced with --actor_zero_stage {args.actor_zero_stage}: is for ZeRO 3 only"
        )
    if args.critic_zero_stage is None:
        args.critic_zero_stage = args.actor_zero_stage
    if args.algo == "ppo":
        _check_offload(args, "critic_zero_stage", "offload_critic")
        _check_offload(args, "critic_zero_stage", "offload")
        args.offload_critic = args.offload_critic or args.offload
    for model in ("reference", "reward"):
        _resolve_frozen(args, f"{model}_zero_stage", f"offload_{model}_model")


def _resolve_dtypes(args: Step3Arguments) -> None:
    """Number formats of the models."""
    args.actor_dtype = resolve_dtype("actor_dtype", args.actor_dtype, "bf16" if args.actor_bf16 else None)
    args.reward_dtype = resolve_dtype("reward_dtype", args.reward_dtype, "bf16" if args.reward_bf16 else None)
    args.critic_dtype = resolve_dtype("critic_dtype", args.critic_dtype or args.actor_dtype, None)
    _no_bf16_without_zero(args, "actor_dtype", "actor_zero_stage")
    if args.algo == "ppo":
        _no_bf16_without_zero(args, "critic_dtype", "critic_zero_stage")


def _resolve_frozen(args: Step2Arguments | Step3Arguments, stage_flag: str, offload_flag: str) -> None:
    """A frozen model has only parameters to share out: ZeRO 3, or 0."""
    stage = getattr(args, stage_flag)
    if getattr(args, offload_flag):
        if stage != 3:
            args.notices.append(
                f"--{offload_flag} with --{stage_flag} {stage}: ZeRO 3 is used, which can offload parameters"
            )
        setattr(args, stage_flag, 3)
    elif stage in (1, 2):
        args.notices.append(f"--{stage_flag} {stage}: acts as 0, since this model is not trained")
        setattr(args, stage_flag, 0)
