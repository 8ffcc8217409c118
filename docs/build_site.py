"""The documents as a site in build/site: `make docs`, or this program where mkdocs-material is installed.

The documents, and all files that they link to, are copied as they lie in the repository; so their links hold in both.
A link that leads nowhere ends it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
DOCUMENTS = ("*.md", "docs/**/*.md", "step*/*.md")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(?:#[^)\s]*)?\)")
# Section -> its pages in order; the results follow by their names, and what is in no section comes last.
SECTIONS = {
    "Start": ["README.md", "docs/gallery.md"],
    "The three stages": [
        "step1_supervised_finetuning/README.md",
        "step2_reward_model_finetuning/README.md",
        "step3_rlhf_finetuning/README.md",
    ],
    "Using it": [
        f"docs/{name}.md"
        for name in "data rewards algorithms calibrated_baseline hydra checkpoints clusters hardware".split()
    ],
    "Watching and judging": [
        f"docs/{name}.md" for name in "monitoring report doctor evaluation troubleshooting debugging".split()
    ],
    "Results": ["docs/results/demo.md", "docs/results/paper.md"],
    "Working on it": ["docs/architecture.md", "CONTRIBUTING.md", "docs/dependencies.md", "CHANGELOG.md"],
}


def documents() -> list[Path]:
    """Those that are pages of the site."""
    return sorted(path for pattern in DOCUMENTS for path in ROOT.glob(pattern))


def sections() -> dict[str, list[str]]:
    """`SECTIONS` with the pages that it does not name."""
    found = {name: list(pages) for name, pages in SECTIONS.items()}
    named = {page for pages in found.values() for page in pages}
    rest = [name for path in documents() if (name := path.relative_to(ROOT).as_posix()) not in named]
    found["Results"] += [name for name in rest if name.startswith("docs/results/")]
    if others := [name for name in rest if not name.startswith("docs/results/")]:
        found["More"] = others
    return found


def linked(document: Path) -> set[Path]:
    """The files of this repository that a document links to, or shows."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = {(document.parent / link).resolve() for link in LINK.findall(text)}
    return {path for path in found if path.is_file() and path.is_relative_to(ROOT)}


def prepare() -> Path:
    """Fills the folder that mkdocs reads; its configuration, which is docs/mkdocs.yml with the list of pages."""
    source, pages = BUILD / "site_source", documents()
    shutil.rmtree(source, ignore_errors=True)
    for path in {*pages, *(file for page in pages for file in linked(page))}:
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    config: dict[str, Any] = {"INHERIT": str(ROOT / "docs" / "mkdocs.yml")}
    config |= {"docs_dir": "site_source", "site_dir": "site"}
    config["nav"] = [{name: pages} for name, pages in sections().items()]
    (BUILD / "mkdocs.yml").write_text(json.dumps(config, indent=2), encoding="utf-8")  # json is yaml, too
    return BUILD / "mkdocs.yml"


if __name__ == "__main__":
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(prepare())]
    sys.exit(subprocess.call(command, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}))
