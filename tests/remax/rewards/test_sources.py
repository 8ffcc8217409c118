"""Names, weights and labels of the reward's parts."""

import pytest

from remax.rewards.sources import reward_sources
from utils.run import UserError


def labels(models: list[str], functions: list[str]) -> list[str]:
    return [source.label for sources in reward_sources(models, functions) for source in sources]


def test_weights():
    models, functions = reward_sources(["output/rm", "me/rm-2:0.5"], ["rules:short:-1e-2", "rules.py:long"])
    assert [(source.name, source.weight) for source in models + functions] == [
        ("output/rm", 1.0),
        ("me/rm-2", 0.5),
        ("rules:short", -0.01),
        ("rules.py:long", 1.0),
    ]
    with pytest.raises(UserError, match="--reward_fn rules:short:0: the weight after the colon"):
        reward_sources([], ["rules:short:0"])


def test_labels_are_short_and_distinct():
    assert labels(["output/rm", "me/rm-large:2"], ["a.b:short", "rules.py:long:-1"]) == [
        "rm",
        "rm-large",
        "short",
        "long",
    ]
    # Equal ends get what stands before them, in a path or a module; what is then still equal a number.
    assert labels(["x/reward", "y/reward/"], ["a.b:f", "rules.py:f"]) == ["x-reward", "y-reward", "b-f", "rules-f"]
    assert labels(["x/reward", "x/reward"], ["x:reward"]) == ["x-reward", "x-reward-2", "x-reward-3"]
    assert labels(["my model (v2)"], []) == ["my-model-v2"]
