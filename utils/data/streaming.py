"""Training rows straight from their files or from the hub (--streaming), for data that is larger than the disk.

Nothing is written, and memory does not grow with the data: each data set is read from its beginning in every epoch,
converted and encoded in chunks by the functions that stored data uses, blended, and shuffled in a buffer. The loaders
are like those of `loaders`, except that the length of an epoch is unknown.
"""

import copy
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from utils.data import loaders
from utils.data.config import DataConfig
from utils.data.encoding import FEATURES, Encoder, Names, encode_rows, to_columns
from utils.data.loaders import ResumableSampler
from utils.data.report import as_record, count_dropped, cut_record, report_dropped, report_encoding
from utils.data.shapes import Row
from utils.data.splits import stage_shares
from utils.data.streamed_set import TOGETHER, Counts, StreamedSet, as_data_set, open_stream
from utils.distributed import print0
from utils.run import UserError


@dataclass(frozen=True)
class StreamedStage:
    """The training rows of one stage, and the report of what has become of those that were read.

    The report is printed when the first epoch or the training ends; data.json is kept up to date.
    """

    config: DataConfig
    stage: int
    encoder: Encoder
    streams: Sequence[StreamedSet]
    evaluation: list[dict]  # what data.json says about the rows to evaluate
    eval_rows: int

    def nothing_yet(self) -> list[Counts]:
        """Counts of an epoch that begins."""
        return [Counts() for _ in self.streams]

    def unshuffled(self, counts: Sequence[Counts]) -> Iterator[Row]:
        """The blended rows of an epoch."""
        rows = [self.encoded(stream, c) for stream, c in zip(self.streams, counts, strict=True)]
        return blended(rows, [stream.weight for stream in self.streams])

    @property
    def kept(self) -> dict[str, None]:
        """The columns that are kept, of all data sets, whose rows share batches."""
        return dict.fromkeys(name for stream in self.streams for name in stream.conversion.kept)

    def open_epoch(self, epoch: int) -> Iterator[Row]:
        """The rows of an epoch, the same on every rank; the first one is reported."""
        rows = self.unshuffled(counts := self.nothing_yet())
        return shuffled(
            rows if epoch else self.watch(rows, counts), self.config.shuffle_buffer, self.config.seed, epoch
        )

    def encoded(self, stream: StreamedSet, counts: Counts) -> Iterator[Row]:
        """The encoded training rows of a data set, in the order of its texts."""
        shares = stage_shares(self.config.data_split)
        texts = stream.training_texts(self.stage, shares, self.config.data_seed, counts)
        wanted = set(FEATURES[self.encoder.kind]) - {"left_out"}  # the same for all data sets, whose rows share batches
        wanted -= {"loss_mask"} if self.encoder.train_on != "all" else set()
        wanted -= {"margin"} if not self.config.need_margin else set()
        kept = self.kept if self.encoder.kind == "prompts" else {}
        wanted |= set(kept)
        while chunk := list(islice(texts, TOGETHER)):
            encoded = self.encoder.encode(to_columns(chunk))
            for k in [k for k, text in enumerate(chunk) if self.counted(k, text, encoded, counts)]:
                yield kept | {name: compact(name, encoded[name][k]) for name in encoded if name in wanted}

    def counted(self, k: int, text: Row, encoded: dict[str, list], counts: Counts) -> bool:
        """Counts row k of an encoded chunk, which was this text, and says whether it is kept."""
        counts.encoded += 1
        counts.longest = max(counts.longest, encoded["full_length"][k])
        if encoded["dropped"][k]:
            count_dropped(counts.unusable, encoded["dropped"][k], text["origin"])
            return False
        for fate in ("cut", "prompt_cut", "left_out"):
            if fate in encoded and encoded[fate][k]:
                count_dropped(counts.cut, fate, text["origin"])
        counts.left_out += encoded["left_out"][k] if "left_out" in encoded else 0
        counts.kept += 1
        return True

    def watch(self, rows: Iterator[Row], counts: Sequence[Counts]) -> Iterator[Row]:
        """The rows; data.json is written each time the number of rows read has doubled, and at the end."""
        complete, due = False, 1
        try:
            for row in rows:
                if (read := sum(c.read for c in counts)) >= due:
                    self.write(counts, complete)
                    due = 2 * read
                yield row
            complete = True
        finally:
            self.print(counts, complete)
            self.write(counts, complete)

    def print(self, counts: Sequence[Counts], complete: bool) -> None:
        """What has become of the rows of each data set."""
        for stream, c in zip(self.streams, counts, strict=True):
            name, part = f"{stream.flag} {stream.name}", "train" if complete else "train, so far"
            what, step = f"{name} ({part})", f"step {self.stage + 1}"
            print0(f"{what}: {c.read} rows read, {c.kept} of them for {step}")
            report_dropped(what, c.dropped, c.read)
            report_dropped(f"{name} ({part}, {step})", c.unusable, c.encoded)
            limit = f"{loaders.LENGTH_FLAGS[self.stage]} {self.encoder.max_len}"
            report_encoding(what, limit, c.cut, c.left_out, c.longest, c.encoded)

    def write(self, counts: Sequence[Counts], complete: bool) -> None:
        data = [self.entry(stream, c) for stream, c in zip(self.streams, counts, strict=True)]
        record = {
            **{"streaming": True, "shuffle_buffer": self.config.shuffle_buffer, "eval_rows": self.eval_rows},
            **{"first_epoch_complete": complete, "data": data + self.evaluation},
        }
        loaders.write_record(self.config, self.stage, self.encoder.tokenizer, record)

    def entry(self, stream: StreamedSet, c: Counts) -> dict[str, Any]:
        """Of data.json, for one data set; fingerprint: of the usable rows that were read."""
        used = {"kind": self.encoder.kind, "max_len": self.encoder.max_len, **self.encoder.options}
        return {
            **{"data": f"{stream.flag} {stream.name}", "split": "train", "shape": stream.conversion.shape, **used},
            **{"fingerprint": c.digest.hexdigest(), "rows": c.read, "dropped": as_record(c.dropped)},
            **{"held_out": c.held_out, "of_other_stages": c.other_stages, "of_this_stage": c.encoded},
            **{"unusable": as_record(c.unusable), "kept": c.kept},
            **cut_record(self.encoder.kind, c.cut, c.left_out),
        }


