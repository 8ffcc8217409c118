"""Linear layers by oneDNN: the same numbers, for a while."""

import pytest
import torch
from torch import nn

from remax.core import onednn
from remax.core.onednn import for_few_rows, for_many_rows


class Tied(nn.Module):
    """An embedding and a head of one weight, which answers to an option as well, and a layer of its own."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.head.forward = self.read

    def read(self, hidden, doubled=False):
        return nn.functional.linear(hidden, self.head.weight) * (2 if doubled else 1)

    def forward(self, ids):
        return self.head(self.body(self.embedding(ids)))


@pytest.fixture
def products(monkeypatch):
    """The rows of each product by oneDNN."""
    found, product = [], torch.ops.mkldnn._linear_pointwise

    def spy(hidden, *others):
        found.append(hidden.shape[:-1].numel())
        return product(hidden, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    return found


@torch.no_grad()
def test_products_are_the_same_and_the_layers_come_back(products):
    model, ids = Tied(), torch.tensor([[1, 5], [6, 0]])
    expected, weights = model(ids), dict(model.named_parameters())
    with pytest.raises(ZeroDivisionError), for_few_rows(model):
        torch.testing.assert_close(model(ids), expected)
        assert products == [4, 4]  # body and head
        torch.testing.assert_close(model(ids[:, :1]), expected[:, :1])
        assert products == [4, 4]  # too few rows
        torch.testing.assert_close(model.head(torch.eye(4), doubled=True), 2 * model.head.weight.t())
        assert products == [4, 4]  # no plain product
        _ = 1 / 0
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    assert model.head.forward == model.read and "forward" not in model.body.__dict__
    assert torch.equal(model(ids), expected) and products == [4, 4]


@torch.no_grad()
def test_other_numbers_and_large_models_stay_as_they_are(monkeypatch, products):
    ids = torch.arange(7)
    with for_few_rows(model := Tied().bfloat16()), for_many_rows(model):
        model(ids)
    monkeypatch.setattr(onednn, "MOST_BYTES", 4 * (16 + 28) - 1)
    with for_few_rows(model := Tied()):
        model(ids)
    assert not products
    monkeypatch.setattr(onednn, "MOST_BYTES", 4 * (16 + 28))
    with for_few_rows(model):
        model(ids)
    assert products == [7, 7]


def test_many_rows_that_nothing_is_learned_from(products):
    model, ids = Tied(), torch.arange(onednn.MANY_ROWS) % 7
    with for_many_rows(model):
        expected = model(ids)
        assert expected.requires_grad and not products
        with torch.no_grad():
            torch.testing.assert_close(model(ids), expected)
            assert products == [len(ids)] * 2
            model(ids[1:])
            assert products == [len(ids)] * 2
