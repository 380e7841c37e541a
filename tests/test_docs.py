"""What the documentation says is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lnsdeploy
from lnsdeploy.datapath import load_datapath, named_datapaths
from lnsdeploy.exporters.lower import SUPPORTED

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_python_of_the_readme_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_lowering_page_names_every_operator():
    text = (ROOT / "docs" / "lowering.md").read_text(encoding="utf-8")
    for operator in SUPPORTED:
        assert operator in text


def test_every_named_datapath_cites_a_source():
    for name in named_datapaths():
        datapath = load_datapath(name)
        assert datapath.name == name
        assert re.search(r"(19|20)\d\d", datapath.citation), name
        assert datapath.notes


@pytest.mark.smoke
def test_public_names_resolve():
    for name in lnsdeploy.__all__:
        assert getattr(lnsdeploy, name) is not None
    assert set(dir(lnsdeploy)) == set(lnsdeploy.__all__)
    with pytest.raises(AttributeError):
        _ = lnsdeploy.nothing_of_the_kind


def test_readme_and_changelog_name_this_version():
    assert re.search(
        r"^## (Unreleased|\[?" + re.escape(lnsdeploy.__version__) + ")", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