def compact(name: str, value: Any) -> Any:
    """Token ids in four bytes each, masks in one: the shuffle buffer holds many."""
    if name == "answers_ids":
        return [np.asarray(ids, dtype=np.int32) for ids in value]
    if name.endswith("_ids"):
        return np.asarray(value, dtype=np.int32)
    return np.asarray(value, dtype=bool) if name == "loss_mask" and value is not None else value


def blended(streams: Sequence[Iterator[Row]], weights: Sequence[float | None]) -> Iterator[Row]:
    """Rows of several data sets in turn, at every moment in the proportions of the weights.

    It ends with the data set that ends first, since the proportions cannot be kept after that. Without weights all data
    sets take equal turns as long as they have rows, and it ends with the last.
    """
    given = [weight for weight in weights if weight is not None]
    weighted = len(given) == len(weights)
    shares = [weight / sum(given) for weight in given] if weighted else [1 / len(weights)] * len(weights)
    taken = [0] * len(streams)
    unfinished = list(range(len(streams)))
    while unfinished:
        k = max(unfinished, key=lambda k: shares[k] * (sum(taken) + 1) - taken[k])
        row = next(streams[k], None)
        if row is not None:
            taken[k] += 1
            yield row
        elif weighted:
            return
        else:
            unfinished.remove(k)


def shuffled(rows: Iterator[Row], size: int, *seed: int) -> Iterator[Row]:
    """Draws each row from a buffer of `size` rows, which is filled up from the stream."""
    random = np.random.RandomState([part % 2**32 for part in seed])  # the same stream in every numpy version
    buffer = list(islice(rows, size))
    for row in rows:
        k = random.randint(len(buffer))
        yield buffer[k]
        buffer[k] = row
    for k in random.permutation(len(buffer)):
        yield buffer[k]


class StreamSampler(ResumableSampler):
    """One rank's rows themselves, not their indices. Every rank goes through the whole stream.

    To continue from a state, the epoch is read again from its beginning, and what follows the state is drawn.
    `open_epoch` gives the rows of an epoch, the same on every rank; `batches` is what the whole training takes.
    """

    def __init__(
        self, open_epoch: Callable[[int], Iterator[Row]], batch_size: int, batches: int, *, rank: int, world_size: int
    ) -> None:
        super().__init__(rank=rank, world_size=world_size)
        self.open_epoch, self.batch_size, self.batches = open_epoch, batch_size, batches
        self.digest = hashlib.blake2b(digest_size=12)  # of all ranks' rows in this epoch
        self.expected: dict[str, Any] = {}  # the state that this run goes on from

    def rows(self) -> Iterator[Row]:
        rows = self.open_epoch(self.epoch)
        global_batch, count = self.batch_size * self.world_size, 0
        self.digest = hashlib.blake2b(digest_size=12)
        while len(step := list(islice(rows, global_batch))) == global_batch:
            for row in step:
                add_row(self.digest, row)
                count += 1
                if count == self.expected.get("position"):
                    self.compare()
            yield from step[self.rank :: self.world_size]

    def compare(self) -> None:
        """Refuses, where the state is reached that this run goes on from, rows that are not those of before."""
        expected, self.expected = self.expected, {}
        if self.epoch == expected["epoch"] and self.digest.hexdigest() != expected["digest"]:
            raise UserError(
                f"the first {expected['position']} rows of epoch {self.epoch + 1} are not those that were read before "
                "the checkpoint; give back the data as it was, or start afresh"
            )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "digest": self.digest.hexdigest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.expected = state

    def __len__(self) -> int:
        return self.batches * self.batch_size


