"""The table of methods has a row for every method, and numbers that follow from the papers."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

import fedprompt.cli.method_table as method_table_module
from fedprompt.cli.method_table import method_rows, method_table, methods_json, stored_rows
from fedprompt.methods.registry import METHODS


@pytest.fixture(scope="module")
def rows() -> dict[str, tuple[str, ...]]:
    # `tests/docs` compares the stored rows with new ones, which take seconds.
    return {row[0]: row for row in method_rows()}


def test_it_names_every_method(rows: dict[str, tuple[str, ...]]) -> None:
    assert list(rows) == METHODS.names()


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
    assert rows[name][4] == f"{numbers:,}"


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
        assert any(cells[4] in x for x in found), name
        assert any(cells[1].split()[0] in x for x in found), name


def test_a_method_that_is_not_stored_is_computed(
    rows: dict[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fewer = [row for row in stored_rows() if row[0] != "promptfl"]
    (tmp_path / "methods.json").write_text(methods_json(fewer))
    monkeypatch.setattr(method_table_module, "STORED", tmp_path / "methods.json")
    assert {row[0]: row for row in method_rows()} == rows
