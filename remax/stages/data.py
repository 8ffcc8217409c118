"""From flags to data: which rows each stage reads, and in which batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from remax.cli.flags import Step1Arguments, Step2Arguments, Step3Arguments
from remax.core.batches import First
from remax.rewards.process import asked_columns
from remax.rewards.sources import reward_sources
from utils.data.batches import SupervisedBatch
from utils.data.config import DataConfig
from utils.data.loaders import build_answers_loader, build_loaders
from utils.data.raw import raw_rows
from utils.data.sources import read_splits
from utils.data.streamed_set import StreamedSet
from utils.data.streaming import build_streaming_loaders, open_streams
from utils.data.text import plain_text_batches
from utils.distributed import rank, world_size

Tokenizer = PreTrainedTokenizerBase


def data_config(
    args: Step1Arguments | Step2Arguments | Step3Arguments, record_in: str | Path | None = None
) -> DataConfig:
    """What the flags say about the data; `record_in` is the folder for data.json."""
    return DataConfig(
        data_path=args.data_path,
        sft_only_data_path=args.sft_only_data_path if isinstance(args, Step1Arguments) else (),
        columns=args.columns,
        keep=asked_columns(reward_sources((), args.reward_fn)[1]) if isinstance(args, Step3Arguments) else frozenset(),
        data_split=args.data_split,
        data_seed=args.data_seed,
        seed=args.seed,
        cache_dir=args.data_output_path,
        num_proc=args.preprocessing_num_workers,
        overlong=args.overlong,
        train_on=args.train_on if isinstance(args, Step1Arguments) else "last",
        need_margin=isinstance(args, Step2Arguments) and args.use_margin,
        best_and_worst=isinstance(args, Step2Arguments) and args.loss != "ranking",
        streaming=args.streaming,
        shuffle_buffer=args.shuffle_buffer,
        record_in=record_in,
    )


def finetune_loaders(args: Step1Arguments | Step2Arguments, tokenizer: Tokenizer) -> tuple[DataLoader, First]:
    """Training rows and held-out rows of step 1 or 2; the run's folder keeps a record of them."""
    _, train, evaluation = _open_data(
        data_config(args, args.output_dir),
        0 if isinstance(args, Step1Arguments) else 1,
        tokenizer,
        batches=args.max_steps * args.gradient_accumulation_steps,
        max_len=args.max_seq_len,
        train_batch_size=args.per_device_train_batch_size,
        eval_batch_size=args.per_device_eval_batch_size,
    )
    return train, First(evaluation, args.max_eval_batches)


def _open_data(
    config: DataConfig, stage: int, tokenizer: Tokenizer, *, batches: int, **sizes: int
) -> tuple[list[StreamedSet], DataLoader, DataLoader]:
    """The data sets that are streamed, if any, and the loaders of training and evaluation.

    The length of a training whose data is streamed is given in `batches`, which are micro-batches.
    """
    streams = open_streams(config, stage, tokenizer) if config.streaming else []
    build = partial(build_streaming_loaders, streams, batches=batches) if streams else build_loaders
    ranks = {"rank": rank(), "world_size": world_size()}
    return streams, *build(config, stage=stage, tokenizer=tokenizer, **sizes, **ranks)


def columns_of(args: Step3Arguments) -> str:
    """The columns of each data set of --data_path as its first row has them, in words."""
    found = []
    for name in args.data_path:
        shard = read_splits(name, args.data_output_path, "--data_path", args.streaming)["train"][0]
        _, row = next(raw_rows(shard, "--data_path"))
        found.append(f"{', '.join(row)} (--data_path {name})")
    return " and ".join(found)


@dataclass(frozen=True)
class PromptData:
    """What step 3 reads."""

    train: DataLoader  # prompts
    evaluation: First  # held-out prompts
    answers: First | None  # those with their chosen answers, where the data has some
    plain_text: Iterator[SupervisedBatch] | None  # endless batches for the language-modelling mix
    held_out: Dataset | None = None  # the rows of the evaluation as text, with --streaming


def load_data(args: Step3Arguments, tokenizer: Tokenizer, output: Path) -> PromptData:
    """The data of step 3; what was read is recorded in `output`."""
    longest = args.max_prompt_seq_len + args.max_answer_seq_len
    eval_batch_size = args.per_device_eval_batch_size
    config, ranks = data_config(args, output), {"rank": rank(), "world_size": world_size()}
    streams, train, evaluation = _open_data(
        config,
        2,
        tokenizer,
        batches=args.max_steps * args.rollout_batches,
        max_len=args.max_prompt_seq_len,
        train_batch_size=args.per_device_generation_batch_size,
        eval_batch_size=eval_batch_size,
    )
    held_out = [stream.held_out for stream in streams]
    answers = build_answers_loader(
        config, tokenizer, max_len=longest, batch_size=eval_batch_size, held_out=held_out or None, **ranks
    )
    plain_text = None
    if args.unsupervised_dataset_name:
        plain_text = plain_text_batches(
            args.unsupervised_dataset_name,
            configuration=args.unsupervised_dataset_config_name,
            tokenizer=tokenizer,
            block=longest,
            batch_size=args.per_device_unsupervised_batch_size,
            seed=args.seed,
            cache_dir=args.data_output_path,
            **ranks,
        )
    limit, rows = args.max_eval_batches, concatenate_datasets(held_out) if held_out else None
    return PromptData(train, First(evaluation, limit), First(answers, limit) if answers else None, plain_text, rows)
