"""Write the generated pages of docs/ again: methods, server rules, config keys."""

from __future__ import annotations

from pathlib import Path

from fedprompt.cli.method_table import methods_markdown
from fedprompt.cli.reference_pages import config_markdown, strategies_markdown

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {
    "methods.md": methods_markdown,
    "strategies.md": strategies_markdown,
    "config.md": config_markdown,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
