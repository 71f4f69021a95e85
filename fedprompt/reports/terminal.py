"""Tables for the terminal that never truncate a number, whatever the terminal's width.

Columns that do not fit beside the first one continue below, in a further table with the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

LOOK: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1), "pad_edge": False}
"""Few lines, so that names can be copied and the output is readable in a file."""
EDGES, BETWEEN = 2, 3
"""Characters that this look puts around a table, and between two columns."""
LEAST = 8
"""Minimum width of the first column in characters, if the other columns leave it no room."""


@dataclass(frozen=True)
class Field:
    """One column of a table.

    Attributes:
        head: Its heading, which may be wrapped between words.
        cells: Its cells, one per row.
        most: Maximum width in characters before cells are wrapped; 0 means that they never are.
        right: Whether it is aligned to the right, as numbers are.
    """

    head: str
    cells: Sequence[Text]
    most: int = 0
    right: bool = True

    @property
    def width(self) -> int:
        """The width that it needs, in characters; a heading is wrapped between its words."""
        lines = [len(line) for cell in self.cells for line in cell.plain.split("\n")]
        widest = max(lines, default=0)
        word = max((len(word) for word in self.head.split()), default=0)
        return max(word, min(widest, self.most or widest))


def fields(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[str] = (),
    most: Mapping[str, int] | None = None,
) -> list[Field]:
    """Turn a table that is given by rows into columns.

    Args:
        heads: The headings of the columns.
        rows: The rows, with a text for each heading.
        left: Headings of columns aligned to the left; the first column always is.
        most: Maximum widths in characters, by heading, of columns that may be wrapped.
    """
    columns = []
    for i, head in enumerate(heads):
        cells = [Text(row[i]) for row in rows]
        columns.append(Field(head, cells, (most or {}).get(head, 0), i > 0 and head not in left))
    return columns


def fitted(
    first: Field, others: Sequence[Field], width: int, *, title: str = "", note: str = ""
) -> Group:
    """Lay out tables of at most `width` characters that together show all columns.

    Args:
        first: The column that names the rows; every table begins with it.
        others: The other columns.
        width: Width of the terminal, in characters.
        title: A title above the tables.
        note: A note below the tables.
    """
    whole = max((field.width for field in others if not field.most), default=LEAST)
    # The widest unbreakable column must fit beside the names, which are wrapped to make room for
    # it.
    names = max(min(first.width, LEAST), min(first.width, width - EDGES - BETWEEN - whole))
    room = width - EDGES - names
    shown: list[Table | Text] = [Text(title, style="table.title")] if title else []
    for part in _parts(others, room):
        columns = (_column(f, min(f.width, room - BETWEEN) if f.most else f.width) for f in part)
        table = Table(_column(first, names), *columns, **LOOK)
        for row in zip(first.cells, *(f.cells for f in part), strict=True):
            table.add_row(*row)
        shown.append(table)
    return Group(*shown, *([Text(note, style="table.caption")] if note else []))


def _column(field: Field, width: int) -> Column:
    justify: Any = "right" if field.right else "left"
    return Column(Text(field.head), justify=justify, overflow="fold", width=width)


def _parts(fields: Sequence[Field], room: int) -> Iterator[list[Field]]:
    """Split the columns into as many as fit in `room` characters each time, but at least one."""
    part: list[Field] = []
    for field in fields:
        if part and sum(one.width + BETWEEN for one in (*part, field)) > room:
            yield part
            part = []
        part.append(field)
    yield part
