"""Which data is read, and how its rows become batches: built from the flags in one place, read by every loader."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Overlong = Literal["cut", "drop"]
TrainOn = Literal["last", "all"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of one run, the same for all its loaders; stage, lengths and batch sizes are those of a call."""

    data_path: Sequence[str]  # files, folders or hub names, see `utils.data.names.parse_name`
    sft_only_data_path: Sequence[str] = ()  # data sets that serve stage 0 wholly, and no other stage
    columns: Mapping[str, str] = field(default_factory=dict)  # {"prompt": its name in the data, ...}, see `Form`
    keep: frozenset[str] = frozenset()  # columns that the prompts of stage 2 bring along, as they are; "*": all
    data_split: str = "2,4,4"  # shares of the stages
    data_seed: int = 1234  # of the split over the stages
    seed: int = 2023  # of the order of the training rows
    cache_dir: str | None = None  # where converted tables go; None: the datasets library's own folder
    num_proc: int | None = None  # processes that convert and encode rows; None: this one
    overlong: Overlong | None = None  # what becomes of prompts that are too long, see `Encoder`
    train_on: TrainOn = "last"  # which answers of a dialogue stage 0 learns
    need_margin: bool = False  # stage 1 learns from the column `margin`; data without it is refused
    best_and_worst: bool = False  # of several ranked answers stage 1 takes the best and the worst, as a pair
    streaming: bool = False  # rows are read while the training goes on
    shuffle_buffer: int = 10_000  # rows among which streaming draws the next one
    record_in: str | Path | None = None  # folder for data.json: what was read, dropped and cut, by which version
