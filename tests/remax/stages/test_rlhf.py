"""Step 3 put together: what happens in which order, with everything expensive replaced by a note of its call."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from remax.checks.findings import FAILURE, Finding, Report
from remax.cli.validate import parse_step3
from remax.stages import rlhf
from utils.run import UserError


@pytest.mark.parametrize("skip", [False, True])
def test_models_are_examined_before_the_training_unless_told_not_to(skip, monkeypatch, tmp_path):
    line = ["--actor_model_name_or_path", "m/a", "--reward_model_name_or_path", "m/r", "--output_dir", str(tmp_path)]
    args = parse_step3([*line, "--skip_doctor", str(skip), "--seed", "77", "--max_steps", "9"])
    called: list[str] = []

    def note(name: str, value: object = None):
        monkeypatch.setattr(rlhf, name, lambda *_, **__: called.append(name) or value)

    for name in ("quiet_libraries", "init_distributed", "try_reward_functions", "shutdown", "save_final", "write_note"):
        note(name)
    note("check_models", SimpleNamespace(actor=SimpleNamespace(pad_token_id=0)))
    note("load_data", SimpleNamespace(train=[0] * 20, evaluation=[], plain_text=None))
    models = SimpleNamespace(actor=None, reference=None, reward=SimpleNamespace(part_names=()), critic=None)
    note("build_models", models)
    note("examine_models", Report([Finding("a check", FAILURE, "0 of 1", "mend it")]))
    note("MetricsLogger", SimpleNamespace(close=lambda: None))
    note("Sentinel")
    note("Trainer", SimpleNamespace(train=lambda _: called.append("train") or SimpleNamespace(results={})))
    monkeypatch.setattr(rlhf, "set_seed", lambda seed: called.append(f"seed {seed}"))
    monkeypatch.setattr(rlhf, "Sentinel", lambda _: None)
    monkeypatch.setattr(sys.modules["remax.stages.rlhf"], "len", lambda _: 20, raising=False)
    if skip:
        rlhf.run_rlhf(args)
        assert "examine_models" not in called and called.index("build_models") < called.index("train")
    else:
        with pytest.raises(UserError, match="the examination failed .* a check: 0 of 1. mend it"):
            rlhf.run_rlhf(args)
        assert called[-1] == "examine_models" and "train" not in called
    assert called.index("seed 77") < called.index("build_models")
