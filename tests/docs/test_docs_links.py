"""Nothing in README and docs points to what is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_pages import PAGES, PROJECT, anchors, name, prose

LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|yaml|patch|txt|json|png))`")
NAMED_FOLDER = re.compile(r"`((?:[\w.-]+/)+)`")
MADE_BY_A_RUN = ("results/", "runs/")
NAMED_FROM = (PROJECT, PROJECT / "dualpath_sgl")
"""Pages on the engine leave its folder out."""


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path):
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_a_page_names_exists(page: Path):
    text = prose(page)
    for path in NAMED_FILE.findall(text) + NAMED_FOLDER.findall(text):
        if not path.startswith(MADE_BY_A_RUN):
            assert any((folder / path).exists() for folder in (page.parent, *NAMED_FROM)), path


@pytest.mark.parametrize("index", [PROJECT / "docs/README.md", PROJECT / "docs/notes/README.md"], ids=name)
def test_the_index_names_every_page_of_its_folder(index: Path):
    linked = set(LINK.findall(index.read_text()))
    assert {page.name for page in index.parent.glob("*.md")} - {index.name} <= linked


def test_the_first_page_fits_on_a_screen_and_the_reference_is_one():
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 70
    assert len((PROJECT / "docs/performance.md").read_text().splitlines()) <= 150
