"""What steps 1 and 2 do alike once the model is on its engine: train, write the model, end."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from remax.checkpoint import export, export_and_exit, note
from remax.engines import TrainedReward
from remax.finetune import FinetuneSettings, Task, finetune, total_steps
from remax.flags import FinetuneArguments
from remax.ranking import SIDES
from remax.reward_model import store_score_statistics
from remax.sentinel import TrainingStopped
from utils.distributed import print0, shutdown
from utils.metrics import MetricsLogger


def train_and_export(
    args: FinetuneArguments,
    task: Task,
    loader: DataLoader,
    settings: FinetuneSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Trains and writes model, tokenizer and results to --output_dir.

    A loss that is not finite, or a faulty row of streamed data, ends the process with status STOPPED, and the model as
    it then is lies in `last`.
    """
    output, engine = Path(args.output_dir), task.engine
    metrics = MetricsLogger(
        output,
        tensorboard_dir=args.tensorboard_dir,
        console_every=args.console_every,
        total_steps=total_steps(settings, len(loader)),
        quiet=[f"pairs_{side}" for side in SIDES],
        drop_after=-1,
    )
    try:
        results = finetune(task, loader, settings, metrics)
    except TrainingStopped as stopped:
        metrics.close()
        export_and_exit(stopped, engine.model, tokenizer, output / "last", zero3=engine.zero3)
    metrics.close()
    if isinstance(engine, TrainedReward):
        store_score_statistics(engine.model, results["after"])
    export(engine.model, tokenizer, output, zero3=engine.zero3)
    note(output, "results.json", results)
    print0(f"model written to {output}")
    shutdown()
