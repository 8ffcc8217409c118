"""From the command line to flags that fit together: checks, and defaults that depend on other flags.

`parse_step1`, `parse_step2` and `parse_step3` return one flat, typed object whose attributes are named as the flags. By
then everything that can be known without loading a model has been checked, "auto" values and defaults that depend on
other flags are filled in, and retired flags have been noted; a bad flag is a UserError naming it. `check_*`
functions only refuse, `resolve_*` functions fill in. torch is imported after the checks that need neither a device nor
the algorithms, so most refusals take a fraction of a second. The flags themselves stand in `flags`, their reading in
`command_line`.
"""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remax.cli.flags import (
    DEFAULT_DATA,
    Dtype,
    FinetuneArguments,
    RewardSourceFlags,
    Step1Arguments,
    Step2Arguments,
    Step3Arguments,
)
from remax.cli.model_names import check_model, looks_local
from remax.cli.parser import read_flags
from remax.rewards.process import load_function
from remax.rewards.sources import reward_sources
from utils.adapter_folder import ADAPTER_FOLDER, adapter_config, base_of, is_adapter
from utils.data.names import exists, parse_name
from utils.run import UserError, refuse_to_overwrite

if TYPE_CHECKING:
    from remax.algorithms import Algorithm

StageArguments = Step1Arguments | Step2Arguments | Step3Arguments


def parse_step1(argv: Sequence[str] | None = None) -> Step1Arguments:
    """The flags of step 1 (default: of the command line), checked and completed; UserError when something is wrong."""
    args = read_flags(Step1Arguments, argv, "Step 1: supervised fine-tuning")
    check_data(args, stage=0)
    check_finetune(args)
    check_output_dir(args, ["model_name_or_path"])
    resolve_finetune(args)
    return args


def parse_step2(argv: Sequence[str] | None = None) -> Step2Arguments:
    """The flags of step 2, as `parse_step1`."""
    args = read_flags(Step2Arguments, argv, "Step 2: reward model")
    check_data(args, stage=1)
    check_finetune(args)
    check_preference_loss(args)
    check_output_dir(args, ["model_name_or_path"])
    resolve_finetune(args)
    resolve_frozen(args, "reference_zero_stage", "offload_reference_model")
    return args


def parse_step3(argv: Sequence[str] | None = None) -> Step3Arguments:
    """The flags of step 3, as `parse_step1`."""
    args = read_flags(Step3Arguments, argv, "Step 3: reinforcement learning from human feedback")
    check_data(args, stage=2)
    check_step3(args)
    check_share(args)
    if args.share != "all":
        check_reward(args)
    models = ("actor_model_name_or_path", "critic_model_name_or_path", "reward_model_name_or_path")
    check_output_dir(args, models)
    check_algorithm(args)
    resolve_algorithm(args)
    check_batches(args)
    if args.max_eval_batches is None:
        args.max_eval_batches = 16
    import_functions(args)
    resolve_models(args)
    check_graphs(args)
    return args


def check_graphs(args: Step3Arguments) -> None:
    """CUDA graphs need a GPU."""
    if args.cuda_graphs:
        import torch

        if not torch.cuda.is_available():
            raise UserError("--cuda_graphs: no GPU is visible to torch; leave it out")


def resolve_data(args: StageArguments) -> None:
    """The default data set, where the flags name no other: it never mixes with data that somebody chose."""
    if args.data_path is None:
        chosen = isinstance(args, Step1Arguments) and args.sft_only_data_path
        args.data_path = [] if chosen else [DEFAULT_DATA]


