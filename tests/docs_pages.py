"""README and documentation pages: their code blocks, links and anchors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: README and other pages of the project, the documentation, and the examples.
PAGES = [
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md", "examples/**/README.md")
    for path in sorted(ROOT.glob(pattern))
]
FENCE = re.compile(r"^( *)(`{3,}|~{3,})\s*([^\s`]*)[^`]*$")


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block: its place, its language ("" without one) and its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def parts(page: str, text: str) -> Iterator[Block | tuple[int, str]]:
    """The fenced blocks of a page, and (number, line) of all lines outside of fenced blocks."""
    lines = enumerate(text.splitlines(), 1)
    for number, line in lines:
        opening = FENCE.match(line)
        if not opening:
            yield number, line
            continue
        indent, fence, language = opening.groups()
        body = []
        for _, inner in lines:
            if inner.strip() == fence:
                break
            body.append(inner.removeprefix(indent))
        yield Block(page, number, language, "\n".join(body) + "\n")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    return [part for part in parts(name_of(page), page.read_text(encoding="utf-8")) if isinstance(part, Block)]


def prose(page: Path) -> list[tuple[int, str]]:
    """(number, line) of all lines outside of fenced blocks."""
    return [part for part in parts(name_of(page), page.read_text(encoding="utf-8")) if not isinstance(part, Block)]


def indented_code(lines: list[tuple[int, str]]) -> list[int]:
    """Lines that begin a code block by indentation. Such a block has no language, so it cannot be checked."""
    found, in_list, before = [], False, ""
    for number, line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent < 2:
            in_list = re.match(r"[*+-] |\d+[.)] ", line.lstrip()) is not None
        elif line.strip() and not before.strip() and indent >= (6 if in_list else 4):
            found.append(number)
        before = line
    return found
