"""Renders the notebook of the documentation as a Markdown page, for the site.

The notebook is stored with its outputs, so nothing is executed. Pictures become part of the page.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEAD = "[Download this notebook]({name}). Nothing but fedprompt is needed to run it.\n"


def notebook_markdown(path: Path) -> str:
    """Return the page of a notebook: its texts, its code, and what the code printed and drew.

    Args:
        path: The notebook, in the page's folder, so that relative links in its text stay valid.
    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(_fenced(source, "python"))
        parts += filter(None, (_output(output) for output in cell["outputs"]))
    # Below the title, with which the first text begins.
    title, _, rest = parts[0].partition("\n")
    parts[0] = "\n".join((title, "", HEAD.format(name=path.name), rest))
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    """Return what one output of a cell shows; the text of a picture only says what it is."""
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f"![Figure drawn by the code above](data:image/png;base64,{picture})"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return _fenced(text.rstrip("\n"), "text") if text.strip() else ""


def _fenced(text: str, language: str) -> str:
    # A fence is longer than any run of backticks inside it.
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