def check_data(args: StageArguments, stage: int) -> None:
    """The split, the data files that are named as paths, and the folders that are written."""
    resolve_data(args)
    try:
        shares = [float(share) for share in args.data_split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not min(shares) >= 0 or not math.isfinite(sum(shares)):
        raise UserError(f"--data_split {args.data_split}: expected three numbers, 0 or more, such as 2,4,4")
    if shares[stage] == 0 and args.data_path:
        raise UserError(
            f"--data_split {args.data_split}: leaves nothing for step {stage + 1}; its share must be above 0"
        )
    named = [("data_path", path) for path in args.data_path]
    if isinstance(args, Step1Arguments):
        named += [("sft_only_data_path", path) for path in args.sft_only_data_path]
    if not named:
        raise UserError("--data_path: is empty; expected hub names, folders or files")
    for name, path in named:
        source = parse_name(path, f"--{name}").name
        if looks_local(source) and not exists(source):
            raise UserError(f"--{name} {path}: no such file or folder (looked from {Path.cwd()})")
    for folder in ("output_dir", "tensorboard_path", "data_output_path"):
        check_folder(folder, getattr(args, folder))
    check_streaming(args)
    check_reports(args)


def check_reports(args: StageArguments) -> None:
    """Where figures go."""
    if "none" in args.report_to and args.reports:
        others = ["--enable_tensorboard"] if args.enable_tensorboard else sorted(args.reports)
        raise UserError(f"--report_to none with {' '.join(others)}: contradict one another; give one")
    if args.tensorboard_path and "tensorboard" not in args.reports:
        raise UserError("--tensorboard_path: has no effect without --report_to tensorboard")
    # A folder `wandb`, such as that package leaves behind, can be imported too, but has no loader.
    if "wandb" in args.reports and ((spec := importlib.util.find_spec("wandb")) is None or spec.origin is None):
        raise UserError("--report_to wandb: the package is not installed; `pip install wandb`, or leave it out")


def check_folder(flag_name: str, folder: str | None) -> None:
    """Refuses a folder that can neither be written nor be made, without making it."""
    if folder is None:
        return
    path, reason = Path(folder), None
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # such as a name that is too long
        reason = error.strerror
    above = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not above.is_dir():
        reason = reason or f"{above} is no folder"
    elif not os.access(above, os.W_OK | os.X_OK):
        reason = reason or f"{above} may not be written"
    if reason:
        raise UserError(f"--{flag_name} {folder}: cannot be made or written ({reason}); choose another folder")


def check_output_dir(args: StageArguments, models: Iterable[str]) -> None:
    """Nothing is written over: not the models that the flags `models` name, and no other run without leave."""
    output = Path(args.output_dir)
    written = {(output / name).resolve() for name in ("", *args.models_in)}
    for name in models:
        value = getattr(args, name)
        for model in [source.name for source in reward_sources(value, [])[0]] if isinstance(value, list) else [value]:
            read = {Path(model).resolve()} if model and Path(model).is_dir() else set()
            if model and is_adapter(model):
                base = Path(base_of(model, f"--{name}")).resolve()
                read |= {base, *(folder.parent for folder in list(read) if folder.name == ADAPTER_FOLDER)}
            if read & written:
                raise UserError(f"--output_dir {output}: is where --{name} {model} lies; choose another folder")
    check_resume(args, output)


def check_resume(args: StageArguments, output: Path) -> None:
    """--resume names something; and what lies in the output's folder is that run, or may be replaced."""
    if args.resume not in ("auto", "never") and not Path(args.resume).is_dir():
        raise UserError(
            f"--resume {args.resume}: no such folder (looked from {Path.cwd()}); expected auto, never, the folder of a "
            "run, or one of its checkpoints"
        )
    if args.resume != "never" and args.overwrite_output_dir:
        raise UserError(f"--resume {args.resume} with --overwrite_output_dir: contradict one another; give one")
    if args.on_nan == "rollback" and not (args.save_steps or args.save_minutes):
        raise UserError("--on_nan rollback: needs checkpoints to go back to, by --save_steps or --save_minutes")
    same_run = (output / "run.json").is_file() and (
        args.resume == "auto" or Path(args.resume).resolve().is_relative_to(output.resolve())
    )
    if not (same_run or args.overwrite_output_dir):
        refuse_to_overwrite(output, args.models_in, goes_on=args.resume != "never")


def check_streaming(args: StageArguments) -> None:
    if not args.streaming:
        if args.shuffle_buffer != type(args).shuffle_buffer:
            raise UserError("--shuffle_buffer: has no effect without --streaming")
        return
    if not args.max_steps:
        raise UserError(
            "--streaming: needs --max_steps, since nobody knows how many rows will come, and the course of the "
            "learning rate depends on the number of steps"
        )
    if args.preprocessing_num_workers is not None:
        raise UserError("--preprocessing_num_workers with --streaming: nothing is prepared beforehand; leave one out")


def check_lora(args: FinetuneArguments | Step3Arguments, prefix: str) -> None:
    """Adapters to add, or those of a PEFT folder, which go on learning as they are, and alone."""
    model_flag = f"{prefix}model_name_or_path"
    model, dim_flag = getattr(args, model_flag), f"{prefix}lora_dim"
    if is_adapter(model):
        for name in (dim_flag, f"{prefix}lora_module_name", f"{prefix}lora_alpha"):
            if (value := getattr(args, name)) != getattr(type(args), name):
                raise UserError(
                    f"--{name} {value} with --{model_flag} {model}: its adapters go on learning as they are; leave "
                    "this out, or merge them into their base model and give that"
                )
        rank, base = adapter_config(model, f"--{model_flag}").get("r"), base_of(model, f"--{model_flag}")
        args.notices.append(f"--{model_flag} {model}: its adapters of rank {rank} go on learning, alone; base: {base}")
    elif args.only_optimize_lora and getattr(args, dim_flag) == 0:
        raise UserError(
            f"--only_optimize_lora: there is nothing to train without LoRA; set --{dim_flag}, for example 128"
        )


def check_offload(stage_flag: str, stage: int, **offload: bool) -> None:
    """Refuses offloading that the ZeRO stage does not know. offload: the flags that ask for it, with their values."""
    for name, asked in offload.items():
        if asked and name == "offload_parameters" and stage != 3:
            raise UserError(f"--{name} with --{stage_flag} {stage}: needs --{stage_flag} 3")
        if asked and stage == 0:
            raise UserError(
                f"--{name} with --{stage_flag} 0: offloading is a part of ZeRO; set --{stage_flag} 1, 2 or 3"
            )


def check_dtype(flag_name: str, dtype: Dtype, bf16: bool) -> None:
    """Refuses a number format that the older flag for bf16 contradicts."""
    if bf16 and dtype not in ("auto", "bf16"):
        raise UserError(
            f"--{flag_name} {dtype} with --{flag_name.replace('dtype', 'bf16')}: contradict one another; give one"
        )


def resolve_dtype(flag_name: str, dtype: Dtype, bf16: bool = False) -> Dtype:
    """fp32, bf16 or fp16 from the flag, the older flag for bf16, and the device; fp16 needs a GPU."""
    if bf16:
        return "bf16"
    if dtype in ("fp32", "bf16"):
        return dtype
    import torch  # two seconds: after the checks that need no device

    on_gpu = torch.cuda.is_available()
    if dtype == "fp16" and not on_gpu:
        raise UserError(f"--{flag_name} fp16: DeepSpeed has no fp16 on a CPU; use fp32 or bf16")
    if dtype == "auto":
        dtype = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return dtype


def resolve_zero_of_16_bits(args: FinetuneArguments | Step3Arguments, dtype_flag: str, stage_flag: str) -> None:
    """Raises stage 0 to 1 for a trained model of 16 bits.

    At stage 0 DeepSpeed keeps no fp32 master weights for bf16, and for fp16 it divides the gradient by a loss scale
    that the loss was never multiplied by.
    """
    dtype = getattr(args, dtype_flag)
    if dtype != "fp32" and getattr(args, stage_flag) == 0:
        setattr(args, stage_flag, 1)
        why = "training without fp32 master weights drifts" if dtype == "bf16" else "needs its loss scaled"
        args.notices.append(f"--{stage_flag} 0: ZeRO 1 is used, since {dtype} {why}")


def resolve_frozen(args: Step2Arguments | Step3Arguments, stage_flag: str, offload_flag: str) -> None:
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


def check_attention(args: FinetuneArguments | Step3Arguments) -> None:
    """An attention that can do what else is asked for."""
    if args.packing and args.attn_implementation == "eager":
        raise UserError("--packing with --attn_implementation eager: only sdpa and flash_attention_2 keep rows apart")


def check_finetune(args: FinetuneArguments) -> None:
    check_model("model_name_or_path", args.model_name_or_path)
    check_lora(args, "")
    check_offload("zero_stage", args.zero_stage, offload=args.offload, offload_parameters=args.offload_parameters)
    check_attention(args)
    check_dtype("dtype", args.dtype, args.bf16)


def resolve_finetune(args: FinetuneArguments) -> None:
    args.dtype = resolve_dtype("dtype", args.dtype, args.bf16)
    resolve_zero_of_16_bits(args, "dtype", "zero_stage")


def check_preference_loss(args: Step2Arguments) -> None:
    """Flags that --loss does not read must be at their defaults."""
    for name, losses in flags_with_readers(args):
        if args.loss not in losses:
            raise UserError(f"--{name} with --loss {args.loss}: only --loss {' and '.join(losses)} read it")
    if args.ranked_loss == "plackett-luce" and args.label_smoothing:
        raise UserError(
            "--label_smoothing with --ranked_loss plackett-luce: it is a share of wrong pairs, and a whole ranking has "
            "no opposite; use --ranked_loss pairs"
        )


def flags_with_readers(args: Step2Arguments | Step3Arguments) -> Iterable[tuple[str, tuple[str, ...]]]:
    """The flags that not every loss or algorithm reads and that are not at their defaults, each with `only`."""
    for field in dataclasses.fields(args):
        if (only := field.metadata.get("only")) and getattr(args, field.name) != field.default:
            yield field.name, only


def check_step3(args: Step3Arguments) -> None:
    """What neither the device nor the algorithm decides."""
    check_model("actor_model_name_or_path", args.actor_model_name_or_path)
    check_model("critic_model_name_or_path", args.critic_model_name_or_path)
    check_lora(args, "actor_")
    if args.inference_tp_size is not None and args.inference_tp_size != 1:
        raise UserError(
            f"--inference_tp_size {args.inference_tp_size}: generation is not split over devices; leave it out, and "
            "use --actor_zero_stage 3 for a model that is too large for one"
        )
    if args.unsupervised_dataset_config_name and not args.unsupervised_dataset_name:
        raise UserError("--unsupervised_dataset_config_name: has no effect without --unsupervised_dataset_name")
    if (rows := args.per_device_unsupervised_batch_size) != type(args).per_device_unsupervised_batch_size:
        if not args.unsupervised_dataset_name:
            name = f"--per_device_unsupervised_batch_size {rows}"
            raise UserError(f"{name}: has no effect without --unsupervised_dataset_name")
    if args.log_variance_gradient_steps and not args.log_variance:
        raise UserError("--log_variance_gradient_steps: has no effect without --log_variance")
    if args.max_greedy_seq_len > args.max_answer_seq_len:
        raise UserError(
            f"--max_greedy_seq_len {args.max_greedy_seq_len}: must not exceed --max_answer_seq_len "
            f"({args.max_answer_seq_len})"
        )
    stage = args.actor_zero_stage
    check_offload("actor_zero_stage", stage, offload=args.offload, offload_parameters=args.offload_parameters)
    check_attention(args)
    if args.zero3_generation == "synced" and stage != 3:
        raise UserError(f"--zero3_generation synced with --actor_zero_stage {stage}: is for ZeRO 3 only")
    if args.cuda_graphs and stage == 3:
        raise UserError(
            "--cuda_graphs with --actor_zero_stage 3: a recorded step finds the weights where they were, and ZeRO 3 "
            "gathers them anew for each rollout; leave it out, or use --actor_zero_stage 2"
        )
    if args.penalty == "none":
        for name in ("kl_in", "kl_estimator", "adaptive_kl", "normalize_kl"):
            if getattr(args, name):
                raise UserError(f"--{name} with --penalty none: there is no KL penalty; leave one of them out")
    check_dtype("actor_dtype", args.actor_dtype, args.actor_bf16)
    check_dtype("reward_dtype", args.reward_dtype, args.reward_bf16)


def check_reward(args: RewardSourceFlags) -> None:
    """Of step 3 and of the doctor: there is a reward; its models' folders; weights."""
    if not args.reward_model_name_or_path and not args.reward_fn:
        raise UserError("--reward_model_name_or_path or --reward_fn: one of them is required; it says what to learn")
    models, _ = reward_sources(args.reward_model_name_or_path, args.reward_fn)
    for model in models:
        check_model("reward_model_name_or_path", model.name)
    if args.normalize_reward and not models:
        raise UserError("--normalize_reward with --reward_fn alone: it is for reward models, which know their mean")
    if args.reward_fn_timeout != type(args).reward_fn_timeout and not args.reward_fn:
        raise UserError("--reward_fn_timeout: has no effect without --reward_fn")


def check_share(args: Step3Arguments) -> None:
    """What cannot be shared, and flags of models that are not loaded: they must be at their defaults."""
    share = f"--share {args.share}"
    if args.joint_critic and args.share != "all":
        raise UserError(f"--joint_critic with {share}: the actor's adapters can only serve the critic with --share all")
    if args.critic_warmup_steps and args.share == "all":
        raise UserError(f"--critic_warmup_steps with {share}: actor and critic learn in the same step; leave one out")
    if args.joint_critic and args.critic_lora_dim:
        raise UserError("--joint_critic with --critic_lora_dim: the critic has no adapters of its own; leave one out")
    if args.share == "none":
        return
    if is_adapter(args.actor_model_name_or_path):
        raise UserError(
            f"{share} with --actor_model_name_or_path {args.actor_model_name_or_path}: without its adapters it is not "
            "the start, which the reference must be; give the merged model and --actor_lora_dim"
        )
    if not args.only_optimize_lora:
        raise UserError(
            f"{share}: needs --actor_lora_dim and --only_optimize_lora, since what models share must not learn"
        )
    without = {"reference": ["reference_zero_stage", "offload_reference_model"]}
    of_reward = ["reward_zero_stage", "offload_reward_model", "reward_dtype", "reward_bf16"]
    if args.share == "all":
        without["reward model"] = ["reward_model_name_or_path", *of_reward]
        of_critic = ["model_name_or_path", "zero_stage", "dtype", "gradient_checkpointing"]
        without["critic"] = [f"critic_{name}" for name in of_critic] + ["offload_critic"]
    elif args.reward_is_shared:
        without["reward model"] = of_reward
    defaults = Step3Arguments(actor_model_name_or_path="")
    for model, names in without.items():
        for name in names:
            if getattr(args, name) != getattr(defaults, name):
                trunk = "critic" if args.critic_is_reward and model == "reward model" else "actor"
                raise UserError(f"--{name} with {share}: the {model} has no weights but the {trunk}'s; leave one out")


def import_functions(args: RewardSourceFlags) -> None:
    """Has the worker process import what --reward_fn names, which may take seconds: it imports what it likes."""
    for function in reward_sources(args.reward_model_name_or_path, args.reward_fn)[1]:
        load_function(function.name)


def check_algorithm(args: Step3Arguments) -> None:
    """What the algorithm decides: flags that it does not read (they must be at their defaults), answers, the critic."""
    from remax.algorithms import ALGORITHMS, readers  # imports torch: after the cheaper checks

    for name, (trait,) in flags_with_readers(args):
        having = [key for key, kind in ALGORITHMS.items() if getattr(kind, trait, None) is True]
        known = having or readers(trait)
        if args.algo not in known:
            reason = f"only --algo {', '.join(known)} reads it"
            if trait == "epochs":
                reason = "a rollout gets one step, since the estimate holds for the policy that wrote it; only "
                reason += f"{', '.join(known)} has more"
            raise UserError(f"--{name} {getattr(args, name)} with --algo {args.algo}: {reason}")
    samples, several = args.samples_per_prompt, readers("samples_per_prompt")
    if samples == 1 and ALGORITHMS[args.algo]().samples_per_prompt > 1:
        raise UserError(
            f"--samples_per_prompt 1 with --algo {args.algo}: it compares the answers to a prompt; 2 or more"
        )
    if samples is not None and samples > 1 and args.algo not in several:
        raise UserError(
            f"--samples_per_prompt {samples} with --algo {args.algo}: it takes one answer per prompt; use "
            f"--algo {' or '.join(several)}"
        )
    if ALGORITHMS[args.algo].critic:
        if args.share != "all" and not (args.critic_model_name_or_path or args.reward_model_name_or_path):
            raise UserError(
                f"--algo {args.algo} with --reward_fn alone: there is no reward model to make the critic from; give "
                "--critic_model_name_or_path"
            )
        stage = args.actor_zero_stage if args.critic_zero_stage is None else args.critic_zero_stage
        if args.share != "all":
            check_offload("critic_zero_stage", stage, offload_critic=args.offload_critic, offload=args.offload)


def resolve_algorithm(args: Step3Arguments) -> None:
    """Fills in the flags whose default is the algorithm's."""
    algorithm = make_algorithm(args)
    kl = algorithm.kl
    names = ("gamma", "samples_per_prompt", "baseline", "clip_on", "loss_aggregation", "advantage_scaling")
    own = {name: getattr(algorithm, name, None) for name in names} | {"kl_ctl": kl.coefficient}
    if args.penalty != "none":
        reach = ("full_kl_" if kl.estimator == "full" else "") + kl.reach
        own |= {"penalty": reach, "kl_in": kl.where, "kl_estimator": kl.estimator}
    vars(args).update(own)


def make_algorithm(args: Step3Arguments, **more: Any) -> "Algorithm":
    """The algorithm that the flags describe.

    Args:
        more: settings that are no flags, such as `sum_across_ranks`.

    Raises:
        UserError: flags that contradict one another, or that this algorithm cannot follow.
    """
    from remax.algorithms import ALGORITHMS, build_algorithm, build_penalty, readers  # imports torch

    names = ["gamma", "clip_reward_value", "clip_on", "loss_aggregation", "entropy_coef", "samples_per_prompt"]
    names += ["baseline", "baseline_decay", "advantage_scaling", "lam", "cliprange", "cliprange_value"]
    settings = {name: getattr(args, name) for name in names} | {"epochs": args.ppo_epochs}
    settings |= {"eta": args.inpo_eta, "tau": args.inpo_tau}
    settings |= {"longest_answer": args.max_answer_seq_len} if args.loss_aggregation == "constant" else {}
    settings = {name: value for name, value in settings.items() if args.algo in readers(name)}
    kl_flags = ("penalty", "kl_ctl", "kl_in", "kl_estimator", "normalize_kl")
    try:
        penalty = build_penalty(
            ALGORITHMS[args.algo]().kl,
            **{name: getattr(args, name) for name in kl_flags},
            kl_target=args.adaptive_kl_target if args.adaptive_kl else None,
            kl_horizon=args.adaptive_kl_horizon,
        )
        return build_algorithm(args.algo, kl=penalty, **settings, **more)
    except ValueError as error:
        names = ["algo", *kl_flags, "adaptive_kl", "gamma", "clip_on", "loss_aggregation"]
        names += ["inpo_eta", "inpo_tau"] if args.algo == "inpo" else []
        values = [(name, getattr(args, name)) for name in names]
        given = " ".join(
            f"--{name} {x}".removesuffix(" True") for name, x in values if x is not None and x is not False
        )
        raise UserError(f"{given}: {error}") from error


def check_batches(args: Step3Arguments) -> None:
    """Micro-batches, and mini-batches, must cut what is learned from a rollout evenly."""
    from remax.algorithms import ALGORITHMS

    answers, micro, kept = args.answers_per_rollout, args.per_device_training_batch_size, ALGORITHMS[args.algo].kept
    terms = "--per_device_generation_batch_size x --generation_batches x --gradient_accumulation_steps"
    if kept:
        answers = kept * answers // (args.samples_per_prompt or 1)
        terms += ", of each prompt the best answer" if kept == 1 else f", of each prompt {kept} answers"
        if micro % kept:
            raise UserError(
                f"--per_device_training_batch_size {micro} with --algo {args.algo}: it compares {kept} answers to a "
                f"prompt; a multiple of {kept}"
            )
    elif (args.samples_per_prompt or 1) > 1:
        terms += " x --samples_per_prompt"
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
        sizes = [n for n in range(1, min(micro, mini) + 1) if mini % n == 0 and n % (kept or 1) == 0]
        example = f"for example {max(sizes)}" if sizes else "fewer --ppo_mini_batches, or more prompts"
        raise UserError(f"--per_device_training_batch_size {micro}: must divide {what}; {example}")


def resolve_models(args: Step3Arguments) -> None:
    """ZeRO stages, offloading and number formats, model by model; models that a run does not load keep the defaults."""
    from remax.algorithms import ALGORITHMS

    critic = ALGORITHMS[args.algo].critic and args.share != "all"
    if args.test_stop_step and not args.enable_test_mode:
        args.notices.append("--test_stop_step: without effect, as --enable_test_mode is not set")
    if ALGORITHMS[args.algo].critic and not critic and args.disable_reward_dropout and not args.disable_actor_dropout:
        args.notices.append(
            "--disable_reward_dropout: without effect, as the critic has the dropout of the actor's trunk"
        )
    for model in ("reference", "reward"):
        resolve_frozen(args, f"{model}_zero_stage", f"offload_{model}_model")
    args.actor_dtype = resolve_dtype("actor_dtype", args.actor_dtype, args.actor_bf16)
    if not args.reward_is_shared:
        args.reward_dtype = resolve_dtype("reward_dtype", args.reward_dtype, args.reward_bf16)
    if critic:
        args.critic_zero_stage = args.actor_zero_stage if args.critic_zero_stage is None else args.critic_zero_stage
        args.critic_dtype = resolve_dtype("critic_dtype", args.critic_dtype or args.actor_dtype)
        args.offload_critic = args.offload_critic or args.offload
    resolve_zero_of_16_bits(args, "actor_dtype", "actor_zero_stage")
    if critic:
        resolve_zero_of_16_bits(args, "critic_dtype", "critic_zero_stage")
