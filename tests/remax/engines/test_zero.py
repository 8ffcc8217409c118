"""What ZeRO asks of code around it."""

import torch

from remax.engines.zero import size_of


def test_parameters_are_counted_whole_and_tied_ones_once():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1), torch.nn.Linear(3, 2))
    model[2].weight = model[0].weight
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    spread = torch.nn.Parameter(torch.zeros(0))  # ZeRO-3 leaves none of a parameter in its place
    spread.ds_numel = 20
    model.register_parameter("spread", spread)
    size = size_of(model)
    assert (size.parameters, size.trained) == (8 + 3 + 2 + 20, 3 + 20) and size.share == 23 / 33
    assert str(size) == "33 parameters, of which 23 are trained (69.70%)"
