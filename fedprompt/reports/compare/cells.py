"""Groups the rows of a comparison into cells: rows that were measured under the same conditions.

Methods are comparable only on the same data: the same data set, classes, partition, clients, shots
and backbone, and the same value of every setting that a sweep varies in its grid. The best row is
marked, and significance is tested, within one cell (see `table.py`); a pivoted table shows methods
by cells (see `pivot.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from fedprompt.reports.compare.load import Row, differing
from fedprompt.reports.compare.names import describe, plain

CONDITIONS = ("data", "partition", "backbone", "protocol_options")
"""Sections of a config that say what a method is measured on."""
CHOICES = ("method", "strategy")
"""Sections that are compared, even where a sweep varies them in its grid."""
COMPUTING = (
    "backbone.device", "backbone.precision", "backbone.deterministic", "backbone.cuda_graphs",
    "backbone.image_batch", "data.views", "data.crop_scale",
)  # fmt: skip
"""Settings of these sections that do not change what is measured."""
FIRST = ("data.title", "backbone.model", "partition.scheme")
"""Settings that name a cell best; others follow in the order of the config."""


def cell_keys(rows: Sequence[Row]) -> list[str]:
    """Return the settings that tell the cells of these rows apart, as few as possible.

    Args:
        rows: The rows of the comparison.

    Returns:
        Keys of settings, empty if all rows are comparable.
    """
    keys = [key for key in differing(rows) if _is_condition(key, rows)]
    keys.sort(key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))
    # Choosing another data set changes its title, its classes and more at once, and one of them is
    # enough to name it: a key is used only if it tells rows apart that the earlier keys do not.
    chosen: list[str] = []
    for key in keys:
        if len({_values(row, [*chosen, key]) for row in rows}) > len(
            {_values(row, chosen) for row in rows}
        ):
            chosen.append(key)
    return chosen


def cells_of(rows: Sequence[Row]) -> list[list[int]]:
    """Return the indices of the rows of every cell, cells in the order of their first rows."""
    keys = cell_keys(rows)
    cells: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        cells.setdefault(_values(row, keys), []).append(i)
    return list(cells.values())


def cell_name(row: Row, keys: Sequence[str]) -> str:
    """Return the name of a row's cell, for example `optimal31, alpha 0.1`.

    Args:
        row: A row.
        keys: The settings that tell cells apart, from `cell_keys`.
    """
    return ", ".join(described(row, key) for key in keys if row.settings.get(key) is not None)


def method_names(rows: Sequence[Row]) -> list[str]:
    """Return what is compared in every row: its name without its cell.

    A row of a sweep is named as in the sweep's file, any other row by the settings that differ.

    Args:
        rows: The rows of the comparison.
    """
    # A setting that only some rows have belongs to their method, whose name tells them apart.
    keys = [
        key
        for key in differing(rows)
        if not _is_condition(key, rows) and all(key in row.settings for row in rows)
    ]
    names = []
    for row in rows:
        if row.label or row.grid:
            chosen = {k: v for k, v in row.grid.items() if k.partition(".")[0] in CHOICES}
            parts = [row.label, describe(chosen)]
        else:
            parts = [described(row, key) for key in keys]
        names.append(
            ", ".join(filter(None, parts)) or plain(row.settings.get("method.name", "run"))
        )
    return names


def described(row: Row, key: str) -> str:
    """Return a setting of a row in words: `alpha 0.1`, or the name alone of what has one."""
    value = plain(row.settings.get(key))
    return value if key.endswith((".name", ".title", ".model")) else f"{key.split('.')[-1]} {value}"


def _is_condition(key: str, rows: Sequence[Row]) -> bool:
    section = key.partition(".")[0]
    if section in CHOICES:
        return False
    if section in CONDITIONS and key not in COMPUTING:
        return True
    return any(key in row.grid or section in row.grid for row in rows)


def _values(row: Row, keys: Sequence[str]) -> tuple[str, ...]:
    # `repr` because 1, 1.0 and True are equal in Python but not as settings.
    return tuple(repr(row.settings.get(key)) for key in keys)