def add_row(digest: Any, row: Row) -> None:
    """Takes in everything that a row holds."""
    for name, value in row.items():
        whole = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
        digest.update(name.encode() + whole)


class RowsThemselves(torch.utils.data.Dataset):
    """The data set for a sampler that draws rows, not their indices: passes them on with weight 1."""

    def __getitems__(self, rows: list[Row]) -> list[Row]:
        return [{**row, "weight": 1.0} for row in rows]


def open_streams(config: DataConfig, stage: int, tokenizer: PreTrainedTokenizerBase) -> list[StreamedSet]:
    """The data sets of one stage.

    Raises:
        UserError: See `data_sources` and `open_stream`.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    form = loaders.form_of(config, tokenizer)
    sources, weights = loaders.data_sources(config, stage)
    return [
        open_stream(name, weight, cache_dir=config.cache_dir, flag=flag, form=form)
        for (flag, name), weight in zip(sources, weights, strict=True)
    ]


def build_streaming_loaders(
    streams: Sequence[StreamedSet],
    config: DataConfig,
    *,
    stage: int,
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    train_batch_size: int,
    eval_batch_size: int,
    batches: int,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[DataLoader, DataLoader]:
    """Like `loaders.build_loaders`, which explains the arguments, for the data sets of `open_streams`.

    The length of the train loader is `batches`, that of the whole training, since that of an epoch is unknown.

    Raises:
        UserError: The first rows are of no use to this stage, or fewer rows than one step takes; a faulty row only when
            it is reached.
    """
    first = [first_texts(stream, config, stage) for stream in streams]
    kind = loaders.kind_of(config, stage, (*first, *(stream.held_out for stream in streams)))
    own = copy.deepcopy(tokenizer)  # rows are encoded in a thread, while others use the tokenizer
    encoder = Encoder(kind, own, max_len, config.overlong, config.train_on)
    encode = partial(encode_rows, encoder=encoder, cache_dir=None, in_memory=True)
    held_out: list[Dataset] = []
    record: list[dict[str, Any]] = []
    columns: set[str] = set()
    for stream, rows in zip(streams, first, strict=True):
        called = f"{stream.flag} {stream.name}", loaders.LENGTH_FLAGS[stage]
        columns |= set(encode(rows, names=Names(f"train, the first {len(rows)} rows", *called)).column_names)
        held_out.append(encode(stream.held_out, names=Names("eval", *called), record=record))
    loaders.check_margins(config, kind, columns, "none of the first rows")
    evaluation = datasets.concatenate_datasets(held_out)
    of_stage = StreamedStage(config, stage, encoder, streams, record, len(evaluation))
    first_batch = islice(of_stage.unshuffled(of_stage.nothing_yet()), train_batch_size * world_size)
    loaders.check_fills_a_batch(sum(1 for _ in first_batch), stage, train_batch_size, world_size)
    of_stage.write(of_stage.nothing_yet(), complete=False)
    collate = partial(loaders.COLLATORS[kind], pad_id=tokenizer.pad_token_id)
    order = StreamSampler(of_stage.open_epoch, train_batch_size, batches, rank=rank, world_size=world_size)
    options: dict[str, Any] = {"collate_fn": collate, "generator": torch.Generator()}
    train = DataLoader(RowsThemselves(), train_batch_size, sampler=order, **options)
    in_turn = loaders.eval_order(len(evaluation), rank, world_size)
    return train, loaders.make_loader(evaluation, in_turn, eval_batch_size, collate)


def first_texts(stream: StreamedSet, config: DataConfig, stage: int) -> Dataset:
    """The first rows of a stage, so that their faults are refused, and reported, before anything else happens."""
    counts, shares = Counts(), stage_shares(config.data_split)
    texts = list(islice(stream.training_texts(stage, shares, config.data_seed, counts), TOGETHER))
    if not texts:
        raise UserError(
            f"--data_split {config.data_split}: {stream.name} has no row for step {stage + 1} among {counts.read}; "
            "give it a larger share, or more data"
        )
    return as_data_set(texts)
