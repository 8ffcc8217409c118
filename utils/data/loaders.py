"""Encoded rows -> padded batches for every rank.

With the same global batch, a step has the same set of rows on any number of ranks. Their order depends on the seed and
the epoch alone, and nothing is drawn from the global random generators, so that a run can continue exactly where
another one stopped.
"""

import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from utils.data.cache import fingerprint_of
from utils.data.chat import template_of
from utils.data.collate import collate_prompts, collate_ranked, collate_ranking, collate_supervised
from utils.data.config import DataConfig
from utils.data.encoding import ENCODING_VERSION, Encoder, Names, encode_rows, has_rankings
from utils.data.names import parse_name
from utils.data.preferences import READING_VERSION, load_data_set
from utils.data.shapes import Form
from utils.data.splits import blend, prompt_keys, stage_indices, stage_shares
from utils.data.tokens import tokenizer_fingerprint
from utils.distributed import barrier, print0
from utils.distributed import rank as this_rank
from utils.run import UserError

KINDS = ("supervised", "ranking", "prompts")
LENGTH_FLAGS = ("--max_seq_len", "--max_seq_len", "--max_prompt_seq_len")
COLLATORS = {
    "supervised": collate_supervised,
    "ranking": collate_ranking,
    "ranked": collate_ranked,
    "prompts": collate_prompts,
}
# Of which rows serve what and their order: to be raised with every change, see tests/utils/data/test_golden.py
ORDER_VERSION = 1
REMIND_AFTER = 300.0  # seconds
BATCH_FLAGS = ("--per_device_train_batch_size", "--per_device_train_batch_size", "--per_device_generation_batch_size")


