"""Which data is read, and how its rows become batches: built from the flags in one place, read by every loader."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Overlong = Literal["cut", "drop"]
TrainOn = Literal["last", "all"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of one run, the same for all its loaders; stage, lengths and batch sizes are those of a call.

    Attributes:
        data_path: files, folders or hub names, see `utils.data.names.parse_name`.
        sft_only_data_path: data sets that serve stage 0 wholly, and no other stage.
        columns: {"prompt": its name in the data, ...}, see `Form`.
        data_split: shares of the stages.
        data_seed: of the split over the stages.
        seed: of the order of the training rows.
        cache_dir: where converted tables go; None: the datasets library's own folder.
        num_proc: processes that convert and encode rows; None: this one.
        overlong: what becomes of prompts that are too long, see `Encoder`.
        train_on: the last answer of a dialogue or all of them, for stage 0.
        need_margin: stage 1 learns from the column `margin`; data without it is refused.
        best_and_worst: of several ranked answers stage 1 takes the best and the worst, as a pair.
        streaming: rows are read while the training goes on.
        shuffle_buffer: rows among which streaming draws the next one.
        record_in: folder for data.json: what was read, dropped and cut, and by which version of the code.
    """

    data_path: Sequence[str]
    sft_only_data_path: Sequence[str] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    data_split: str = "2,4,4"
    data_seed: int = 1234
    seed: int = 2023
    cache_dir: str | None = None
    num_proc: int | None = None
    overlong: Overlong | None = None
    train_on: TrainOn = "last"
    need_margin: bool = False
    best_and_worst: bool = False
    streaming: bool = False
    shuffle_buffer: int = 10_000
    record_in: str | Path | None = None
