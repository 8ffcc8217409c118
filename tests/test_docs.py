"""The documents as a site: every page is in its list, and what pages link to goes along."""

import importlib.util
import json
import shutil
import sys

import pytest


@pytest.fixture
def site(root, monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("build_site", root / "docs" / "build_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BUILD", tmp_path)
    return module


def test_every_document_is_in_the_list_once(site, root):
    named = [page for pages in site.SECTIONS.values() for page in pages]
    assert all((root / page).is_file() for page in named)
    listed = [page for pages in site.sections().values() for page in pages]
    assert sorted(listed) == sorted(path.relative_to(root).as_posix() for path in site.documents())
    assert "docs/results/gpu.md" in site.sections()["Results"]
    site.SECTIONS["Using it"].remove("docs/data.md")
    assert "docs/data.md" in site.sections()["More"]


def test_what_documents_link_to_goes_along(site, root, tmp_path):
    config, source = json.loads(site.prepare().read_text()), tmp_path / "site_source"
    assert {"Start": ["README.md", "docs/gallery.md"]} in config["nav"]
    for page in site.documents():
        assert all((source / file.relative_to(root)).is_file() for file in site.linked(page))
    for name in ("docs/results/demo.png", "docs/results/report_curves.png", "tests/data/pairs.parquet", "README.md"):
        assert (source / name).is_file()
    site.ROOT, page = source, source / "docs" / "x.md"
    page.write_text(
        "[a](gallery.md#x) ![b](results/demo.png) [c](https://d.e/f.md) [g](#h)\n```\n[i](report.md)\n```\n"
    )
    assert {path.name for path in site.linked(page)} == {"gallery.md", "demo.png"}
    page.write_text("[of another folder](../../../x.md)")
    assert site.linked(page) == set()


def test_the_site_is_built_where_its_tool_is(site, root, tmp_path, run_command):
    pytest.importorskip("material")
    site.prepare()
    clone = tmp_path / "clone"
    shutil.copytree(tmp_path / "site_source", clone)
    for name in ("build_site.py", "mkdocs.yml"):
        shutil.copyfile(root / "docs" / name, clone / "docs" / name)
    built = run_command([sys.executable, clone / "docs" / "build_site.py"])
    assert built.returncode == 0, built.stdout
    assert "Reports of runs" in (clone / "build" / "site" / "docs" / "gallery.html").read_text()
    with (clone / "docs" / "report.md").open("a") as file:
        file.write("[to nowhere](nothing.md)\n")
    assert run_command([sys.executable, clone / "docs" / "build_site.py"]).returncode != 0
