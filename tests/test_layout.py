"""The house rules: who may import whom, what the wheel holds, and that the documents speak of things that exist."""

import ast
import re
import shutil
import sys
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest

from remax.doctor import DoctorArguments
from remax.evaluation_arguments import PromptEvalArguments, RewardEvalArguments
from remax.flags import Step1Arguments, Step2Arguments, Step3Arguments

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("step1_supervised_finetuning", "step2_reward_model_finetuning", "step3_rlhf_finetuning")
SOURCES = sorted(path for room in ("utils", "remax", *STAGES) for path in (ROOT / room).rglob("*.py"))
MAY_IMPORT_DEEPSPEED = {"remax/engines.py", "remax/checkpoint.py", "utils/distributed.py"}
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "step*/**/*.md", "docs/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
    if ".venv" not in path.parts
)


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_packages(path: Path) -> set[str]:
    """Top-level names of every import in the file, also of those inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0] if node.level == 0 else path.relative_to(ROOT).parts[0])
    return names


def test_imports_are_seen(tmp_path):
    # The walker itself: a lazy import counts, a mention in a string does not.
    (tmp_path / "x.py").write_text("import os.path\ndef f():\n    from remax.losses import g\n'import deepspeed'\n")
    assert imported_packages(tmp_path / "x.py") == {"os", "remax"}
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_imports_run_one_way(path):
    # stepN -> remax -> utils: each room may import those after it. The stages' programs are imported by nobody.
    room = path.relative_to(ROOT).parts[0]
    forbidden = {"utils": {"remax", *STAGES}, "remax": set(STAGES)}.get(room, set(STAGES))
    assert not imported_packages(path) & (forbidden | {"tests"})


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_imports_of_deepspeed_stay_in_few_rooms(path):
    assert "deepspeed" not in imported_packages(path) or short(path) in MAY_IMPORT_DEEPSPEED


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_imports_need_no_search_path(path):
    # The packages are installed; a file that bends sys.path works from one folder only.
    assert "sys.path" not in path.read_text(encoding="utf-8")


def test_wheel_contains_the_packages(tmp_path, run_command):
    source = tmp_path / "source"  # a copy, so that no build/ with yesterday's modules gets in, and none is left behind
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source / name)
    for name in ("remax", "utils", "tests", *STAGES):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    built = run_command([*pip, "--wheel-dir", tmp_path, source], cwd=tmp_path, PYTHONPATH="")
    assert built.returncode == 0, built.stdout
    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert set(names) == {short(path) for room in ("remax", "utils") for path in (ROOT / room).rglob("*.py")}


# ------------------------------------------------------------------------------------------------------------ documents


def made_by_running(path: str) -> bool:
    return path.split("/")[0] in {"output", "log", ".venv", "build", "dist"} or "..." in path


def exists(document: Path, path: str) -> bool:
    """Seen from the repository, from the document's folder, or as the end of a path in one of the rooms."""
    if any((folder / path).exists() for folder in (ROOT, document.parent)):
        return True
    rooms = (ROOT / room for room in ("remax", "utils", "tests", "docs", "benchmarks", *STAGES))
    return not path.startswith((".", "/")) and any(any(room.rglob(path)) for room in rooms)


def code(text: str) -> list[str]:
    """Lines of code blocks, fenced or indented (a trailing backslash joins lines), and pieces of inline code."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^ {4,}(.+)$", prose, flags=re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()] + indented + re.findall(r"`([^`\n]+)`", prose)


FILE = re.compile(r"(?<![\w./~{}$=-])((?:[\w.-]+/)*[\w-]+\.(?:py|sh|md|toml|yml|txt))(?![\w/])")


@pytest.mark.parametrize("document", DOCUMENTS, ids=short)
def test_documents_name_files_that_exist(document):
    text = document.read_text(encoding="utf-8")
    named = {path for line in code(text) for path in FILE.findall(line)}
    named |= {link.split("#")[0] for link in re.findall(r"\]\((?!https?:|mailto:|#)([^)\s]+)\)", text)}
    missing = [path for path in sorted(named) if not made_by_running(path) and not exists(document, path)]
    assert not missing


def test_readme_has_a_line_for_every_file():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    listed = {path for row in rows for path in re.findall(r"`([^`]+)`", row)}
    missing = [
        path
        for path in map(short, SOURCES)
        if not path.endswith("__init__.py") and not {path, *(f"{folder}/" for folder in Path(path).parents)} & listed
    ]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=short)
def test_documents_name_make_targets_that_exist(document):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    lines = code(document.read_text(encoding="utf-8"))
    named = {word for line in lines for words in re.findall(r"\bmake((?: +[a-z]+)+)", line) for word in words.split()}
    assert named <= targets


def known_flags() -> set[str]:
    """Flags of the stages' programs, of modules that call add_argument themselves, and of the deepspeed launcher."""
    programs = (Step1Arguments, Step2Arguments, Step3Arguments)
    programs += (PromptEvalArguments, RewardEvalArguments, DoctorArguments)
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    flags = {f.name for arguments in programs for f in fields(arguments)} | set(re.findall(r"\"--(\w+)\"", text))
    return flags | {"help", "num_gpus", "num_nodes", "hostfile", "master_port"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=short)
def test_documents_name_flags_that_exist(document):
    ours = re.compile(r"^--|\.sh\b|main\.py|_eval\.py|-m (?:utils|remax)\.")
    lines = [line for line in code(document.read_text(encoding="utf-8")) if ours.search(line)]
    named = {flag for line in lines for flag in re.findall(r"(?<![\w-])--([a-z]\w*)", line)}
    assert named <= known_flags()
