"""Code blocks and links of the documentation's pages."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its title ("" without one) and its text."""

    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(match[2], match[3] or "", match[4]) for match in found]


def commands(page: Path) -> Iterator[str]:
    """Every `fedprompt` command of a page, in blocks and in running text."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        if block.language in ("bash", "sh"):
            joined = block.text.replace("\\\n", " ")
            yield from (line for line in joined.splitlines() if line.startswith("fedprompt "))
    yield from re.findall(r"`(fedprompt [^`\n]+)`", FENCE.sub("", text))


def source_files(text: str) -> dict[str, str]:
    """The files of the example of a data source in docs/new_dataset.md, by path."""
    section = text.partition("\n## A new kind of source\n")[2]
    paths = re.findall(r"`(\w+/data/[\w/]*array_file\.\w+)`", section)
    contents = [textwrap.dedent(match[4]) for match in FENCE.finditer(section)]
    return dict(zip(dict.fromkeys(paths), contents, strict=True))


def links(page: Path) -> list[str]:
    """Relative targets of a page's links and pictures."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in found if "://" not in target and not target.startswith("#")]
