"""What is not finite is named with its rank, its row and the first words of its prompt."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from remax.core.rollout import Rollout
from remax.core.sequences import Sequences
from remax.training import suspects as module
from remax.training.sentinel import Sentinel
from remax.training.suspects import suspects
from remax.training.trainer import Trainer, TrainerSettings
from utils.run import TrainingStopped

NAN = math.nan
# Two rows: the prompts 5 and 6 7, an answer of two tokens each.
ROWS = Sequences(torch.tensor([[5, 1, 2, 0], [6, 7, 3, 4]]), torch.tensor([1, 2]), torch.tensor([2, 2]))


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def test_nothing_is_named_where_all_is_finite():
    assert suspects([(ROWS, {"rewards": torch.ones(2), "loss": torch.tensor(2.0), "values": None})], words) == ""


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rewards": torch.tensor([1.0, NAN])}, "the rewards of row 2, 'w6 w7'"),
        ({"values": torch.tensor([[0.0, math.inf], [0.0, 0.0]])}, "the values of row 1, 'w5'"),
        ({"loss": torch.tensor(-math.inf)}, "the loss of 2 rows, the first of which is 'w5'"),
        (
            {"rewards": torch.tensor([NAN, 1.0]), "loss": torch.tensor(NAN)},
            "the rewards of row 1, 'w5' and the loss of 2 rows, the first of which is 'w5'",
        ),
        (
            {"rewards": torch.tensor([NAN, NAN]), "values": torch.full((2, 2), NAN)},
            "the rewards of row 1, 'w5' and the rewards of row 2, 'w6 w7' and the values of row 1, 'w5', and 1 more",
        ),
    ],
)
def test_what_is_not_finite_is_named(values, expected):
    assert suspects([(ROWS, values)], words) == f"Not finite: on rank 0 {expected}"


def test_the_rows_of_all_ranks_are_named(monkeypatch):
    ranks = iter([[[], ["the loss of row 1, 'a'"], ["the loss of row 2, 'b'"]], [0, 1, 4]])
    monkeypatch.setattr(module, "gather_objects", lambda mine: next(ranks))
    expected = "Not finite: on rank 1 the loss of row 1, 'a'; on rank 2 the loss of row 2, 'b', and 3 more"
    assert suspects([], words) == expected


def test_the_trainer_says_whose_reward_it_was():
    rollout = Rollout(ROWS, torch.tensor([NAN, 1.0]), advantages=torch.ones(2, 1))
    figures = {"loss": 1.0, "reward": NAN, "length": 2.0, "entropy": 1.0, "ended": 1.0, "grad_norm": 1.0}
    figures |= dict.fromkeys(("distinct_trigrams", "reward_length_correlation", "zero_advantages"), 0.0)
    trainer = SimpleNamespace(
        settings=TrainerSettings(),
        step=lambda batches: (rollout, figures),
        watchers=[],
        sentinel=Sentinel(9),
        losses=[],
        decode=words,
        suspects="",
    )
    Trainer.learn(trainer, 3, [])
    with pytest.raises(TrainingStopped, match=r"^step 3: .*\. Not finite: on rank 0 the rewards of row 1, 'w5'$"):
        Trainer.check(trainer, 3, figures)
