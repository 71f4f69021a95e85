"""Pivoted tables: one metric, methods by cells.

A comparison has a line for every combination of a method and the conditions that it was measured
under (see `cells.py`). With several conditions, methods are easier to compare side by side: a
pivoted table has a row per method and a column per cell, with the numbers, marks and tests of the
comparison. Its columns are copies of the metric that are named after their cells, so that every
format of `table.py` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedprompt.reports.compare.cells import cell_keys, cell_name, method_names
from fedprompt.reports.compare.load import Row
from fedprompt.reports.compare.notes import reading_note
from fedprompt.reports.compare.statistics import Cell, Test
from fedprompt.reports.compare.table import Comparison

USUAL = ("personal", "global")
"""Metrics that have a pivoted table unless the user chooses metrics."""


def pivots(
    table: Comparison, rows: Sequence[Row], test: Test = "t", metrics: Sequence[str] = USUAL
) -> list[Comparison]:
    """Turn the columns of a comparison into tables of methods by cells.

    Args:
        table: The comparison.
        rows: Its rows.
        test: The test that the comparison was made with.
        metrics: Names of the columns to turn; those that the comparison lacks are left out.

    Returns:
        A table per metric, or none if the rows are of one method, were measured under one
        condition, or no method was measured under two.
    """
    keys = cell_keys(rows)
    methods = method_names(rows)
    places = [(method, cell_name(row, keys)) for method, row in zip(methods, rows, strict=True)]
    down, across = (list(dict.fromkeys(place[axis] for place in places)) for axis in (0, 1))
    # Two sweeps may call different settings by the same name; such rows stay in the long table.
    if min(len(down), len(across)) < 2 or len(down) == len(rows) or len(set(places)) < len(places):
        return []
    tables = []
    for name in metrics:
        i = next((i for i, metric in enumerate(table.metrics) if metric.name == name), None)
        if i is None:
            continue
        found = {place: line[i] for place, line in zip(places, table.cells, strict=True)}
        cells = tuple(
            tuple(found.get((method, cell), Cell({})) for cell in across) for method in down
        )
        metric = table.metrics[i]
        tables.append(
            Comparison(
                metrics=tuple(replace(metric, name=f"{name}: {c}", title=c) for c in across),
                names=tuple(down),
                cells=cells,
                note=reading_note(rows, cells, test, pivoted=True),
                title=f"{metric.title[:1].upper()}{metric.title[1:]}, by condition",
                name=name,
            )
        )
    return tables
