"""`import remax`: quick, and everything that it offers is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys

import pytest

import remax

PROBE = """
import sys, time
begin = time.perf_counter()
import remax
seconds = time.perf_counter() - begin
names = dir(remax)
heavy = {"torch", "transformers", "deepspeed", "numpy", "datasets"} & set(sys.modules)
print(seconds, sorted(heavy), remax.__version__)
"""


def test_the_import_is_quick_and_brings_nothing_heavy(run_command):
    done = [run_command([sys.executable, "-c", PROBE]) for _ in range(3)]
    assert {d.returncode for d in done} == {0}, done[0].stdout
    assert {d.stdout.split(maxsplit=1)[1].strip() for d in done} == {"[] 0.1.0"}
    assert min(float(d.stdout.split()[0]) for d in done) < 0.05


@pytest.mark.parametrize("name", remax.__all__)
def test_a_name_is_the_object_of_its_module(name):
    module = importlib.import_module(remax._MODULE_OF[name])
    value = getattr(remax, name)
    assert value is getattr(module, name)
    assert name in dir(remax)
    if name != "ALGORITHMS":
        assert inspect.getdoc(value)
        assert value.__module__.startswith("remax.")


def test_the_table_names_no_module_of_the_package():
    # `remax.training` must stay the room, however the names grow.
    assert not [name for name in remax.__all__ if importlib.util.find_spec(f"remax.{name}")]


def test_an_unknown_name_is_an_attribute_error_that_lists_the_names():
    with pytest.raises(AttributeError, match="no attribute 'load_critic'; it offers .*load_actor"):
        _ = remax.load_critic


def test_the_readme_s_notebook_runs(root, tiny_model, tiny_reward_model, capsys):
    (section,) = re.findall(r"^## As a library$(.*?)^## ", (root / "README.md").read_text(), flags=re.M | re.S)
    (code,) = re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S)
    for folder in ("remax/actor", "sft"):
        code = code.replace(f"output/demo/{folder}", str(tiny_model("llama")))
    code = code.replace("output/demo/reward", str(tiny_reward_model("llama")))
    exec(code, {})
    answers, scores, kl, score = capsys.readouterr().out.strip().splitlines()
    assert len(ast.literal_eval(answers)) == 4
    assert scores.count("tensor") == 2
    assert kl == "tensor([0., 0., 0., 0.])"  # the same model twice
    assert score.startswith("tensor([")
