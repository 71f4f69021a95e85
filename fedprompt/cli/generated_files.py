"""The files of a checkout that are generated from the code: pages, a stored table, sweep rows.

`make docs-pages` writes them all, and a test compares each with what it should contain. So whoever
adds a method, a strategy, a protocol or a config key runs one command and edits none of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fedprompt.cli.backbone_table import with_backbone_table
from fedprompt.cli.method_rows import compute_rows
from fedprompt.cli.method_table import methods_json, methods_markdown
from fedprompt.cli.reference_pages import config_markdown, strategies_markdown
from fedprompt.config.registry import Registry
from fedprompt.evaluation.protocols import PROTOCOLS
from fedprompt.methods.registry import METHODS

PROTOCOL_PAGE, SWEEP = "docs/protocols.md", "configs/sweep/all_methods.yaml"
BACKBONE_PAGE = "docs/backbones.md"


def generated_files(checkout: Path) -> dict[str, Callable[[], str]]:
    """Return for each generated file, by its path in the checkout, a function that makes its text.

    Args:
        checkout: The folder of the checkout. Three files are written by hand except for a table or
            the rows of new methods and protocols, so their present text is read from it.
    """
    # Two files have the rows, and building every method takes seconds.
    rows = cache(lambda: compute_rows(shipped(METHODS)))
    return {
        "docs/methods.md": lambda: methods_markdown(rows()),
        "docs/strategies.md": strategies_markdown,
        "docs/config.md": config_markdown,
        "fedprompt/cli/methods.json": lambda: methods_json(rows()),
        SWEEP: lambda: with_sweep_rows((checkout / SWEEP).read_text(encoding="utf-8")),
        PROTOCOL_PAGE: lambda: with_protocol_rows(
            (checkout / PROTOCOL_PAGE).read_text(encoding="utf-8")
        ),
        BACKBONE_PAGE: lambda: with_backbone_table(
            (checkout / BACKBONE_PAGE).read_text(encoding="utf-8")
        ),
    }


def write_generated_files(checkout: Path) -> list[str]:
    """Write every generated file whose text has changed, and return their paths."""
    changed = []
    for name, make in generated_files(checkout).items():
        text = make()
        path = checkout / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            changed.append(name)
    return changed


def shipped(registry: Registry[Any]) -> list[str]:
    """Return the names without those of other distributions, which our documentation leaves out."""
    return [name for name in registry.names() if name not in registry.added()]


def with_sweep_rows(text: str) -> str:
    """Add to the sweep of all methods, at the end of its rows, each method that it lacks."""
    rows = yaml.safe_load(text)["rows"]
    listed = {
        change.removeprefix("method=")
        for changes in rows.values()
        for change in changes
        if change.startswith("method=")
    }
    lines = [
        f"  {METHODS.get(name).__name__}: [method={name}]\n"
        for name in shipped(METHODS)
        if name not in listed
    ]
    # `quick:` follows the rows in the file, so a lookahead inserts them right before it.
    return re.sub(r"^(?=quick:)", "".join(lines), text, count=1, flags=re.MULTILINE)


def with_protocol_rows(text: str) -> str:
    """Add to the page of protocols, at the end of its table, each protocol that it lacks."""
    rows = list(re.finditer(r"^\| `(\w+)` \|.*\n", text, re.MULTILINE))
    listed: Collection[str] = {row[1] for row in rows}
    lines = [
        f"| `{name}` | {PROTOCOLS.get(name).title} | | |\n"
        for name in shipped(PROTOCOLS)
        if name not in listed
    ]
    end = rows[-1].end()
    return text[:end] + "".join(lines) + text[end:]
