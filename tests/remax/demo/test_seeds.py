"""The demo's figures over seeds."""

import json
import sys

import pytest

from remax.demo import seeds
from utils.run import UserError


def summary(seed: int, reward: float) -> dict:
    value = {"mean": reward, "standard_error": 0.1, "count": 4}
    policy = {"true_reward": value, "true_reward_greedy": value, "learned_reward": value, "perplexity": 1.9, "kl": 2.5}
    return {
        "policies": dict.fromkeys(("base", "SFT", "ReMax"), policy),
        "reward_model": {"accuracy": 0.775, "accuracy_ceiling": 0.806},
        "standard_errors_above_sft": 12.34,
        "gap_closed": reward / 4,
        "seconds": {"sft": 10.0, "report": 2.4},
        "seeds": {"report": seed},
    }


def test_a_row_for_each_seed_and_the_range(tmp_path, monkeypatch, capsys):
    files = []
    for seed, reward in ((0, 2.74), (3, 2.66)):
        files.append(str(tmp_path / f"demo_seed_{seed}.json"))
        (tmp_path / f"demo_seed_{seed}.json").write_text(json.dumps(summary(seed, reward)))
    monkeypatch.setattr(sys, "argv", ["seeds", *files])
    seeds.main()
    text = (tmp_path / "demo_seeds.md").read_text()
    assert text in capsys.readouterr().out
    head, _, first, second, both = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    found = [dict(zip(head, row, strict=True)) for row in (first, second, both)]
    assert [row["seed"] for row in found] == ["0", "3", "range"]
    assert [row["gap closed"] for row in found] == ["68%", "66%", "66% to 68%"]
    assert [row["true reward: base"] for row in found] == ["2.74", "2.66", "2.66 to 2.74"]
    assert found[2]["reward model's accuracy"] == "77.5%" and found[2]["seconds"] == "12"
    monkeypatch.setattr(sys, "argv", ["seeds", str(tmp_path / "none.json")])
    with pytest.raises(UserError, match="none.json: no such file"):
        seeds.main()
