"""Plain text in blocks: what step 3 mixes into its loss (--unsupervised_dataset_name), as PTX in InstructGPT."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain, count
from typing import cast

import datasets
from datasets import Dataset, Value
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from utils.data.batches import SupervisedBatch
from utils.data.cache import cache_file, fingerprint_of
from utils.data.collate import collate_supervised
from utils.data.loaders import EpochSampler, local_rank_zero_first, make_loader
from utils.data.names import DataName
from utils.data.sources import read_hub, read_splits
from utils.data.tokens import tokenizer_fingerprint
from utils.distributed import print0
from utils.run import UserError

FLAG = "--unsupervised_dataset_name"
COLUMNS = ("text", "content")
BLOCKS_VERSION = 1  # of the tokens: to be raised with every change, see tests/utils/data/test_golden.py


def plain_text_batches(
    name: str,
    *,
    configuration: str | None,
    tokenizer: PreTrainedTokenizerBase,
    block: int,
    batch_size: int,
    seed: int,
    cache_dir: str | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> EndlessLoader:
    """Endless batches of blocks of `block` tokens, in a new order every epoch; supervised batches with prompt length 1.

    The first token of a block is its context, and all others are learned; documents are joined by the EOS token.

    Raises:
        UserError: No such data, no text column, or less text than one batch on every rank.
    """
    with local_rank_zero_first():
        chosen = DataName(name, configuration)
        splits = read_hub(chosen, cache_dir, FLAG) if configuration else read_splits(name, cache_dir, FLAG)
        blocks_of = [to_blocks(shard.table, shard.place, tokenizer, block, cache_dir) for shard in splits["train"]]
    rows = datasets.concatenate_datasets(blocks_of)
    if len(rows) < batch_size * world_size:
        raise UserError(
            f"{FLAG} {name}: {len(rows)} blocks of {block} tokens are too few for {batch_size} on each of {world_size} "
            "ranks; lower --per_device_unsupervised_batch_size, or give more text"
        )
    print0(f"{FLAG} {name}: {len(rows)} blocks of {block} tokens")
    order = EpochSampler(len(rows), batch_size, rank=rank, world_size=world_size, seed=seed)
    return EndlessLoader(
        make_loader(rows, order, batch_size, partial(collate_supervised, pad_id=tokenizer.pad_token_id))
    )


class EndlessLoader:
    """The loader's batches, epoch after epoch; its state is its sampler's."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader, self.sampler = loader, cast(EpochSampler, loader.sampler)
        self.batches = self._all()

    def _all(self) -> Iterator[SupervisedBatch]:
        for epoch in count(self.sampler.epoch):  # read at the first batch, after a state was loaded
            self.sampler.set_epoch(epoch)
            yield from self.loader

    def __iter__(self) -> EndlessLoader:
        return self

    def __next__(self) -> SupervisedBatch:
        return next(self.batches)

    def state_dict(self) -> dict[str, int]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from what `state_dict` gave."""
        self.sampler.load_state_dict(state)
        self.batches = self._all()


def to_blocks(
    rows: Dataset, place: str, tokenizer: PreTrainedTokenizerBase, block: int, cache_dir: str | None
) -> Dataset:
    """Rows of text -> rows {input_ids: `block` ids, prompt_length: 1}; what remains of 1000 documents is left out."""
    column = next((c for c in COLUMNS if c in rows.column_names), None)
    if column is None:
        raise UserError(f"{FLAG}: {place} has the columns {', '.join(rows.column_names)}; expected `text`")
    kind = rows.features[column]
    if not isinstance(kind, Value) or kind.dtype not in ("string", "large_string", "null"):
        raise UserError(f"{FLAG}: {place}, column {column!r}: found {getattr(kind, 'dtype', 'lists')}, expected text")
    made_by = (BLOCKS_VERSION, column, tokenizer_fingerprint(tokenizer), "text", block)
    fingerprint = fingerprint_of(rows._fingerprint, *made_by)
    return rows.map(
        partial(blocks, column=column, tokenizer=tokenizer, block=block),
        batched=True,
        remove_columns=rows.column_names,
        new_fingerprint=fingerprint,
        cache_file_name=cache_file(cache_dir, "text", fingerprint),
        desc="Encoding plain text",
    )


def blocks(
    batch: dict[str, list[str]], *, column: str, tokenizer: PreTrainedTokenizerBase, block: int
) -> dict[str, list]:
    """Documents, tokenized and joined by EOS, in blocks of equal length."""
    texts = [text for text in batch[column] if text]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    ids = list(chain.from_iterable([*document, tokenizer.eos_token_id] for document in encoded))
    starts = range(0, len(ids) - block + 1, block)
    return {"input_ids": [ids[i : i + block] for i in starts], "prompt_length": [1 for _ in starts]}
