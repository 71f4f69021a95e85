"""Shows docstrings in the documentation as the plain text that they are.

mkdocstrings loads it (mkdocs.yml) and would otherwise read them as Markdown, of which they only use
backticks.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(r"(`[^`]*`)", re.DOTALL)


class PlainDocstrings(griffe.Extension):
    """Escapes what Markdown would take for emphasis, links or HTML."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value, module=obj.is_module)


def plain(text: str, *, module: bool = False) -> str:
    """The text with special characters escaped; a module's indented lines become code blocks."""
    parts: list[str] = []
    for indented, lines in _groups(text.splitlines(), split=module):
        joined = "\n".join(lines)
        if indented:
            parts.append(f"\n{joined}\n")
        else:
            pieces = CODE.split(joined)
            parts.append("".join(p if i % 2 else _escaped(p) for i, p in enumerate(pieces)))
    return "\n".join(parts)


def _groups(lines: list[str], *, split: bool) -> list[tuple[bool, list[str]]]:
    """Runs of lines that are indented, or are not; an empty line belongs to the run before it."""
    groups: list[tuple[bool, list[str]]] = []
    for line in lines:
        indented = split and line.startswith("    ")
        if groups and (not line or groups[-1][0] == indented):
            groups[-1][1].append(line)
        else:
            groups.append((indented, [line]))
    return groups


def _escaped(text: str) -> str:
    return re.sub(r"([\[\]]|(?<=\S)\*|\*(?=\S))", r"\\\1", text).replace("<", "&lt;")
