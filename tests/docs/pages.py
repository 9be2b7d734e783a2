"""The project's documents, and what is in them: code blocks, headings, links."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
TOP = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES = [*TOP, *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    text: str


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page."""
    found = [Block(match[2], match[3]) for match in FENCE.finditer(page.read_text())]
    return [block for block in found if language is None or block.language == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks and comments."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", page.read_text()), flags=re.DOTALL)


def spans(page: Path) -> Iterator[str]:
    """Inline code."""
    return (match[1] for match in re.finditer(r"`([^`]+)`", prose(page)))


def follow(page: str, **given: Any) -> dict[str, Any]:
    """Execute the Python blocks of a page one after the other, as a reader would; and what they have defined."""
    scope: dict[str, Any] = {"__name__": "page", **given}
    for block in blocks(DOCS / page, "python"):
        exec(compile(block.text, page, "exec"), scope)
    return scope
