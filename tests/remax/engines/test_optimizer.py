"""What is said before DeepSpeed compiles an operator."""

import deepspeed.ops.adam
import pytest
from torch import nn

from remax.engines.optimizer import OptimizerConfig, build_optimizer


@pytest.mark.parametrize("offload", [True, False])
def test_a_compilation_is_announced_once(monkeypatch, tmp_path, capsys, offload):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", lambda groups, **options: None)

    def said() -> str:
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(1e-3, 1), offload)
        return capsys.readouterr().out

    first = said()
    assert first.startswith("compiling DeepSpeed's cpu_adam") == offload
    if offload:
        assert str(tmp_path / "cpu_adam") in first and first.count("\n") == 1
        (tmp_path / "cpu_adam/cpu_adam.so").touch()
    assert said() == ""
