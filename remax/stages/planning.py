"""From the flags of a stage to what it will hold in memory, and what follows from that before anything is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedConfig

from remax.cli.flags import FinetuneArguments, Step1Arguments, Step2Arguments, Step3Arguments
from remax.cli.validate import make_algorithm
from remax.models.loading import load_config, without_dropout
from remax.planning.advice import WAYS, with_graphs
from remax.planning.dry_run import Sketch, sizes
from remax.planning.phases import GIB, Job, Plan, Planned, Rows, plan
from remax.planning.states import Machine
from remax.rewards.sources import reward_sources
from remax.stages.settings import (
    LoraSpec,
    ModelSpec,
    actor_model,
    critic_adapters,
    critic_model,
    evaluated_distribution,
    finetune_model,
    finetune_reference,
    reference_model,
    reward_engine,
    sampling,
)
from utils.adapter_folder import adapter_config
from utils.run import UserError, one_line

CLEARLY = 1.1  # times the memory there is: answers may end early, and the planner may be wrong
Configs = Callable[[str, str], PreTrainedConfig]


def planned(
    spec: ModelSpec, machine: Machine, configs: Configs, *, scores: bool = False, both: bool = False
) -> Planned:
    """A model as its settings have it; `both`: a policy that has a score head, too."""
    config = configs(spec.name, spec.flag)
    if spec.disable_dropout:
        config = without_dropout(copy.deepcopy(config))
    sketch = Sketch(
        config,
        spec.engine.torch_dtype,
        scores=scores,
        checkpointing=spec.gradient_checkpointing,
        lora=None if spec.lora is None else _lora(spec, spec.lora),
        attention=spec.attn_implementation,
        cuda=machine.cuda,
    )
    return Planned(sketch, spec.engine, more=config.hidden_size if both else 0)


def _lora(spec: ModelSpec, lora: LoraSpec) -> tuple[int, str, bool]:
    """Rank, layers, and whether nothing else learns."""
    if spec.keeps_adapters:
        return int(adapter_config(spec.name, spec.flag)["r"]), "all-linear", True
    return lora.dim, lora.module_name, lora.only


def job_of(args: Step3Arguments, machine: Machine, configs: Configs = load_config) -> Job:
    """What step 3 will hold on each of the machine's ranks."""
    algorithm = make_algorithm(args)
    actor = planned(actor_model(args), machine, configs)
    reference = planned(reference_model(args), machine, configs) if args.share == "none" else None
    flag, models = "--reward_model_name_or_path", reward_sources(args.reward_model_name_or_path, [])[0]
    specs = [ModelSpec(model.name, flag, reward_engine(args), args.attn_implementation) for model in models]
    rewards = [planned(spec, machine, configs, scores=True) for spec in specs]
    critic = None
    if args.share == "all":
        own_head = actor.sketch.config.hidden_size  # the score head, and the value head
        more = own_head * (1 + algorithm.critic)
        if algorithm.critic and not args.joint_critic:
            adapters = critic_adapters(args)
            only = replace(actor.sketch, lora=(adapters.dim, adapters.module_name, True))
            more += sizes(only).trained
        actor = replace(actor, more=more)
    elif algorithm.critic:
        critic = planned(critic_model(args, models[0].name if models else ""), machine, configs, scores=True)
        if args.critic_is_reward:
            rewards = rewards[1:]
    rows = Rows(
        args.per_device_generation_batch_size,
        algorithm.samples_per_prompt,
        algorithm.greedy,
        args.per_device_training_batch_size,
        args.rollout_batches,
        args.per_device_eval_batch_size,
        args.max_prompt_seq_len,
        args.max_answer_seq_len,
        args.logprob_chunk_size,
        sampling(args),
        evaluated_distribution(args),
        algorithm.kept,
    )
    full = algorithm.kl.needs_full_kl
    return Job(
        actor,
        rows,
        machine,
        reference,
        tuple(rewards),
        critic,
        shared_critic=args.share == "all" and algorithm.critic,
        old_logprobs=algorithm.needs_old_logprobs,
        full_kl=full,
        stats_grad=algorithm.needs_entropy or (full and algorithm.kl.where == "loss"),
        average=args.enable_ema,
        synced_generation=args.zero3_generation == "synced",
        cuda_graphs=bool(args.cuda_graphs),
    )


def finetuning_job(args: FinetuneArguments, machine: Machine, configs: Configs = load_config) -> Job:
    """What step 1 or 2 will hold; a pair is two rows."""
    spec, loss = finetune_model(args), args.loss if isinstance(args, Step2Arguments) else "supervised"
    pairs = 1 if isinstance(args, Step1Arguments) else 2
    actor = planned(spec, machine, configs, scores=loss == "ranking", both=loss == "hydra")
    reference = None
    if isinstance(args, Step2Arguments) and loss in ("dpo", "r-dpo"):
        reference = planned(finetune_reference(args), machine, configs)
    rows = Rows(
        micro=pairs * args.per_device_train_batch_size,
        batches=args.gradient_accumulation_steps,
        evaluated=pairs * args.per_device_eval_batch_size,
        prompt=0,
        answer=args.max_seq_len,
    )
    return Job(actor, rows, machine, reference)


def fit_to_memory(args: Step3Arguments, ranks: int, memory: int | None) -> None:
    """Ends a training that would clearly run out of a GPU's memory, before its models are loaded.

    Where --cuda_graphs leaves it open, it is settled here: on, if what the graphs keep has room too.

    Args:
        memory: Bytes of the GPU; None: there is none.

    Raises:
        UserError: What takes how much, and which flags help.
    """
    graphs, args.cuda_graphs = args.cuda_graphs, bool(args.cuda_graphs)
    if memory is None or (args.skip_doctor and graphs is not None):
        return
    try:
        job = job_of(args, Machine(ranks, memory=memory))
        found = plan(job)
    except Exception as error:  # of a family's own code, which never ran without numbers
        args.notices.append(f"memory: no estimate for these models ({type(error).__name__}: {one_line(error)})")
        return
    if graphs is None and args.actor_zero_stage < 3:
        args.cuda_graphs = with_graphs(job, memory) is not None
        if not args.cuda_graphs:
            args.notices.append("memory: no room for CUDA graphs of the decode; --cuda_graphs takes them all the same")
    if found.peak > CLEARLY * memory and not args.skip_doctor:
        raise UserError(_what_does_not_fit(job, found, memory))


def _what_does_not_fit(job: Job, found: Plan, memory: int) -> str:
    """The largest phase, and what helps."""
    phase = max(found.phases, key=found.of)
    term = max(found.terms, key=lambda term: term.at.get(phase, 0.0))
    loads = {"critic": job.critic is not None, "reference": job.reference is not None, "reward": bool(job.rewards)}
    ways = (way for way in WAYS if plan(way.of(job)).fits(memory))
    way = next(ways, None)
    remedy = "use " + " ".join(way.flags(**loads)) if way else "use more GPUs, smaller batches, or --actor_lora_dim"
    return (
        f"memory: a GPU of {memory / GIB:.0f} GiB does not hold the {phase}, which takes {found.of(phase) / GIB:.0f} "
        f"GiB by the planner's count (most of it: {term.name}, {term.at[phase] / GIB:.0f} GiB); {remedy}; "
        "`python -m remax.plan` counts other settings, --skip_doctor tries it all the same"
    )
