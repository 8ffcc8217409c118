"""The table of algorithms, and building one from settings."""

from __future__ import annotations

import pytest

from remax.algorithms import ALGORITHMS, KLPenalty, build_algorithm


def test_every_name_builds_with_its_defaults():
    for name, kind in ALGORITHMS.items():
        algorithm = build_algorithm(name, gamma=None, lam=None, samples_per_prompt=None)
        assert type(algorithm) is kind and algorithm == kind()


def test_settings_arrive():
    ppo = build_algorithm("ppo", kl=KLPenalty(0.3), gamma=0.99, lam=0.5, epochs=3, cliprange_value=0.7)
    assert (ppo.kl.coefficient, ppo.gamma, ppo.lam, ppo.epochs, ppo.cliprange_value) == (0.3, 0.99, 0.5, 3, 0.7)
    assert build_algorithm("rloo", samples_per_prompt=2).samples_per_prompt == 2


def test_a_setting_that_does_nothing_is_refused_with_its_readers():
    with pytest.raises(ValueError, match="lam=0.5 does nothing in remax; it belongs to ppo"):
        build_algorithm("remax", lam=0.5)
    with pytest.raises(ValueError, match="belongs to remax, rloo, grpo"):
        build_algorithm("reinforce", samples_per_prompt=4)
    with pytest.raises(ValueError, match="belongs to ppo"):
        build_algorithm("grpo", epochs=2)
    with pytest.raises(ValueError, match="belongs to no algorithm"):
        build_algorithm("remax", colour="red")
    with pytest.raises(ValueError, match="choose from remax, reinforce, rloo, grpo, ppo"):
        build_algorithm("trpo")


def test_what_an_algorithm_does_anyway_may_be_said():
    assert build_algorithm("remax", samples_per_prompt=1, epochs=1) == build_algorithm("remax")


def test_the_discount_of_the_program_is_the_one_of_the_library():
    gammas = {name: kind().gamma for name, kind in ALGORITHMS.items()}
    assert gammas == {name: 0.95 if name in ("remax", "reinforce") else 1.0 for name in ALGORITHMS}
