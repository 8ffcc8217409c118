"""Which rows serve which stage."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset

from utils.data.cache import content_key
from utils.distributed import print0
from utils.run import UserError


def prompt_keys(rows: Dataset) -> Iterator[int]:
    for start in range(0, len(rows), 1000):
        batch = rows[start : start + 1000]
        for prompt, chosen in zip(batch["prompt"], batch["chosen"], strict=True):
            yield prompt_key(prompt, chosen)


def prompt_key(prompt: str | None, chosen: str | None) -> int:
    """A number that rows of the same prompt share; of plain texts, rows of the same text."""
    return content_key(chosen if prompt is None else prompt)


def stage_shares(data_split: str) -> list[float]:
    """The shares of the three stages; at least one is positive.

    Raises:
        UserError: `data_split` is no list of three such numbers.
    """
    try:
        shares = [float(share) for share in data_split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not np.isfinite(shares).all() or min(shares) < 0 or sum(shares) <= 0:
        raise UserError(f"--data_split {data_split}: expected three shares like 2,4,4, for steps 1, 2 and 3")
    return shares


def stage_indices(
    prompts: Sequence[int], data_split: str = "2,4,4", stage: int = 0, seed: int = 1234, name: str = "the data"
) -> list[int]:
    """The rows of one stage: a seeded partition in the proportions of `data_split`; no prompt serves two stages.

    It depends on these arguments alone: every rank, on any number of ranks, finds the same rows. First the prompts with
    several rows are placed, those with the most rows before the others, each in the stage that lacks most rows; then
    the prompts with one row fill the stages up in a random order. A stage exceeds its share by less than the rows of
    one prompt, and none whose share comes to a row is left without a prompt. A share that rounds to no row is refused.

    Where there are fewer prompts than stages with a share, rows are divided instead, and a line says so.

    Args:
        prompts: `prompt_keys` of the rows.
        name: Of the data, for messages.

    Returns:
        Row numbers in ascending order.

    Raises:
        UserError: `data_split` is not three numbers of which one is positive, or the stage gets no row.
    """
    shares, n_rows = stage_shares(data_split), len(prompts)
    bounds = np.rint(np.cumsum([0.0, *shares]) / sum(shares) * n_rows).astype(int)
    # RandomState: its stream is the same in every numpy version.
    order = np.random.RandomState(seed).permutation(n_rows)
    targets, sizes = np.diff(bounds), Counter(prompts)
    rows = order[bounds[stage] : bounds[stage + 1]]
    if len(sizes) < min(n_rows, (targets > 0).sum()):
        print0(f"--data_split: {name} has {len(sizes)} different prompts: their rows are divided among the stages")
    elif len(sizes) < n_rows:
        stages = divide_prompts([prompts[i] for i in order], sizes, targets.tolist())
        rows = order[np.asarray(stages) == stage]
    if not len(rows):
        raise UserError(
            f"--data_split {data_split}: no row is left for step {stage + 1} out of {n_rows}; give it a larger share, "
            "or more data"
        )
    return np.sort(rows).tolist()


def divide_prompts(prompts: list[int], sizes: Counter[int], targets: list[int]) -> list[int]:
    """Divides whole prompts among the stages.

    Args:
        prompts: Of the rows, in the order that decides between equals.
        sizes: Rows of each prompt; at least as many prompts as there are targets above 0.
        targets: How many rows each stage should get; their sum is the number of rows.

    Returns:
        The stage of each row.
    """
    stages = range(len(targets))
    lacking, empty = list(targets), {stage for stage in stages if targets[stage]}
    stage_of: dict[int, int] = {}
    for prompt in sorted(dict.fromkeys(prompts), key=lambda prompt: -sizes[prompt]):
        left = len(sizes) - len(stage_of)
        candidates = empty if left <= len(empty) else stages  # the last prompts go to stages that have none yet
        stage_of[prompt] = stage = max(candidates, key=lambda stage: (lacking[stage], -stage))
        lacking[stage] -= sizes[prompt]
        empty.discard(stage)
    # Prompts with one row fill the stages one after the other, as where no prompt repeats.
    filling = iter(sorted(stage for prompt, stage in stage_of.items() if sizes[prompt] == 1))
    return [stage_of[prompt] if sizes[prompt] > 1 else next(filling) for prompt in prompts]


def blend(sizes: list[int], weights: list[float], seed: int = 1234) -> list[list[int]]:
    """Rows of several data sets in the proportions of `weights`: the largest such blend that holds no row twice.

    Args:
        sizes: Rows of each data set, at least one.
        weights: Above 0; only their proportions matter.

    Returns:
        Row numbers of each data set in ascending order; at least one each.
    """
    total = min(n / weight for n, weight in zip(sizes, weights, strict=True))
    chosen = []
    for k, (n, weight) in enumerate(zip(sizes, weights, strict=True)):
        count = min(n, max(1, round(total * weight)))
        order = np.random.RandomState([seed % 2**32, k]).permutation(n)
        chosen.append(np.sort(order[:count]).tolist())
    return chosen
