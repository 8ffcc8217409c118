"""Which rows serve which stage."""

import numpy as np

from utils.run import UserError


def stage_indices(n_rows: int, data_split: str = "2,4,4", stage: int = 0, seed: int = 1234) -> list[int]:
    """The rows of one stage: a seeded partition in the proportions of `data_split`, so that no row serves two stages.

    It depends on these four arguments alone: every rank, on any number of ranks, finds the same rows.

    Args:
        data_split: three numbers, the shares of steps 1, 2 and 3.
        stage: 0, 1 or 2.

    Returns:
        Row numbers in ascending order.

    Raises:
        UserError: `data_split` is not three numbers of which one is positive, or the stage gets no row.
    """
    try:
        shares = [float(share) for share in data_split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not np.isfinite(shares).all() or min(shares) < 0 or sum(shares) <= 0:
        raise UserError(f"--data_split {data_split}: expected three shares like 2,4,4, for steps 1, 2 and 3")
    bounds = np.rint(np.cumsum([0.0, *shares]) / sum(shares) * n_rows).astype(int)
    # RandomState: its stream is the same in every numpy version.
    order = np.random.RandomState(seed).permutation(n_rows)
    rows = np.sort(order[bounds[stage] : bounds[stage + 1]])
    if not len(rows):
        raise UserError(
            f"--data_split {data_split}: no row is left for step {stage + 1} out of {n_rows}; give it a larger share, "
            "or more data"
        )
    return rows.tolist()


def blend(sizes: list[int], weights: list[float], seed: int = 1234) -> list[list[int]]:
    """Rows of several data sets in the proportions of `weights`: the largest such blend in which no row stands twice.

    Args:
        sizes: rows of each data set, at least one.
        weights: above 0; only their proportions count.
        seed: of the choice of rows in a data set that is not taken whole.

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
