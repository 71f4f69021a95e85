"""The generated table of methods: every one is in it, and the documentation has the present one."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from fedprompt.method_table import method_rows, method_table, methods_markdown
from fedprompt.methods import all_methods

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"


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


def test_it_is_printed() -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(method_table())
    text = console.export_text()
    line = next(x for x in text.splitlines() if x.lstrip("│ ").startswith("fedrsclip"))
    assert "2,048" in line


def test_the_page_is_the_present_one() -> None:
    assert PAGE.read_text() == methods_markdown(), (
        "write it again: fedprompt methods --markdown > docs/methods.md"
    )
