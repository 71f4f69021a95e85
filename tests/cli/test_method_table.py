"""The generated table of methods: every one is in it, and the documentation has the present one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedprompt.cli.method_table import method_rows, method_table, methods_markdown
from fedprompt.methods.registry import all_methods
from tests.support import ROOT

PAGE = ROOT / "docs" / "methods.md"


@pytest.fixture(scope="module")
def rows() -> dict[str, tuple[str, ...]]:
    return {row[0]: row for row in method_rows()}


def test_it_names_every_method(rows: dict[str, tuple[str, ...]]) -> None:
    assert list(rows) == list(all_methods())


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("fedrsclip", 4 * 512),
        ("promptfl", 16 * 512),
        ("cocoop", 4 * 512 + 512 * 32 + 32 + 32 * 512 + 512),
        ("maple", 9 * 2 * 512),
        ("promptsrc", 9 * 4 * (512 + 768)),
        ("fedclip", 2 * (512 * 512 + 512)),
        ("fedmgp", 2 * 2 * (512 + 768)),
        ("zero_shot", 0),
    ],
)
def test_uploads_are_the_papers(rows: dict[str, tuple[str, ...]], name: str, numbers: int) -> None:
    assert rows[name][3] == f"{numbers:,}"


@pytest.mark.parametrize("width", [200, 80, 50])
def test_it_is_printed_whole(rows: dict[str, tuple[str, ...]], width: int) -> None:
    out = io.StringIO()
    Console(width=width, file=out).print(method_table(width))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    line = next(x for x in text.splitlines() if x.startswith(" fedrsclip ") and "2,048" in x)
    assert line
    for name, cells in rows.items():
        found = [x for x in text.splitlines() if x.startswith(f" {name} ")]
        assert any(cells[3] in x for x in found), name
        assert any(cells[7].split()[0] in x for x in found), name


def test_the_page_is_the_present_one() -> None:
    assert PAGE.read_text() == methods_markdown(), (
        "write it again: fedprompt methods --markdown > docs/methods.md"
    )
