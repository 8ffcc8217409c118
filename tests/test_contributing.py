"""The recipes of CONTRIBUTING.md, followed to the letter in a copy of the repository."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = {part.splitlines()[0]: part for part in TEXT.split("\n## Recipe: ")[1:]}
HEAD = re.compile(r"^# (?P<path>\S+?)(?: \(a new file\)|, (?P<how>below|above|instead of): (?P<line>.+))$")


@pytest.fixture
def copy(tmp_path) -> Path:
    """What the recipes touch and run."""
    names = "remax utils tests docs step1_supervised_finetuning step2_reward_model_finetuning step3_rlhf_finetuning"
    for name in names.split():
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def apply(block: str, folder: Path) -> None:
    """Does what the first line of a block says: a new file, or lines above, below or instead of one that is there."""
    head, _, body = block.partition("\n")
    found = HEAD.match(head)
    path = folder / found["path"]
    if not found["how"]:
        assert not path.exists(), f"{path} is there already"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body, encoding="utf-8")
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    places = [i for i, line in enumerate(lines) if line.strip() == found["line"]]
    assert len(places) == 1, f"{found['path']} has {len(places)} lines like this: {found['line']}"
    (place,) = places
    start, end = {"above": (place, place), "below": (place + 1, place + 1), "instead of": (place, place + 1)}[
        found["how"]
    ]
    lines[start:end] = [body]
    path.write_text("".join(lines), encoding="utf-8")


def follow(recipe: str, folder: Path) -> list[str]:
    """Applies the blocks of a recipe; returns its commands."""
    commands = []
    for block in re.findall(r"^```\w+\n(.*?)^```$", recipe, flags=re.DOTALL | re.MULTILINE):
        if HEAD.match(block.partition("\n")[0]):
            apply(block, folder)
        else:
            commands += block.splitlines()
    return commands


def test_there_are_recipes():
    assert set(RECIPES) == {"an algorithm", "a shape of data", "a model's script", "a flag"}


@pytest.mark.ranks
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_works(name, copy, run_command):
    commands = follow(RECIPES[name], copy)
    assert commands
    for command in commands:
        done = run_command(["bash", "-o", "pipefail", "-c", command], cwd=copy, PYTHONPATH=copy)
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        assert "no tests ran" not in done.stdout and "skipped" not in done.stdout


def test_a_recipe_says_where_it_no_longer_fits(tmp_path):
    (tmp_path / "x.py").write_text("a = 1\n    b = 2\n")
    apply("# x.py, below: b = 2\n    c = 3\n", tmp_path)
    apply("# x.py, instead of: a = 1\na = 0\n", tmp_path)
    apply("# x.py, above: a = 0\nz = 9\n", tmp_path)
    assert (tmp_path / "x.py").read_text() == "z = 9\na = 0\n    b = 2\n    c = 3\n"
    with pytest.raises(AssertionError, match="has 0 lines like this: d = 4"):
        apply("# x.py, below: d = 4\ne = 5\n", tmp_path)
    with pytest.raises(AssertionError, match="is there already"):
        apply("# x.py (a new file)\n", tmp_path)
