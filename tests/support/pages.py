"""Reports' pages, read back."""

from __future__ import annotations

import base64
import hashlib
import json
from html.parser import HTMLParser
from typing import Any

from fedprompt.files import asset


class Page(HTMLParser):
    """The tags, attributes and table cells of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.scripts: list[tuple[list[tuple[str, str | None]], str]] = []
        self._rows: list[list[str]] | None = None
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append((attrs, ""))
        if tag == "table":
            name = (dict(attrs)["class"] or "").removesuffix(" sortable")
            self._rows = self.tables[name] = []
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append("")
            self._cell = True

    @property
    def figures(self) -> dict[str, Any]:
        """The panels of every figure, by the figure's name."""
        panels: dict[str, Any] = json.loads(self.scripts[0][1])
        return panels

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = attributes, before + data
            return
        text = data.replace("\N{NO-BREAK SPACE}", " ")
        self.text += text
        if self._cell and self._rows is not None:
            self._rows[-1][-1] += text


def only_our_script_runs(html: str) -> None:
    """Two scripts: the figures' data, and the page's own, the only one that its policy allows."""
    page = Page(html)
    (data, content), (own, script) = page.scripts
    assert data == [("type", "application/json"), ("id", "figures")]
    assert not {"<", ">", "&"} & set(content)
    assert own == []
    assert script == asset("reports/assets/charts.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(v for k, v in page.attributes if k == "content" and "default-src" in str(v))
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )


def needs_nothing_else(html: str) -> None:
    """The page loads nothing: no file, no network, no picture."""
    page = Page(html)
    only_our_script_runs(html)
    assert not {"link", "iframe", "object", "a", "embed", "form", "base"} & set(page.tags)
    sources = [value or "" for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert not sources
    assert "url(" not in html
    assert "@import" not in html
    assert "//" not in html
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for word in ("fetch", "XMLHttpRequest", "WebSocket", "import(", "eval", "innerHTML"):
        allowed = 1 if word == "innerHTML" else 0  # of a constant, to learn SVG's namespace
        assert page.scripts[1][1].count(word) == allowed, word
