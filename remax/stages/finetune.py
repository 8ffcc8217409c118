"""What steps 1 and 2 do alike once the model is on its engine: train, write the model, end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from remax.checkpoint.export import export, export_and_exit, note
from remax.cli.flags import FinetuneArguments, Step1Arguments, Step2Arguments
from remax.core.batches import Batch
from remax.engines.base import FrozenEngine
from remax.engines.policy import Reference
from remax.engines.scorer import TrainedReward
from remax.evaluation.ranking import SIDES
from remax.models.policy import load_policy
from remax.models.reward_model import (
    store_score_statistics,
)
from remax.stages.models import Tokenizer, _load, _trained_policy, _trained_reward
from remax.stages.settings import (
    reference_engine,
)
from remax.training.finetune import finetune
from remax.training.loop import Cadence
from remax.training.tasks import DirectPreference, Ranking, Supervised, Task
from utils.distributed import print0, shutdown
from utils.metrics import MetricsLogger
from utils.run import TrainingStopped


def train_and_export(
    args: FinetuneArguments,
    task: Task,
    loader: DataLoader,
    cadence: Cadence,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Trains and writes model, tokenizer and results to --output_dir.

    A loss that is not finite, or a faulty row of streamed data, ends the process with status STOPPED, and the model as
    it then is lies in `last`.
    """
    output, learner = Path(args.output_dir), task.learner
    metrics = MetricsLogger(
        output,
        tensorboard_dir=args.tensorboard_dir,
        console_every=args.console_every,
        total_steps=cadence.total_steps(len(loader)),
        quiet=[f"pairs_{side}" for side in SIDES],
        drop_after=-1,
    )
    try:
        results = finetune(task, loader, cadence, metrics)
    except TrainingStopped as stopped:
        metrics.close()
        export_and_exit(stopped, learner.model, tokenizer, output / "last", zero3=learner.zero3)
    metrics.close()
    if isinstance(learner, TrainedReward):
        store_score_statistics(learner.model, results["after"])
    export(learner.model, tokenizer, output, zero3=learner.zero3)
    note(output, "results.json", results)
    print0(f"model written to {output}")
    shutdown()


def build_supervised_task(
    args: Step1Arguments, tokenizer: Tokenizer, eval_loader: Iterable[Batch], steps: int
) -> Supervised:
    """Step 1: the model on its engine, with what it learns. steps: of the optimizer."""
    return Supervised(_trained_policy(args, tokenizer, steps), eval_loader)


def build_preference_task(
    args: Step2Arguments, tokenizer: Tokenizer, eval_loader: Iterable[Batch], steps: int
) -> Ranking | DirectPreference:
    """Step 2: a reward model, or with --loss dpo a policy and its reference."""
    if args.loss == "ranking":
        return Ranking(
            _trained_reward(args, tokenizer, steps),
            eval_loader,
            use_margin=args.use_margin,
            label_smoothing=args.label_smoothing,
            centring=args.center_rewards_coefficient,
            ranked_loss=args.ranked_loss,
        )
    config = reference_engine(args)
    reference = Reference(FrozenEngine(_load(load_policy, args, config, tokenizer), config))
    alpha = args.length_alpha if args.loss == "r-dpo" else 0.0
    return DirectPreference(_trained_policy(args, tokenizer, steps), reference, eval_loader, args.dpo_beta, alpha)
