"""Steps 1 and 2 from their flags to the trained model: what is learned is a task, the rest is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from remax.checkpoint.checkpoints import Checkpoints
from remax.checkpoint.export import export, export_and_exit, refuse_without_room, write_note
from remax.cli.flags import FinetuneArguments, Step1Arguments, Step2Arguments
from remax.core.batches import First
from remax.engines.base import FrozenEngine
from remax.engines.policy import Reference, TrainedHydra
from remax.engines.scorer import TrainedReward
from remax.evaluation.ranking import SIDES
from remax.models.loading import check_length, load_config, quiet_libraries
from remax.models.policy import check_policy_config
from remax.models.reward_model import prepare_pad_token, store_score_statistics
from remax.report.stage import report_stage
from remax.stages import resume
from remax.stages.data import finetune_loaders
from remax.stages.models import Tokenizer, load_policy_model, trained_hydra, trained_policy, trained_reward
from remax.stages.settings import finetune_cadence, finetune_model, finetune_optimizer, finetune_reference
from remax.training.finetune import finetune
from remax.training.loop import Cadence
from remax.training.tasks import DirectPreference, Hydra, Ranking, Supervised
from utils.distributed import init_distributed, print0, set_seed, shutdown
from utils.metrics import MetricsLogger
from utils.run import TrainingStopped, open_folder, start_run
from utils.tokenizer import load_tokenizer


def run_finetuning(args: Step1Arguments | Step2Arguments) -> None:
    """Step 1 or 2: reads model and data, trains, and writes the model to --output_dir."""
    quiet_libraries()
    name, flag = args.model_name_or_path, "--model_name_or_path"
    config = load_config(name, flag)
    check_length(config, args.max_seq_len, "--max_seq_len")
    if isinstance(args, Step1Arguments) or args.loss != "ranking":
        check_policy_config(config, name, flag)
    tokenizer = load_tokenizer(args.model_name_or_path, chat_template=args.chat_template)
    if isinstance(args, Step2Arguments) and args.loss in ("ranking", "hydra"):
        prepare_pad_token(tokenizer)
    init_distributed(args.local_rank)
    set_seed(args.seed)
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    output = open_folder(args.output_dir)
    if resume.complete(args, output):
        print0(f"the run in {output} has come to its end: nothing is left to do")
        return shutdown()
    found = resume.find(args, output)
    for notice in args.notices:
        print0(notice)

    train_loader, held_out = finetune_loaders(args, tokenizer)
    cadence, checkpoints = finetune_cadence(args), resume.checkpoints(args, output, found)
    task = build_task(args, tokenizer, held_out, cadence.total_steps(len(train_loader)))
    train_and_export(args, task, train_loader, cadence, tokenizer, checkpoints)


def build_task(
    args: Step1Arguments | Step2Arguments, tokenizer: Tokenizer, held_out: First, steps: int
) -> Supervised | Ranking | Hydra | DirectPreference:
    """What the flags say is learned, with its models loaded; `steps` are the optimizer's."""
    trained, optimizer = finetune_model(args), finetune_optimizer(args, steps)
    if isinstance(args, Step1Arguments):
        return Supervised(trained_policy(trained, optimizer, tokenizer, args.max_seq_len), held_out)
    of_pairs: dict[str, Any] = {
        "use_margin": args.use_margin,
        "label_smoothing": args.label_smoothing,
        "centring": args.center_rewards_coefficient,
    }
    if args.loss == "ranking":
        reward = trained_reward(trained, optimizer, tokenizer, args.max_seq_len)
        return Ranking(reward, held_out, ranked_loss=args.ranked_loss, **of_pairs)
    if args.loss == "hydra":
        both = trained_hydra(trained, optimizer, tokenizer, args.max_seq_len)
        return Hydra(both, held_out, args.ranking_weight, **of_pairs)
    frozen = finetune_reference(args)
    reference = Reference(FrozenEngine(load_policy_model(frozen, tokenizer), frozen.engine))
    policy = trained_policy(trained, optimizer, tokenizer, args.max_seq_len)
    alpha = args.length_alpha if args.loss == "r-dpo" else 0.0
    return DirectPreference(policy, reference, held_out, args.dpo_beta, alpha, args.label_smoothing)


def train_and_export(
    args: FinetuneArguments,
    task: Supervised | Ranking | Hydra | DirectPreference,
    loader: DataLoader,
    cadence: Cadence,
    tokenizer: Tokenizer,
    checkpoints: Checkpoints,
) -> None:
    """Trains and writes model, tokenizer and results to --output_dir.

    A loss that is not finite, or a faulty row of streamed data, ends the process with status STOPPED, and the model as
    it then is lies in `last`.
    """
    output, learner = Path(args.output_dir), task.learner
    refuse_without_room(learner.model, output)
    resumed = checkpoints.found.step if checkpoints.found else None
    start_run(output, args, args.stage, resumed)
    metrics = MetricsLogger(
        output,
        tensorboard_dir=args.tensorboard_dir,
        wandb=vars(args) if "wandb" in args.reports else None,
        console_every=args.console_every,
        total_steps=cadence.total_steps(len(loader)),
        quiet=[*(f"pairs_{side}" for side in SIDES), *(f"seconds_{part}" for part in ("data", "update", "rest"))],
        drop_after=-1 if resumed is None else resumed,
    )
    try:
        results = finetune(task, loader, cadence, metrics, checkpoints, tokenizer.decode)
    except TrainingStopped as stopped:
        metrics.remark("stopped", str(stopped))
        metrics.close()
        report_stage(output)
        export_and_exit(stopped, learner.model, tokenizer, output / "last", zero3=learner.zero3)
    metrics.close()
    if isinstance(learner, (TrainedReward, TrainedHydra)):
        store_score_statistics(learner.model, results["after"])
    export(learner.model, tokenizer, output, zero3=learner.zero3)
    write_note(output, "results.json", results)
    if not isinstance(task, Supervised) and task.calibration:
        write_note(output, "calibration.json", {"bins": task.calibration})
    report_stage(output)
    print0(f"model written to {output}")
    shutdown()