def build_loaders(
    config: DataConfig,
    *,
    stage: int,
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    train_batch_size: int,
    eval_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[DataLoader, DataLoader]:
    """The loaders (train, eval) of one stage on one rank.

    Each data set is split over the stages on its own, by whole prompts, and then blended with the others by the weights
    in their names. Its eval rows serve every stage: nothing is trained on them. Where some row of the data has several
    ranked answers, the batches of stage 1 are those of `collate_ranked`, unless `config.best_and_worst` is set.

    Args:
        stage: 0 supervised, 1 ranking, 2 prompts.
        max_len: Tokens; of prompt and answer together (stages 0 and 1) or of the prompt (stage 2).
        train_batch_size: Rows per rank; so is eval_batch_size.

    Returns:
        train_loader: Call `train_loader.sampler.set_epoch(epoch)` before each epoch; `sampler.state_dict()` is its
            position.
        eval_loader: The same number of batches on every rank, in a fixed order; filler rows have weight 0.

    Raises:
        UserError: See `load_data_set` and `encode_rows`; or fewer training rows than one step takes.
    """
    with local_rank_zero_first():
        kind, train, evaluation, record = encode_data_sets(config, stage, tokenizer, max_len)
    check_margins(config, kind, train.column_names, "no row of the data")
    print0(f"step {stage + 1}: {len(train)} rows to train, {len(evaluation)} to evaluate")
    counts = {"train_rows": len(train), "eval_rows": len(evaluation)}
    write_record(config, stage, tokenizer, {**counts, "data": record})
    check_fills_a_batch(len(train), stage, train_batch_size, world_size)
    collate = partial(COLLATORS[kind], pad_id=tokenizer.pad_token_id)
    order = EpochSampler(len(train), train_batch_size, rank=rank, world_size=world_size, seed=config.seed)
    in_turn = eval_order(len(evaluation), rank, world_size)
    evaluate = make_loader(evaluation, in_turn, eval_batch_size, collate)
    return make_loader(train, order, train_batch_size, collate), evaluate


def build_answers_loader(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_len: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    held_out: Sequence[Dataset] | None = None,
) -> DataLoader | None:
    """Held-out prompts with their chosen answers, for the perplexity in stage 2; None where the data has prompts only.

    The arguments and batches are like those of `build_loaders` for stage 0. `held_out` are the rows to evaluate of each
    data set, where they have been read already.
    """
    prepared: dict[str, Any] = {"cache_dir": config.cache_dir, "num_proc": config.num_proc}
    form, encoder, encoded = form_of(config, tokenizer), Encoder("supervised", tokenizer, max_len), []
    with local_rank_zero_first():
        for k, name in enumerate(config.data_path):
            rows = held_out[k] if held_out else load_data_set(name, announce=False, form=form, **prepared)[1]
            if rows.with_format("arrow")["chosen"][:].null_count < len(rows):
                names = Names("eval", f"--data_path {name}", "--max_prompt_seq_len + --max_answer_seq_len")
                encoded.append(encode_rows(rows, encoder, names=names, in_memory=held_out is not None, **prepared))
    if not encoded:
        return None
    rows = datasets.concatenate_datasets(encoded)
    collate = partial(collate_supervised, pad_id=tokenizer.pad_token_id)
    return make_loader(rows, eval_order(len(rows), rank, world_size), batch_size, collate)


def encode_data_sets(
    config: DataConfig, stage: int, tokenizer: PreTrainedTokenizerBase, max_len: int
) -> tuple[str, Dataset, Dataset, list[dict]]:
    """All data sets of one stage, encoded and blended.

    Returns:
        The kind of the rows, those to train on, those to evaluate, and what data.json says about them.
    """
    sources, weights = data_sources(config, stage)
    record: list[dict] = []
    prepared: dict[str, Any] = {"cache_dir": config.cache_dir, "num_proc": config.num_proc, "record": record}
    form = form_of(config, tokenizer)
    loaded = [load_data_set(name, flag=flag, form=form, **prepared) for flag, name in sources]
    kind = kind_of(config, stage, (rows for splits in loaded for rows in splits))
    encoder = Encoder(kind, tokenizer, max_len, config.overlong, config.train_on)
    encoded: dict[str, list[Dataset]] = {"train": [], "eval": []}
    for (flag, name), (train, evaluation) in zip(sources, loaded, strict=True):
        if flag == "--data_path":
            prompts = list(prompt_keys(train))
            of_stage = train.select(stage_indices(prompts, config.data_split, stage, config.data_seed, name))
            print0(f"{flag} {name}: {share_of_stage(of_stage, train, stage, config.data_split)}")
            train = of_stage
        for split, rows in (("train", train), ("eval", evaluation)):
            names = Names(split, f"{flag} {name}", LENGTH_FLAGS[stage])
            encoded[split].append(encode_rows(rows, encoder, names=names, **prepared))
    given = [weight for weight in weights if weight is not None]
    if len(sources) > 1 and len(given) == len(weights):
        rows_of = blend([len(rows) for rows in encoded["train"]], given, config.data_seed)
        for k, ((flag, name), indices) in enumerate(zip(sources, rows_of, strict=True)):
            total = len(encoded["train"][k])
            print0(f"{flag} {name}: {len(indices)} of {total} rows in the blend")
            used = {"data": f"{flag} {name}", "blend": len(indices), "of": total}
            record.append({**used, "fingerprint": fingerprint_of(indices)})
            encoded["train"][k] = encoded["train"][k].select(indices)
    train, evaluation = (datasets.concatenate_datasets(encoded[split]) for split in ("train", "eval"))
    return kind, train, evaluation, record


def share_of_stage(of_stage: Dataset, train: Dataset, stage: int, data_split: str) -> str:
    """How many of the training rows of a data set serve a stage; what to do where the others would serve none."""
    share = f"{len(of_stage)} of {len(train)} training rows are for step {stage + 1} (--data_split {data_split})"
    rest = [k + 1 for k, other in enumerate(stage_shares(data_split)) if other and k != stage]
    pairs = has_rankings(train) or train.with_format("arrow")["rejected"][:].null_count < len(train)
    if stage or not rest or pairs:
        return share
    idle = " and ".join(f"step {k}" for k in rest)
    return (
        f"{share}; the others are kept for {idle}: where the data is for step 1 alone, --sft_only_data_path in place "
        "of --data_path takes all of them"
    )


def form_of(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Form:
    """Lists of messages are written by the tokenizer's chat template where it has one."""
    return Form(config.columns, template_of(tokenizer), config.keep)


def kind_of(config: DataConfig, stage: int, data_sets: Iterable[Dataset]) -> str:
    """The kind of a stage's rows, which in stage 1 depends on the data; see `Encoder`."""
    ranked = stage == 1 and not config.best_and_worst and any(map(has_rankings, data_sets))
    return "ranked" if ranked else KINDS[stage]


def check_margins(config: DataConfig, kind: str, columns: Collection[str], who: str) -> None:
    """Refuses --use_margin for ranked answers, and for rows without margins."""
    if config.need_margin and kind == "ranked":
        raise UserError("--use_margin: the data ranks several answers to a prompt, without margins; leave the flag out")
    if config.need_margin and "margin" not in columns:
        raise UserError(f"--use_margin: {who} has a number in a column `margin`; leave the flag out")


def check_fills_a_batch(n_rows: int, stage: int, train_batch_size: int, world_size: int) -> None:
    """Refuses fewer training rows than one step takes."""
    if n_rows < train_batch_size * world_size:
        raise UserError(
            f"{BATCH_FLAGS[stage]} {train_batch_size}: {n_rows} training rows are too few for one batch of "
            f"{train_batch_size * world_size} on {world_size} rank{'s' * (world_size > 1)}; lower it, or give more data"
        )


def data_sources(config: DataConfig, stage: int) -> tuple[list[tuple[str, str]], list[float | None]]:
    """The flag and name of each data set of a stage, and the weights: all of them have one, or none.

    Raises:
        UserError: Some have a weight and some have none.
    """
    sources = [("--data_path", name) for name in config.data_path]
    if stage == 0:
        sources += [("--sft_only_data_path", name) for name in config.sft_only_data_path]
    weights = [parse_name(name, flag).weight for flag, name in sources]
    if None in weights and any(weights):
        raise UserError(f"{sources[weights.index(None)][0]}: give each data set a weight (name:0.3), or none")
    return sources, weights


def write_record(config: DataConfig, stage: int, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]) -> None:
    """Writes data.json, where it is wanted, on rank 0: equal for two runs that are given the same batches."""
    if config.record_in is None or this_rank() != 0:
        return
    split = {"stage": stage, "data_split": config.data_split, "data_seed": config.data_seed, "order_seed": config.seed}
    template = template_of(tokenizer)
    made_by = {
        "tokenizer": {
            "name": tokenizer.name_or_path,
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "chat_template": fingerprint_of(template.state()) if template else None,
        },
        "code": {"reading": READING_VERSION, "encoding": ENCODING_VERSION, "order": ORDER_VERSION},
    }
    folder = Path(config.record_in)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**split, **record, **made_by}, indent=2, ensure_ascii=False)
    (folder / "data.json").write_text(text + "\n", encoding="utf-8")


@contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Lets the first rank of each machine run the block alone and fill the cache; the others follow and find it full.

    An error on the first rank lets the others continue, into the same error.

    Raises:
        UserError: A rank has waited for as long as the process group allows.
    """
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    done = threading.Event()

    def remind() -> None:  # a process group may end a rank that waits too long
        for k in count(1):
            if done.wait(REMIND_AFTER):
                return
            print(waiting(k * REMIND_AFTER), flush=True)

    if not first:
        threading.Thread(target=remind, daemon=True).start()
        try:
            barrier()
        except RuntimeError as error:
            raise UserError(f"{waiting(None)} ({' '.join(str(error).split())[:200]})") from error
        finally:
            done.set()
    try:
        yield
    finally:
        if first:
            barrier()


def waiting(seconds: float | None) -> str:
    """The message of a rank that has waited so long for the data, or in vain (None)."""
    so_far = "in vain" if seconds is None else f"for {seconds / 60:.0f} minutes"
    return (
        f"rank {this_rank()} has waited {so_far} for the first rank of its machine to prepare the data; it waits up to "
        "DEEPSPEED_TIMEOUT minutes (30): set that environment variable higher, use --preprocessing_num_workers, or run "
        "once on one process to fill the cache"
    )


class ResumableSampler(Sampler, ABC):
    """The training rows of one rank, in an order that depends on the epoch.

    Step s takes rows s * G .. (s + 1) * G of that order, G the global batch; the ranks take turns among them. The
    incomplete last step is left out. The state is the epoch, and how many rows all ranks together have drawn in it: it
    is the same on every rank, and valid on another number of ranks too.
    """

    def __init__(self, *, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.epoch = self.drawn = self.resume_at = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's order; a new epoch starts at its first row."""
        if epoch != self.epoch:
            self.epoch, self.drawn, self.resume_at = epoch, 0, 0

    @abstractmethod
    def rows(self) -> Iterator[Any]:
        """This rank's rows of the whole epoch."""

    def __iter__(self) -> Iterator[Any]:
        """This rank's rows of the epoch, from where a loaded state left off."""
        start, self.resume_at = self.resume_at, 0
        for k, row in enumerate(islice(self.rows(), start, None), start):
            self.drawn = k + 1
            yield row

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the position in it, in rows of all ranks."""
        return {"epoch": self.epoch, "position": self.drawn * self.world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lets the next iteration continue at this state; later ones start at the epoch's first row."""
        self.epoch = state["epoch"]
        self.drawn = self.resume_at = state["position"] // self.world_size


class EpochSampler(ResumableSampler):
    """The indices of stored rows, shuffled with `seed`."""

    def __init__(self, n_rows: int, batch_size: int, *, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        super().__init__(rank=rank, world_size=world_size)
        self.n_rows, self.seed = n_rows, seed
        self.rows_per_rank = n_rows // (batch_size * world_size) * batch_size

    def rows(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed % 2**40 << 20) + self.epoch)
        order = torch.randperm(self.n_rows, generator=generator).tolist()
        return iter(order[self.rank :: self.world_size][: self.rows_per_rank])

    def __len__(self) -> int:
        return self.rows_per_rank


def eval_order(n_rows: int, rank: int = 0, world_size: int = 1) -> range:
    """One rank's indices of all rows in order, which the ranks take in turn.

    Indices beyond the last row are fillers, so that all ranks have equally many.
    """
    return range(rank, -(-n_rows // world_size) * world_size, world_size)


class WeightedRows(torch.utils.data.Dataset):
    """Rows with a weight: 1, and 0 for the filler rows at indices beyond the last one."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        n = len(self.rows)
        batch = self.rows[[i % n for i in indices]]
        return [{name: batch[name][k] for name in batch} | {"weight": float(i < n)} for k, i in enumerate(indices)]


def make_loader(rows: Dataset, sampler: Iterable, batch_size: int, collate: Callable[..., Any]) -> DataLoader:
    """A loader in this process, with its own generator, since a DataLoader would draw a seed from the global one."""
    weighted = WeightedRows(rows)
    return DataLoader(weighted, batch_size, sampler=sampler, collate_fn=collate, generator=torch.Generator())
