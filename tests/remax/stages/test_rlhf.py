"""Step 3 put together: what happens in which order, with everything expensive replaced by a note of its call."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from remax.checks.findings import FAILURE, Finding, Report
from remax.cli.validate import parse_step3
from remax.stages import rlhf
from remax.stages.models import Models
from remax.training.loop import TrainState
from utils.run import UserError

STATE = TrainState(step=9, best_step=4, before={"reward": 1.0}, after={"reward": 2.0}, best={"reward": 2.5})


class Words(list):
    """A tokenizer, as far as it is asked here."""

    pad_token_id = 0

    def decode(self, ids) -> str:
        return ""


@pytest.fixture
def stubbed(monkeypatch):
    """Names of what was called, in order. The reward model's examination fails, the training has 20 batches."""
    called: list[str] = []

    def note(name: str, value: object = None):
        monkeypatch.setattr(rlhf, name, lambda *_, **__: called.append(name) or value)

    for name in ("quiet_libraries", "init_distributed", "try_reward_functions", "shutdown", "save_final", "write_note"):
        note(name)
    note("check_models", SimpleNamespace(actor=Words([0] * 300)))
    note("load_data", SimpleNamespace(train=[0] * 20, evaluation=[], plain_text=None))
    note("build_models", Models(None, None, SimpleNamespace(part_names=())))
    note("decode_serves")
    note("examine_models", Report([Finding("a check", FAILURE, "0 of 1", "mend it")]))
    note("MetricsLogger", SimpleNamespace(close=lambda: None, remark=None))
    note("Trainer", SimpleNamespace(train=lambda *_: called.append("train") or STATE))
    monkeypatch.setattr(rlhf.resume, "checkpoints", lambda *_, **__: None)  # which reads the data's record
    monkeypatch.setattr(rlhf, "set_seed", lambda seed: called.append(f"seed {seed}"))
    return called


def arguments(tmp_path, line: str):
    base = f"--actor_model_name_or_path m/a --reward_model_name_or_path m/r --output_dir {tmp_path} {line}"
    return parse_step3([*base.split(), "--overwrite_output_dir"])


@pytest.mark.parametrize("skip", [False, True])
def test_models_are_examined_before_the_training_unless_told_not_to(skip, stubbed, tmp_path):
    args = arguments(tmp_path, f"--skip_doctor {skip} --seed 77 --max_steps 9")
    if skip:
        rlhf.run_rlhf(args)
        assert "examine_models" not in stubbed and stubbed.index("build_models") < stubbed.index("train")
    else:
        with pytest.raises(UserError, match="the examination failed .* a check: 0 of 1. mend it"):
            rlhf.run_rlhf(args)
        assert stubbed[-1] == "examine_models" and "train" not in stubbed
    assert (tmp_path / "run.json").exists() == skip  # a run that is refused leaves that of the run before
    assert stubbed.index("seed 77") < stubbed.index("build_models")


def test_the_last_line_says_which_model_is_the_best(stubbed, tmp_path, capsys):
    rlhf.run_rlhf(arguments(tmp_path, "--skip_doctor true"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"best model by evaluation reward: step 4, 1 -> 2.5, in {tmp_path}/actor"
    start = TrainState(step=9, before={"objective": 1.0}, after={"objective": 0.5}, best={"objective": 1.0})
    said = rlhf.best_model(start, "objective", tmp_path)
    assert said == f"no step was better than the start by evaluation objective (1): {tmp_path} holds the start"


def test_the_variance_meter_knows_which_answers_belong_together(stubbed, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(rlhf, "VarianceMeter", lambda *values: made.append(values))
    line = "--skip_doctor true --algo rloo --samples_per_prompt 8 --gamma 0.9"
    rlhf.run_rlhf(arguments(tmp_path, line))
    assert not made
    rlhf.run_rlhf(arguments(tmp_path, f"{line} --log_variance --log_variance_gradient_steps 7"))
    assert made == [(None, 8, 0.9, 7)]
