"""The documents as a site in build/site: `make docs`, or this program where mkdocs-material is installed.

The documents, and all files that they link to, are copied as they lie in the repository; so their links hold in both.
A link that leads nowhere ends it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "build" / "site_source"
DOCUMENTS = ("*.md", "docs/**/*.md", "step*/*.md")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(?:#[^)\s]*)?\)")


def documents() -> list[Path]:
    """Those that are pages of the site."""
    return sorted(path for pattern in DOCUMENTS for path in ROOT.glob(pattern))


def linked(document: Path) -> set[Path]:
    """The files of this repository that a document links to, or shows."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = {(document.parent / link).resolve() for link in LINK.findall(text)}
    return {path for path in found if path.is_file() and path.is_relative_to(ROOT)}


def copy() -> None:
    """Fills the folder that mkdocs reads."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    pages = documents()
    for path in {*pages, *(file for page in pages for file in linked(page))}:
        target = SOURCE / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


if __name__ == "__main__":
    copy()
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(ROOT / "docs" / "mkdocs.yml")]
    sys.exit(subprocess.call(command, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}))
