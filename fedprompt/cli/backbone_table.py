"""The table of `docs/backbones.md`: what open_clip's architectures can do."""

from __future__ import annotations

import re

import open_clip

from fedprompt.backbone.zoo import Support, supports

BEGIN, END = "<!-- written by make docs-pages -->", "<!-- end of what is written -->"


def with_backbone_table(text: str) -> str:
    """Replace the table between the two marks of a page."""
    pattern = f"{re.escape(BEGIN)}.*{re.escape(END)}"
    # A function, because a replacement text would treat backslashes in names as escapes.
    return re.sub(pattern, lambda _: f"{BEGIN}\n{_table()}\n{END}", text, flags=re.DOTALL)


def _table() -> str:
    rows = supports()
    count = sum(map(len, rows.values()))
    lines = [
        f"All {count} architectures that open_clip {open_clip.__version__} lists:",
        "",
        "| text prompts | visual prompts | patch features | adapters | architectures |",
        "|---|---|---|---|---|",
        *(_row(support, names) for support, names in rows.items()),
    ]
    return "\n".join(lines)


def _row(support: Support, names: list[str]) -> str:
    text = support.text if support.library == "open_clip" else f"{support.text} (`hf`)"
    cells = (
        text,
        support.visual,
        *("yes" if x else "no" for x in (support.patches, support.adapters)),
    )
    return f"| {' | '.join(cells)} | {', '.join(names)} |"
