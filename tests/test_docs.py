"""The documents as a site: every page is in its list, and what pages link to goes along."""

import importlib.util
import re
import shutil

import pytest


@pytest.fixture
def site(root, monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("build_site", root / "docs" / "build_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SOURCE", tmp_path / "source")
    return module


def test_every_document_is_in_the_list_once(site, root):
    listed = re.findall(r"^ +- (?:[\w ]+: )?(\S+\.md)$", (root / "docs" / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(root).as_posix() for path in site.documents())


def test_what_documents_link_to_goes_along(site, root):
    site.copy()
    for page in site.documents():
        assert all((site.SOURCE / file.relative_to(root)).is_file() for file in site.linked(page))
    names = (
        "docs/results/demo.png",
        "docs/results/report_curves.png",
        "tests/data/pairs.parquet",
        "examples/score_file.py",
    )
    assert all((site.SOURCE / name).is_file() for name in names)
    text = "[a](gallery.md#x) ![b](results/demo.png) [c](https://d.e/f.md) [g](#h)\n```\n[i](report.md)\n```\n"
    (site.SOURCE / "docs" / "x.md").write_text(text)
    assert {path.name for path in site.linked(site.SOURCE / "docs" / "x.md")} == set()  # of other folders: none
    site.ROOT = site.SOURCE
    assert {path.name for path in site.linked(site.SOURCE / "docs" / "x.md")} == {"gallery.md", "demo.png"}


def test_the_site_is_built_where_its_tool_is(site, root, tmp_path, run_command):
    pytest.importorskip("material")
    clone = tmp_path / "clone"
    site.copy()
    shutil.copytree(site.SOURCE, clone)
    for name in ("build_site.py", "mkdocs.yml"):
        shutil.copyfile(root / "docs" / name, clone / "docs" / name)
    built = run_command(["python", clone / "docs" / "build_site.py"])
    assert built.returncode == 0, built.stdout
    assert "Reports of runs" in (clone / "build" / "site" / "docs" / "gallery.html").read_text()
    with (clone / "docs" / "report.md").open("a") as file:
        file.write("[to nowhere](nothing.md)\n")
    assert run_command(["python", clone / "docs" / "build_site.py"]).returncode != 0
