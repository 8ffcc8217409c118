"""Weights stored for the products of few rows: other places in memory, the same numbers, for a while."""

import pytest
import torch
from torch import nn

from remax.generation import layout
from remax.generation.layout import laid_out_for_few_rows


class Tied(nn.Module):
    """An embedding and a head of one weight, and a layer of its own."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.body(self.embedding(ids)))


@torch.no_grad()
def test_products_are_the_same_and_the_weights_come_back():
    model, ids = Tied(), torch.tensor([1, 5])
    expected, weights = model(ids), dict(model.named_parameters())
    with pytest.raises(ZeroDivisionError), laid_out_for_few_rows(model):
        assert model.body.weight.stride() == (1, 4) and model.head.weight.stride() == (1, 7)
        assert model.embedding.weight is weights["embedding.weight"]
        torch.testing.assert_close(model(ids), expected)
        _ = 1 / 0
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    assert model.head.weight is model.embedding.weight
    assert model.body.weight.stride() == (4, 1) and model.body.weight.requires_grad


def test_other_numbers_and_large_models_stay_as_they_are(monkeypatch):
    with laid_out_for_few_rows(model := Tied().bfloat16()):
        assert model.body.weight.stride() == (4, 1)
    monkeypatch.setattr(layout, "MOST_BYTES", 4 * (16 + 28) - 1)
    with laid_out_for_few_rows(model := Tied()):
        assert model.body.weight.stride() == (4, 1)
