"""From flags to the batches of a stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader

from remax.cli.flags import FinetuneArguments, Step1Arguments, Step2Arguments, Step3Arguments
from remax.core.batches import Batch, First
from remax.stages.models import Tokenizer
from utils.data.loaders import build_answers_loader, build_loaders
from utils.data.streamed_set import StreamedSet
from utils.data.streaming import build_streaming_loaders, open_streams
from utils.data.text import plain_text_batches
from utils.distributed import rank, world_size


def finetune_loaders(
    args: Step1Arguments | Step2Arguments, tokenizer: Tokenizer, stage: int
) -> tuple[DataLoader, First]:
    """Training rows and held-out rows of stage 0 (step 1) or 1 (step 2); what was read is recorded in the run's
    folder.
    """
    if isinstance(args, Step1Arguments):
        of_this_stage = {"sft_only_data_path": args.sft_only_data_path, "train_on": args.train_on}
    else:
        of_this_stage = {"need_margin": args.use_margin, "best_and_worst": args.loss != "ranking"}
    _, train, evaluation = _open_data(
        args,
        stage,
        tokenizer,
        args.output_dir,
        batches=args.max_steps * args.gradient_accumulation_steps,
        max_len=args.max_seq_len,
        train_batch_size=args.per_device_train_batch_size,
        **of_this_stage,
    )
    return train, First(evaluation, args.max_eval_batches)


def _open_data(
    args: FinetuneArguments | Step3Arguments,
    stage: int,
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    batches: int,
    sft_only_data_path: Sequence[str] = (),
    **of_this_stage,
) -> tuple[list[StreamedSet] | None, DataLoader, DataLoader]:
    """The data sets where they are streamed, else None; the loaders of training and evaluation.

    batches: micro-batches of a training whose data are streamed.   of_this_stage: see `build_loaders`.
    """
    options = of_this_stage | {
        "stage": stage,
        "tokenizer": tokenizer,
        "data_split": args.data_split,
        "eval_batch_size": args.per_device_eval_batch_size,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "rank": rank(),
        "world_size": world_size(),
        "overlong": args.overlong,
        "record_in": output,
    }
    reading = {
        "data_path": args.data_path,
        "sft_only_data_path": sft_only_data_path,
        "data_output_path": args.data_output_path,
        "columns": args.columns,
    }
    if not args.streaming:
        return None, *build_loaders(**options, **reading, num_proc=args.preprocessing_num_workers)
    streams = open_streams(stage, tokenizer, **reading)
    options |= {"shuffle_buffer": args.shuffle_buffer, "batches": batches}
    return streams, *build_streaming_loaders(streams, **options)


@dataclass(frozen=True)
class PromptData:
    """What step 3 reads.

    train: prompts.   evaluation: held-out prompts.   answers: those with their chosen answers, where the data has some.
    plain_text: endless batches for the language-modelling mix, where asked for.   streams: the data sets, with
    --streaming.
    """

    train: DataLoader
    evaluation: First
    answers: First | None
    plain_text: Iterator[Batch] | None
    streams: list[StreamedSet] | None = None


def load_data(args: Step3Arguments, tokenizer: Tokenizer, output: Path) -> PromptData:
    """The data of step 3; what was read is recorded in `output`."""
    longest = args.max_prompt_seq_len + args.max_answer_seq_len
    streams, train, evaluation = _open_data(
        args,
        2,
        tokenizer,
        output,
        batches=args.max_steps * args.rollout_batches,
        max_len=args.max_prompt_seq_len,
        train_batch_size=args.per_device_generation_batch_size,
    )
    ranks = {"rank": rank(), "world_size": world_size(), "data_output_path": args.data_output_path}
    answers = build_answers_loader(
        tokenizer=tokenizer,
        data_path=args.data_path,
        max_len=longest,
        batch_size=args.per_device_eval_batch_size,
        num_proc=args.preprocessing_num_workers,
        columns=args.columns,
        held_out=[stream.held_out for stream in streams] if streams else None,
        **ranks,
    )
    plain_text = None
    if args.unsupervised_dataset_name:
        plain_text = plain_text_batches(
            args.unsupervised_dataset_name,
            configuration=args.unsupervised_dataset_config_name,
            tokenizer=tokenizer,
            block=longest,
            batch_size=args.per_device_training_batch_size,
            seed=args.seed,
            **ranks,
        )
    limit = args.max_eval_batches
    answers = First(answers, limit) if answers else None
    return PromptData(train, First(evaluation, limit), answers, plain_text, streams)
