"""The house rules: who may import whom, what the wheel holds, and that the documents speak of things that exist."""

import ast
import re
import shutil
import sys
import tarfile
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest

from remax.cli.evaluation import (
    AnswersArguments,
    ChatArguments,
    DoctorArguments,
    PromptEvalArguments,
    RewardEvalArguments,
    WinrateArguments,
)
from remax.cli.flags import Step1Arguments, Step2Arguments, Step3Arguments
from remax.cli.planning import PlanArguments

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("step1_supervised_finetuning", "step2_reward_model_finetuning", "step3_rlhf_finetuning")
SOURCES = sorted(path for room in ("utils", "remax", *STAGES) for path in (ROOT / room).rglob("*.py"))
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "step*/**/*.md", "docs/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
    if ".venv" not in path.parts
)

# What the rooms of remax/ may import beside `utils` and themselves.
TORCH_ONLY = ("core",)
ENGINES = (*TORCH_ONLY, "models", "generation")
ROOMS = {
    "core": (),
    "algorithms": TORCH_ONLY,
    "models": TORCH_ONLY,
    "generation": TORCH_ONLY,
    "engines": ENGINES,
    "rewards": ("core", "engines"),
    "checkpoint": ("core", "models", "engines"),
    "evaluation": (*ENGINES, "engines", "rewards"),
    "checks": (*ENGINES, "engines", "rewards", "checkpoint", "evaluation"),
    "training": ("core", "algorithms", "models", "engines", "rewards", "checkpoint", "evaluation"),
    "cli": ("algorithms", "rewards"),
    "planning": ("core", "models", "generation", "engines", "training"),
    "report": ("cli",),
    "stages": (
        *(*ENGINES, "algorithms", "engines", "rewards", "checkpoint", "evaluation", "checks", "training", "cli"),
        *("planning", "report"),
    ),
    "demo": (*ENGINES, "engines", "evaluation", "report"),
    "doctor.py": ("cli", "stages"),
    "answers.py": ("cli", "stages"),
    "winrate.py": ("cli", "stages"),
    "plan.py": ("cli", "stages"),
    "chat.py": ("cli", "stages"),
}
OF_CLI = {"remax.rewards.process", "remax.rewards.sources"}  # what the command line may see of the rewards
MAY_IMPORT_DEEPSPEED = {f"remax/engines/{name}.py" for name in ("base", "optimizer", "policy", "zero")}
MAY_IMPORT_DEEPSPEED |= {"utils/distributed.py"}


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(path: Path) -> set[str]:
    """Names of the modules of every import in the file, also of those inside functions and for type checkers only."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: an import relative to its own folder"
            of_package = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if module_file(name) else node.module for name in of_package}
    return names


def module_file(name: str) -> Path | None:
    """The file of one of our modules."""
    stem = ROOT.joinpath(*name.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def imported_packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(path)}


def test_imports_are_seen(tmp_path):
    # The walker itself: a lazy import counts, a mention in a string does not.
    (tmp_path / "x.py").write_text(
        "import os.path\ndef f():\n    from remax.core.losses import g\n'import deepspeed'\n"
    )
    assert imported_modules(tmp_path / "x.py") == {"os.path", "remax.core.losses"}
    (tmp_path / "x.py").write_text("from remax.core import losses\nfrom remax.core.losses import g\n")
    assert imported_modules(tmp_path / "x.py") == {"remax.core.losses"}
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_imports_run_one_way(path):
    # stepN -> remax -> utils: each may import those after it. The stages' programs are imported by nobody.
    top = path.relative_to(ROOT).parts[0]
    forbidden = {"utils": {"remax", *STAGES}, "remax": set(STAGES)}.get(top, set(STAGES))
    assert not imported_packages(path) & (forbidden | {"tests"})


@pytest.mark.parametrize("path", [path for path in SOURCES if short(path).startswith("remax/")], ids=short)
def test_imports_between_rooms_run_one_way(path):
    room = path.relative_to(ROOT).parts[1]
    modules = {name for name in imported_modules(path) if name.startswith("remax.")}
    if room == "__init__.py":  # the face of the library: it imports lazily, whatever a notebook asks for
        return
    others = {name.split(".")[1] for name in modules} - {room}
    assert others <= set(ROOMS[room])
    if room == "cli":
        assert {name for name in modules if name.startswith("remax.rewards")} <= OF_CLI


def test_rooms_form_no_circle():
    # The table itself: every room can be built after those that it imports.
    built: set[str] = set()
    while ready := {room for room, needs in ROOMS.items() if room not in built and built.issuperset(needs)}:
        built |= ready
    assert built == set(ROOMS)
    assert built == {path.name for path in (ROOT / "remax").iterdir() if path.name[0] != "_"}


def test_imports_form_no_circle():
    # Module by module, imports for type checkers and inside functions included.
    needs = {path: {f for n in imported_modules(path) if (f := module_file(n)) and f != path} for path in SOURCES}
    left = set(needs)
    while ready := {path for path in left if not needs[path] & left}:
        left -= ready
    assert not sorted(map(short, left))


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_imports_of_deepspeed_stay_in_few_rooms(path):
    assert "deepspeed" not in imported_packages(path) or short(path) in MAY_IMPORT_DEEPSPEED


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_imports_need_no_search_path(path):
    # The packages are installed; a file that bends sys.path works from one folder only. One hands it on, as it is.
    handed_on = {"remax/rewards/process.py": ["sys.path[:] = sys.argv[3:]", "*sys.path"]}
    text = path.read_text(encoding="utf-8")
    for line in handed_on.get(short(path), ()):
        text = text.replace(line, "")
    assert "sys.path" not in text


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
    held = [path for room in ("remax", "utils") for path in (ROOT / room).rglob("*.py")]
    held += list((ROOT / "remax/report").glob("page.*"))  # what the report is made of
    assert set(names) == set(map(short, held))


def test_sdist_contains_what_a_clone_has(tmp_path, run_command):
    tracked = run_command(["git", "ls-files", "-z"]).stdout.split("\0")[:-1]
    if not tracked:
        pytest.skip("not a git repository")
    source = tmp_path / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    code = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    built = run_command([sys.executable, "-c", code], cwd=source)
    assert built.returncode == 0, built.stdout
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    assert sorted({name for name in tracked if (ROOT / name).is_file()} - held - {".gitignore"}) == []


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
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    named |= {link.split("#")[0] for link in re.findall(r"\]\((?!https?:|mailto:|#)([^)\s]+)\)", prose)}
    named -= set(re.findall(r"^# (\S+) \(a new file\)$", text, flags=re.MULTILINE))  # recipes: test_contributing.py
    missing = [path for path in sorted(named) if not made_by_running(path) and not exists(document, path)]
    assert not missing


def test_the_architecture_has_a_line_for_every_room():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\S+)` \| \S", text, flags=re.MULTILINE)
    rooms = {f"{short(path.parent)}/" for path in SOURCES} - {"remax/"}  # of which the files are named one by one
    files = {short(path) for path in (ROOT / "remax").glob("*.py")}
    assert sorted(listed) == sorted(rooms | files | {"examples/", "benchmarks/", "tests/"})


@pytest.mark.parametrize("document", DOCUMENTS, ids=short)
def test_documents_name_make_targets_that_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    lines = code(document.read_text(encoding="utf-8"))
    named = {word for line in lines for words in re.findall(r"\bmake((?: +[a-z-]+)+)", line) for word in words.split()}
    assert named <= targets


def known_flags() -> set[str]:
    """Flags of the stages' programs, of modules that call add_argument themselves, and of the launchers."""
    programs = (Step1Arguments, Step2Arguments, Step3Arguments)
    programs += (PromptEvalArguments, RewardEvalArguments, DoctorArguments, AnswersArguments, WinrateArguments)
    programs += (PlanArguments, ChatArguments)
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    flags = {f.name for arguments in programs for f in fields(arguments)} | set(re.findall(r"\"--(\w+)\"", text))
    return flags | {"help"} | OF_OTHERS


# Of the deepspeed launcher, torchrun, srun, sbatch, mpirun, docker and hf, as far as a dash in the name.
OF_OTHERS = {"num_gpus", "num_nodes", "hostfile", "master_port", "nproc_per_node", "nnodes", "node_rank", "master_addr"}
OF_OTHERS |= {"gres", "gpus", "ntasks", "nodes", "cpus", "time", "signal", "bind", "ipc", "shm", "repo"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=short)
def test_documents_name_flags_that_exist(document):
    ours = re.compile(r"^--|\.sh\b|main\.py|_eval\.py|-m (?:utils|remax)\.")
    lines = [line for line in code(document.read_text(encoding="utf-8")) if ours.search(line)]
    named = {flag for line in lines for flag in re.findall(r"(?<![\w-])--([a-z]\w*)", line)}
    assert named <= known_flags()
