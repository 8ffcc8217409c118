"""Every flag of the three stages: one owner each, with its help, default and range in one place.

A flag is a field of a dataclass; `arguments` reads the command line into `Step1Arguments`, `Step2Arguments` and
`Step3Arguments`, checks it, and fills in what depends on other flags. A field exists only when code reads it. The base
class that declares a field names its group in the help.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

Scheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]
ZeroStage = Literal[0, 1, 2, 3]
DEFAULT_DATA = "Dahoas/rm-static"
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
# Divides logits, which are some hundreds, in float32.
Temperature = Annotated[float, Range("above 0, and at least 1e-6", lambda x: 1e-6 <= x < math.inf)]
Workers = Annotated[int, Range("at least 1, and at most 1024", lambda n: 1 <= n <= 1024)]
Rank = Annotated[int, Range("0 or more, or -1 for none", lambda n: n >= -1)]


def flag(default: Any = dataclasses.MISSING, help: str = "", *, basic: bool = False, only: str = "") -> Any:
    """Returns a dataclass field that becomes a command-line flag.

    Args:
        default: without one the flag is required.
        basic: whether most runs need it: `--help` shows it, while `--help all` shows every flag.
        only: who reads the flag, others refuse it: the names of losses (step 2), or what the algorithm must be or have
            (step 3): a class attribute such as `critic`, or a setting.
    """
    metadata = {"help": help, "basic": basic, "only": tuple(only.split())}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


usual = partial(flag, basic=True)
of_critic = partial(flag, only="critic")


class Flags:
    """Fields that are flags, with the title that they stand under in the help; subclasses add to the same group."""

    _group: ClassVar[str | None] = None

    def __init_subclass__(cls, group: str | None = None) -> None:
        cls._group = group or cls._group


@dataclass(kw_only=True)
class ConfigFlag(Flags):
    config: str | None = usual(
        None, "yaml or json file of flags, or a run's run.json to start it again; what the command line says goes first"
    )


@dataclass(kw_only=True)
class SamplingFlags(Flags, group="sampled answers"):
    temperature: Temperature = usual(1.0, "of the sampled answers")
    top_p: Fraction = usual(1.0, "sample from the most probable tokens with this total probability; 1: from all")
    top_k: CountOrZero = flag(0, "sample from the k most probable tokens; 0: from all")


@dataclass(kw_only=True)
class RewardSourceFlags(Flags, group="reward (models, functions, or both; at least one)"):
    reward_model_name_or_path: list[str] = usual([], "reward models of step 2: folders or hub names; name:0.5 weighs")
    normalize_reward: bool = flag(
        False, "reward models: score minus its mean over its standard deviation, as step 2 keeps them in config.json"
    )
    reward_fn: list[str] = usual(
        [],
        "functions of prompts and answers, and of the data's columns that they take: module:function or "
        "file.py:function; name:-0.1 weighs, here as a penalty",
    )
    reward_fn_timeout: NonNegative = flag(
        60.0, "seconds that such a function may take for a sample, or for its batch if it takes lists; 0: no limit"
    )

    @property
    def reward_models(self) -> list[str]:
        """The models that score, as --reward_model_name_or_path names them."""
        return self.reward_model_name_or_path


@dataclass(kw_only=True)
class DataFlags(Flags, group="data"):
    data_path: list[str] = usual(  # None until `validate.resolve_data`
        None,
        "hub names, folders or files (jsonl, json, csv, parquet, arrow; .gz), several allowed; "
        "name#configuration/split chooses, name:0.3 weighs (default: Dahoas/rm-static)",
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
    data_split: str = usual("2,4,4", "shares of the data for the three stages; no prompt serves two of them")
    data_seed: CountOrZero = flag(1234, "seed of that split; the same in all stages, or they share rows")
    streaming: bool = flag(
        False, "read the data as it comes, again in every epoch, without a copy on the disk; needs --max_steps"
    )
    shuffle_buffer: Count = flag(10_000, "--streaming: rows among which the next one is drawn")
    data_output_path: str | None = flag(None, "folder for cached data; without it the datasets library's own")
    preprocessing_num_workers: Workers | None = flag(None, "processes for reading and tokenizing; without it one")


@dataclass(kw_only=True)
class RunFlags(Flags, group="run"):
    output_dir: str = usual("output", "folder for the models, metrics.jsonl and run.json")
    overwrite_output_dir: bool = usual(False, "replace the run or model that --output_dir holds")
    resume: str = usual(
        "never",
        "auto: go on from the newest checkpoint in --output_dir, where there is one; a folder: from that "
        "checkpoint, or from the newest one of that run; never: start afresh",
    )
    max_hours: NonNegative = flag(
        0.0, "save and leave with status 75 so long after the start, for another start to go on; 0: no limit"
    )
    save_steps: CountOrZero = flag(0, "optimizer steps between checkpoints; 0: by --save_minutes alone")
    save_minutes: NonNegative = flag(30.0, "minutes between checkpoints; 0: by --save_steps alone")
    save_total_limit: CountOrZero = flag(1, "how many checkpoints are kept, the newest; 0: all")
    on_nan: Literal["stop", "rollback"] = flag(
        "stop", "where the loss is no number: stop, or go back to the last checkpoint, once, and leave that batch out"
    )
    seed: CountOrZero = usual(2023, "seed of everything but the data split; each rank adds its number")
    local_rank: Rank = flag(-1, "set by the launcher")
    num_train_epochs: Count | None = usual(
        None, "passes over the training data; default 1, or with --max_steps as many as it takes"
    )
    max_steps: CountOrZero = usual(
        0, "stop after so many optimizer steps; 0: at the end of the epochs; with both, what comes first"
    )
    logging_steps: Count = usual(10, "optimizer steps between console lines")
    eval_steps: CountOrZero = usual(0, "optimizer steps between evaluations; 0: once an epoch")
    max_eval_batches: CountOrZero | None = flag(
        None,
        "batches (per device) an evaluation reads; 0: all; default: all (steps 1, 2), 16 (step 3)",
    )
    per_device_eval_batch_size: Count = usual(16, "rows per device in evaluation")
    report_to: list[Literal["tensorboard", "wandb", "none"]] = usual(
        [],
        "where figures and sample answers go besides metrics.jsonl; several allowed. wandb (pip install wandb) reads "
        "WANDB_PROJECT, WANDB_NAME, WANDB_MODE",
    )
    enable_tensorboard: bool = flag(False, "the same as --report_to tensorboard")
    tensorboard_path: str | None = flag(None, "folder of TensorBoard events; without it <output_dir>/tensorboard")


@dataclass(kw_only=True)
class OptimizerFlags(Flags, group="optimizer (AdamW)"):
    lr_scheduler_type: Scheduler = usual("cosine", "course of the learning rate over the optimizer steps")
    adam_beta1: BelowOne = flag(0.9, "decay of the mean gradient")
    adam_beta2: BelowOne = flag(0.95, "decay of the mean squared gradient")
    gradient_clipping: NonNegative = flag(1.0, "largest norm of the whole gradient; 0: no limit")
    gradient_accumulation_steps: Count = usual(
        1, "steps 1, 2: micro-batches per optimizer step; step 3: multiplies --generation_batches"
    )


@dataclass(kw_only=True)
class MemoryFlags(Flags, group="memory"):
    offload: bool = usual(False, "optimizer states of every trained model in CPU memory (ZeRO 1-3)")
    offload_parameters: bool = flag(False, "parameters of the trained model in CPU memory too (ZeRO 3)")
    tf32: bool = flag(False, "fp32 on GPUs: factors of matrix products rounded to ten bits; several times faster")
    attn_implementation: Attention | None = flag(None, "attention kernel; without it transformers chooses")


@dataclass(kw_only=True)
class SupervisedDataFlags(DataFlags):
    sft_only_data_path: list[str] = flag([], "data for this stage alone, all of it; beside --data_path, or by itself")
    train_on: Literal["last", "all"] = flag("last", "dialogues of several turns: learn the last answer, or all of them")


@dataclass(kw_only=True)
class FinetuneFlags(Flags, group="model and training"):
    model_name_or_path: str = usual(help="the model to train: hub name or folder")
    dtype: Dtype = usual("auto", "number format; auto: bf16 where the GPU has it, else fp32")
    bf16: bool = flag(False, "the same as --dtype bf16")
    zero_stage: ZeroStage = usual(0, "what the ranks share out: nothing, optimizer states, + gradients, + parameters")
    gradient_checkpointing: bool = usual(False, "recompute activations: less memory, a third slower")
    disable_dropout: bool = flag(False, "no dropout in training")
    per_device_train_batch_size: Count = usual(16, "rows per device and micro-batch")
    max_seq_len: Count = usual(512, "longest prompt + answer in tokens")
    packing: bool = usual(
        False, "join a micro-batch's rows before the model reads them: no padding, the same loss and gradient"
    )
    learning_rate: Positive = usual(1e-5, "peak learning rate")
    weight_decay: NonNegative = usual(0.0, "AdamW weight decay, not on biases and norms")
    num_warmup_steps: CountOrZero = usual(0, "optimizer steps until the learning rate is at its peak")
    print_loss: bool = flag(False, "a console line for every optimizer step, whatever --logging_steps")


WHICH_LAYERS = "part of the names of the linear layers that get adapters; all-linear: every one but the head"
LORA_SCALE = "the adapters' product is scaled by this over their rank; without it by 1"


@dataclass(kw_only=True)
class LoraFlags(Flags, group="LoRA"):
    lora_dim: CountOrZero = usual(0, "rank of the adapters; 0: no LoRA")
    lora_module_name: str = usual("all-linear", WHICH_LAYERS)
    lora_alpha: Count | None = flag(None, LORA_SCALE)
    lora_dropout: BelowOne = flag(0.0, "dropout on what the adapters read")
    lora_learning_rate: Positive = flag(5e-4, "peak learning rate of the adapters")
    only_optimize_lora: bool = usual(False, "train the LoRA adapters alone, nothing else")


@dataclass(kw_only=True)
class PreferenceFlags(Flags, group="loss"):
    loss: Literal["ranking", "hydra", "dpo", "r-dpo"] = usual(
        "ranking",
        "ranking: a reward model; hydra: a reward model and a policy in one, from a pretrained model (steps 1 and 2 at "
        "once); dpo, r-dpo: no reward model but a policy straight from the pairs, against its start",
    )
    ranking_weight: Positive = usual(
        1.0, "hydra: weight of the ranking loss beside the chosen answers' cross-entropy", only="hydra"
    )
    use_margin: bool = flag(
        False,
        "ranking, hydra: the data's column `margin` is how much more the chosen answer must score",
        only="ranking hydra",
    )
    label_smoothing: BelowOne = flag(0.0, "share of the preferences taken to be wrong (with dpo: conservative DPO)")
    center_rewards_coefficient: NonNegative = flag(
        0.0, "ranking, hydra: weight of (chosen + rejected score)^2", only="ranking hydra"
    )
    ranked_loss: Literal["pairs", "plackett-luce"] = flag(
        "pairs",
        "ranking, data with several ranked answers to a prompt: the mean loss of all their pairs, or the likelihood of "
        "the whole ranking; the same for two answers",
        only="ranking",
    )
    dpo_beta: Positive = usual(
        0.1, "dpo, r-dpo: reward per nat of log-ratio (the paper compares with .05)", only="dpo r-dpo"
    )
    length_alpha: NonNegative = flag(0.01, "r-dpo: weight of the difference of lengths, per token", only="r-dpo")
    reference_zero_stage: ZeroStage = flag(0, "dpo, r-dpo: 3 shares the reference's parameters out", only="dpo r-dpo")
    offload_reference_model: bool = usual(
        False, "dpo, r-dpo: the reference's parameters in CPU memory (makes its ZeRO stage 3)", only="dpo r-dpo"
    )


@dataclass(kw_only=True)
class ActorFlags(Flags, group="actor (the trained policy) and reference (its frozen start)"):
    actor_model_name_or_path: str = usual(help="the fine-tuned model of step 1: folder or hub name")
    actor_dtype: Dtype = usual("auto", "number format, the reference's too; auto: bf16 where the GPU has it, else fp32")
    actor_bf16: bool = flag(False, "the same as --actor_dtype bf16")
    actor_zero_stage: ZeroStage = usual(
        0, "what the ranks share out: nothing, optimizer states, + gradients, + parameters"
    )
    reference_zero_stage: ZeroStage = flag(0, "3: the reference's parameters are shared out")
    offload_reference_model: bool = usual(False, "reference's parameters in CPU memory (makes its ZeRO stage 3)")
    actor_gradient_checkpointing: bool = usual(False, "recompute activations: less memory, a third slower")
    disable_actor_dropout: bool = flag(False, "no dropout in training")
    actor_learning_rate: Positive = usual(9.65e-6, "peak learning rate")
    actor_weight_decay: NonNegative = flag(0.0, "AdamW weight decay, not on biases and norms")
    num_warmup_steps: CountOrZero = usual(100, "optimizer steps until the learning rate is at its peak")
    best_by: Literal["reward", "objective"] = flag(
        "reward",
        "keep the model with the highest evaluation reward, or with the highest reward - kl_ctl * KL, which a reward "
        "model that is easily fooled calls for",
    )
    save_at_final: bool = flag(False, "save the last model as well as the best one")
    enable_ema: bool = flag(False, "keep and save a moving average of the actor's weights")


@dataclass(kw_only=True)
class ActorLoraFlags(Flags, group="LoRA"):
    actor_lora_dim: CountOrZero = usual(0, "rank of the adapters; 0: no LoRA")
    actor_lora_module_name: str = flag("all-linear", WHICH_LAYERS)
    actor_lora_alpha: Count | None = flag(None, LORA_SCALE)
    actor_lora_dropout: BelowOne = flag(
        0.0, "dropout on what the adapters read, in the update alone: answers are written without it"
    )
    actor_lora_learning_rate: Positive = flag(5e-4, "peak learning rate of the adapters")
    only_optimize_lora: bool = usual(False, "train the LoRA adapters alone, nothing else")


@dataclass(kw_only=True)
class ShareFlags(Flags, group="shared weights"):
    share: Literal["none", "reference", "all"] = flag(
        "none",
        "with --only_optimize_lora, whose actor is its start without the adapters: reference: that is the reference, "
        "which is not loaded; and with --critic_lora_dim the critic without its adapters is the reward model. all: the "
        "reward model too, whose score head lies in the actor's folder (step 2 --loss hydra), and the critic",
    )
    joint_critic: bool = of_critic(False, "--share all: actor and critic learn one set of adapters, not a set each")


@dataclass(kw_only=True)
class RewardFlags(RewardSourceFlags):
    reward_dtype: Dtype = flag("auto", "number format of reward models; auto: bf16 where the GPU has it, else fp32")
    reward_bf16: bool = flag(False, "the same as --reward_dtype bf16")
    reward_zero_stage: ZeroStage = flag(0, "3: each reward model's parameters are shared out")
    offload_reward_model: bool = usual(False, "their parameters in CPU memory (makes their ZeRO stage 3)")
    disable_reward_dropout: bool = flag(
        False, "no dropout in a critic made from it; the reward model itself never has any"
    )


@dataclass(kw_only=True)
class RolloutFlags(Flags, group="rollout"):
    per_device_generation_batch_size: Count = usual(16, "prompts per device that are answered together")
    generation_batches: Count = flag(1, "such batches before the one optimizer step")
    per_device_training_batch_size: Count = usual(16, "answers per device and micro-batch of the update")
    packing: bool | None = flag(
        None,
        "join the rows of a micro-batch before a model reads them, so that none is padded and answers to one prompt "
        "share it; the same rewards, loss and gradient. Default: where a model can and gains (on CPUs, or with "
        "flash_attention_2)",
    )
    max_prompt_seq_len: Count = usual(256, "longest prompt in tokens")
    max_answer_seq_len: Count = usual(256, "longest answer in tokens")
    max_greedy_seq_len: CountOrZero = flag(
        0, "longest greedy answer (ReMax-fast: 128); 0: as --max_answer_seq_len", only="greedy"
    )
    logprobs_of: Literal["sampling", "model"] = flag(
        "sampling",
        "what the update differentiates when temperature, top_p or top_k are set: what is drawn from (exact) "
        "or the model's own (as published; biased)",
    )
    zero3_generation: Literal["gather", "synced"] = flag(
        "gather",
        "actor at ZeRO 3: collect its parameters once per rollout (must fit on each device), or layer by layer at "
        "every token",
    )
    cuda_graphs: bool | None = flag(
        None,
        "record the steps of the actor's decode and repeat them, each by one launch instead of hundreds; keeps the "
        "memory of keys and values. Default: on GPUs, below ZeRO 3, where the planner finds room for that "
        "(docs/hardware.md)",
    )


@dataclass(kw_only=True)
class AlgorithmFlags(Flags, group="algorithm"):
    algo: Literal["remax", "reinforce", "rloo", "grpo", "ppo", "raft", "superhf", "inpo"] = usual(
        "remax",
        "how an answer's advantage is estimated; raft and superhf learn the best answer to each prompt, as step 1 "
        "would, and inpo prefers the best one to the worst",
    )
    samples_per_prompt: Count | None = usual(
        None,
        "sampled answers per prompt, 2 or more where they are compared; default 4 (rloo, grpo, raft), 8 (inpo), 16 "
        "(superhf), 1 (others; only remax takes more)",
    )
    baseline: Literal["greedy", "greedy_kl", "calibrated", "others", "length_weighted", "token_weighted"] | None = flag(
        None,
        "what a reward is compared with. remax: greedy, the greedy answer's (the paper, default); greedy_kl, less what "
        "its KL costs; calibrated, what earlier rollouts make of both and of the prompt's other answers. rloo: others, "
        "their mean (default); length_weighted, by their tokens (OPO); token_weighted, by how unsure they were (OTB)",
        only="baseline",
    )
    baseline_decay: BelowOne = flag(
        0.0, "reinforce: decay of a moving-average baseline; 0: no baseline", only="baseline_decay"
    )
    gamma: Fraction | None = flag(
        None, "discount per token to the answer's end; default 0.95 (remax, reinforce), 1 (others); 1 is Algorithm 1"
    )
    clip_reward_value: NonNegative = flag(5.0, "largest size of what --clip_on names; 0: no limit")
    clip_on: Literal["difference", "reward"] | None = flag(
        None,
        "clip the reward minus its baseline, or the reward; default: difference (remax, reinforce), reward (others)",
    )
    loss_aggregation: Literal["sequence", "token", "sequence_mean", "constant"] | None = flag(
        None,
        "sequence: sum over an answer's tokens, mean over answers (Algorithm 1); token: mean over all tokens; "
        "sequence_mean: mean over an answer's tokens, then over answers; constant: sequence, divided by "
        "--max_answer_seq_len (Dr. GRPO); default: token (ppo, raft, superhf), sequence_mean (grpo), sequence (others)",
    )
    advantage_scaling: Literal["none", "group", "batch"] | None = flag(
        None,
        "group: divide by the standard deviation of a prompt's answers (grpo); batch: mean 0 and deviation 1 over the "
        "step's answer tokens (reinforce, rloo, grpo, ppo); default: group (grpo), none (others)",
        only="advantage_scaling",
    )
    ppo_epochs: Count = flag(1, "passes over each rollout (ppo, raft, superhf, inpo)", only="epochs")
    ppo_mini_batches: Count = flag(1, "optimizer steps in one pass (ppo, raft, superhf, inpo)", only="epochs")
    entropy_coef: NonNegative = flag(0.0, "weight of an entropy bonus in the loss")
    inpo_eta: Positive = flag(
        7.5e-3, "inpo: the larger, the nearer the policy stays to that of the rollout", only="eta"
    )
    inpo_tau: NonNegative | None = flag(
        None, "inpo: pull to the reference, at most --inpo_eta; default: a third of it", only="tau"
    )
    unsupervised_dataset_name: str | None = flag(None, "plain text mixed into the loss: hub name, folder or file")
    unsupervised_dataset_config_name: str | None = flag(None, "its configuration on the hub")
    unsup_coef: NonNegative = flag(27.8, "weight of that text's loss")
    per_device_unsupervised_batch_size: Count = flag(16, "blocks of that text per device and optimizer step")


@dataclass(kw_only=True)
class KlFlags(Flags, group="KL to the reference"):
    penalty: Penalty | None = usual(
        None,
        "one_step: a token pays its own KL; full_step: and that of the tokens after it (with k1 the exact gradient); "
        "full_kl_...: the same with the KL over the vocabulary; the last four are older names, kl and full_kl of "
        "the full step. Default: full_step (rloo, ppo), full_kl_one_step (superhf), one_step (others); raft and inpo "
        "have none",
    )
    kl_ctl: NonNegative | None = usual(
        None,
        "weight of the KL, reward per nat; full_step needs about a tenth of one_step's; default 0.1 (grpo 0.04, "
        "superhf 0.35)",
    )
    kl_in: Literal["reward", "loss"] | None = flag(None, "where the KL enters; default: reward for k1, loss for others")
    kl_estimator: Literal["k1", "k2", "k3", "bregman", "js", "clamped_js", "full"] | None = flag(
        None,
        "k1: -log r, k2: (log r)^2/2, k3: r - 1 - log r, bregman: 1/r - 1 + log r, with r = reference/policy of the "
        "drawn token; js: Jensen-Shannon, clamped_js: as of arXiv 2309.09055; full: over the vocabulary; default: k3 "
        "(grpo), k1 (others)",
    )
    normalize_kl: bool = flag(False, "charge the mean of an answer's KL over its tokens instead of the sum")
    target_kl: NonNegative = usual(1.0, "stop when the KL in evaluation, in nats per token, reaches this; 0: never")
    adaptive_kl: bool = flag(False, "adapt --kl_ctl so that the KL stays near --adaptive_kl_target")
    adaptive_kl_target: Positive = flag(6.0, "in nats per answer")
    adaptive_kl_horizon: Count = flag(10_000, "answers over which a KL 20 %% off its target moves the weight by 20 %%")


@dataclass(kw_only=True)
class PpoFlags(Flags, group="ppo only"):
    cliprange: Positive = flag(0.2, "the policy's ratio counts within 1 +- this", only="cliprange")
    cliprange_value: Positive = flag(
        0.2, "a value counts within this of the one at rollout time", only="cliprange_value"
    )
    lam: Annotated[float, Range("0 to 1", lambda x: 0 <= x <= 1)] = flag(
        0.95, "lambda of generalised advantages", only="lam"
    )
    critic_model_name_or_path: str | None = of_critic(None, "start of the critic; default: the first reward model")
    critic_lora_dim: CountOrZero = of_critic(
        0,
        "rank of the critic's adapters, on the layers of --actor_lora_module_name; they and its head are then all that "
        "learns. 0: its whole model learns, or with --share all adapters of the actor's rank",
    )
    critic_learning_rate: Positive = of_critic(5e-6, "peak learning rate, of adapters too")
    critic_weight_decay: NonNegative = of_critic(0.0, "AdamW weight decay, not on biases and norms")
    critic_warmup_steps: CountOrZero = of_critic(
        0, "first steps in which the critic alone learns, and the policy stays as it is (PPO-max)"
    )
    critic_zero_stage: ZeroStage | None = of_critic(None, "default: the actor's")
    critic_dtype: Dtype | None = of_critic(None, "default: the actor's")
    offload_critic: bool = of_critic(False, "the critic's optimizer states in CPU memory, also without --offload")
    critic_gradient_checkpointing: bool = of_critic(False, "recompute activations: less memory, a third slower")


@dataclass(kw_only=True)
class WatchFlags(Flags, group="watching and checking"):
    print_answers: bool = usual(False, "show a prompt with its answers at every console line")
    save_answers: bool = flag(False, "write the answers of every evaluation to <output_dir>")
    log_variance: bool = flag(False, "measure the advantages' variance under several baselines")
    log_variance_gradient_steps: CountOrZero = flag(
        0, "with --log_variance: optimizer steps between measurements of the gradient's variance; 0: never"
    )
    skip_doctor: bool = flag(False, "do not check memory (on GPUs), models, tokenizer and generation before training")
    logprob_chunk_size: Count = flag(1024, "tokens whose logits are in memory at once")
    enable_test_mode: bool = flag(False, "stop after --test_stop_step optimizer steps (after one if that is 0)")
    test_stop_step: CountOrZero = flag(0, "with --enable_test_mode")


@dataclass(kw_only=True)
class Retired(Flags, group="retired (accepted, do nothing)"):
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


@dataclass(kw_only=True)
class Arguments(Retired, MemoryFlags, RunFlags, OptimizerFlags, DataFlags, ConfigFlag):
    """What the three stages have in common."""

    stage: ClassVar[str]  # its name in run.json
    models_in: ClassVar[tuple[str, ...]] = ("", "last")  # subfolders of the output in which it writes models
    # For rank 0 to print: one line for each retired flag that was given, and for each that acts otherwise than it says.
    notices: list[str] = dataclasses.field(default_factory=list, init=False)

    @property
    def epochs(self) -> int:
        """Passes over the data; 0: as many as --max_steps takes."""
        return self.num_train_epochs or (0 if self.max_steps else 1)

    @property
    def columns(self) -> dict[str, str]:
        """{"prompt": its name in the data, ...}, as far as names were given."""
        names = {"prompt": self.prompt_column, "chosen": self.chosen_column, "rejected": self.rejected_column}
        return {ours: theirs for ours, theirs in names.items() if theirs is not None}

    @property
    def reports(self) -> set[str]:
        """Of --report_to and --enable_tensorboard: tensorboard, wandb."""
        return {*self.report_to, *(["tensorboard"] if self.enable_tensorboard else [])} - {"none"}

    @property
    def tensorboard_dir(self) -> str | None:
        folder = self.tensorboard_path or str(Path(self.output_dir) / "tensorboard")
        return folder if "tensorboard" in self.reports else None


@dataclass(kw_only=True)
class FinetuneArguments(Arguments, LoraFlags, FinetuneFlags):
    @property
    def console_every(self) -> int:
        return 1 if self.print_loss else self.logging_steps


@dataclass(kw_only=True)
class Step1Arguments(FinetuneArguments, SupervisedDataFlags):
    stage = "step1"


@dataclass(kw_only=True)
class Step2Arguments(FinetuneArguments, RetiredInStep2, PreferenceFlags):
    stage = "step2"


@dataclass(kw_only=True)
class Step3Arguments(
    Arguments,
    RetiredInStep3,
    ActorLoraFlags,
    ShareFlags,
    WatchFlags,
    PpoFlags,
    KlFlags,
    AlgorithmFlags,
    SamplingFlags,
    RolloutFlags,
    RewardFlags,
    ActorFlags,
):
    stage = "step3"
    models_in = ("actor", "actor_last", "actor_final", "actor_ema", "critic")

    @property
    def reward_models(self) -> list[str]:
        """With --share all the actor's folder."""
        return [self.actor_model_name_or_path] if self.share == "all" else self.reward_model_name_or_path

    @property
    def critic_is_reward(self) -> bool:
        """Whether the first reward model is the critic without its adapters (--share reference)."""
        own_start = self.critic_model_name_or_path or not self.reward_model_name_or_path
        return self.share == "reference" and self.critic_lora_dim > 0 and not own_start

    @property
    def reward_is_shared(self) -> bool:
        """Whether no reward model is loaded for itself, though there is one."""
        return self.share == "all" or (self.critic_is_reward and len(self.reward_model_name_or_path) == 1)

    @property
    def rollout_batches(self) -> int:
        return self.generation_batches * self.gradient_accumulation_steps

    @property
    def answers_per_rollout(self) -> int:
        """Sampled answers on one device before an optimizer step (ppo: before its inner epochs)."""
        assert self.samples_per_prompt is not None  # filled in by `arguments`
        return self.per_device_generation_batch_size * self.rollout_batches * self.samples_per_prompt

    @property
    def stop_step(self) -> int:
        """The optimizer step after which to stop early; 0: none."""
        stops = [self.max_steps, max(1, self.test_stop_step) if self.enable_test_mode else 0]
        return min((step for step in stops if step > 0), default=0)
