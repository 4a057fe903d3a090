"""The pages as the tests read them: pages, fenced blocks, commands, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parents[1]
PAGES = [
    *sorted(PROJECT.glob("*.md")),
    *sorted(PROJECT.glob("[pr]*/README.md")),  # patches, requirements
    *sorted((PROJECT / "docs").rglob("*.md")),
]
NOT_RUN = re.compile(r"# not run by the tests[^:]*: \S")
"""With a reason: as a line of its own for the block, behind a command for that command."""
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)


def name(page: Path) -> str:
    return str(page.relative_to(PROJECT))


class Block(NamedTuple):
    page: Path
    language: str
    text: str


class Command(NamedTuple):
    page: Path
    words: tuple[str, ...]
    is_run: bool
    """Nothing says that the tests do not run it."""


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks, without their indentation."""
    for found in _FENCE.finditer(page.read_text()):
        indent, language, text = found.groups()
        yield Block(page, language, re.sub(f"^{indent}", "", text, flags=re.M))


def prose(page: Path) -> str:
    """What is not in a fenced block."""
    return _FENCE.sub("", page.read_text())


def shell_commands(page: Path) -> Iterator[Command]:
    """The commands of the page's shell blocks, `A && B` as two."""
    for block in blocks(page):
        if block.language == "sh":
            yield from _commands(block)


def _commands(block: Block) -> Iterator[Command]:
    block_is_run = True
    waiting = ""
    for line in block.text.splitlines():
        if line.startswith("#"):
            block_is_run = block_is_run and not NOT_RUN.match(line)
            continue
        waiting += line
        if waiting.endswith("\\"):
            waiting = waiting[:-1]
            continue
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:  # A quoted text goes on.
            waiting += "\n"
            continue
        is_run = block_is_run and not NOT_RUN.search(waiting)
        waiting = ""
        while "&&" in words:
            yield Command(block.page, tuple(words[: words.index("&&")]), is_run)
            words = words[words.index("&&") + 1 :]
        if words:
            yield Command(block.page, tuple(words), is_run)
    assert not waiting, f"{name(block.page)}: a quotation without an end"


class Request(NamedTuple):
    path: str
    body: str


def request(words: tuple[str, ...]) -> Request:
    """What a `curl` line of the pages sends to the router."""
    (url,) = (word for word in words if word.startswith("http://"))
    return Request("/" + url.split("/", 3)[3], words[words.index("-d") + 1])


def anchors(page: Path) -> set[str]:
    """What `#...` may name, by GitHub's rules."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
