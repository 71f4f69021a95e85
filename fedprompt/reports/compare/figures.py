"""Figures of a comparison: curves with bands over seeds, accuracy over bytes, clients, heat maps.

A row of the comparison has the same colour in every figure.

Shapes: R rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedprompt.errors import UserError
from fedprompt.reports.compare.load import Row, differing, score_of
from fedprompt.reports.compare.metrics import Kind, Metric
from fedprompt.reports.compare.names import plain
from fedprompt.reports.figure import (
    ACCURACY,
    PALETTE,
    ROUND,
    Axis,
    Boxes,
    Curve,
    Figure,
    Format,
    Heat,
    Lines,
    palette,
)
from fedprompt.reports.figure_parts import box
from fedprompt.reports.format import MISSING
from fedprompt.reports.run_data import RunData, accuracy_of
from fedprompt.reports.score_names import called
from fedprompt.statistics import sample_std

ACCURACIES = (("personal", "mean", "Personalised"), ("global", "accuracy", "Global"))
"""Part and key of a metrics line, and the title of its panel."""
AT_FIRST = PALETTE
"""Number of curves shown before the reader switches on others: as many as there are colours."""
FORMATS: dict[Kind, Format] = {
    "share": "percent", "number": "number", "count": "count", "bytes": "bytes", "seconds": "number",
}  # fmt: skip


@dataclass(frozen=True)
class SeedCurve:
    """Mean and standard deviation over seeds in the R rounds that all seeds have measured.

    Attributes:
        rounds_R: Round numbers.
        bytes_R: Bytes sent up and down until then by all clients, as a mean over seeds.
        mean_R: Mean accuracy over seeds, in [0, 1].
        std_R: Sample standard deviation over seeds; None for one seed.
    """

    rounds_R: list[int]
    bytes_R: list[float]
    mean_R: list[float]
    std_R: list[float | None]


def seed_curve(row: Row, part: str, key: str) -> SeedCurve:
    """Average one row's accuracy over its seeds, round by round.

    Args:
        row: The row.
        part: A part of a metrics line, e.g. "global".
        key: The key of the accuracy in that part.
    """
    by_seed = [_points(run, part, key) for run in row.runs.values()]
    # Only rounds that all seeds have: otherwise the mean would jump where a seed drops out.
    rounds = sorted(set.intersection(*(set(points) for points in by_seed)))
    sent = [[points[r][0] for points in by_seed] for r in rounds]
    values = [[points[r][1] for points in by_seed] for r in rounds]
    return SeedCurve(
        rounds,
        [float(np.mean(x)) for x in sent],
        [float(np.mean(x)) for x in values],
        [sample_std(x) for x in values],
    )


def _points(run: RunData, part: str, key: str) -> dict[int, tuple[float, float]]:
    """Return by round the bytes sent so far, and the accuracy."""
    points, sent = {}, 0.0
    for line in run.rounds:
        sent += (line.get("bytes_up") or 0) + (line.get("bytes_down") or 0)
        value = (line.get(part) or {}).get(key)
        if value is not None:
            points[int(line["round"])] = sent, float(value)
    return points


def curves_figure(rows: Sequence[Row], *, over_bytes: bool = False) -> Figure | None:
    """Describe personalised and global accuracy per round, or over the bytes sent.

    Args:
        rows: The rows of the comparison.
        over_bytes: Whether the horizontal axis shows the traffic instead of the round.

    Returns:
        The figure, None if no run has measured these accuracies.
    """
    x = ROUND
    if over_bytes:
        x = Axis(
            label="Bytes up and down, all clients", noun="after", format="bytes", log=True
        )  # fmt: skip
    panels = [
        Lines(curves=curves, x=x, y=replace(ACCURACY, label=title), nearest=over_bytes)
        for part, key, title in ACCURACIES
        if (curves := _curves(rows, part, key, over_bytes=over_bytes))
    ]
    if not panels:
        return None
    drawn = max(len(panel.curves) for panel in panels)
    caption = "Mean over seeds. Band: ± 1 standard deviation over seeds."
    if drawn > AT_FIRST:
        caption += f" Shown are the best {AT_FIRST} of {drawn} rows."
    return Figure(
        name="bytes" if over_bytes else "curves",
        title=f"Accuracy over {'bytes sent' if over_bytes else 'rounds'}",
        caption=caption,
        panels=panels,
    )


def _curves(rows: Sequence[Row], part: str, key: str, *, over_bytes: bool) -> list[Curve]:
    measured = [seed_curve(row, part, key) for row in rows]
    last = sorted((curve.mean_R[-1] for curve in measured if curve.mean_R), reverse=True)
    # Curves at least as good as this one are shown at first; ties may add some.
    least = last[min(AT_FIRST, len(last)) - 1] if last else 0.0
    ends = _ends(measured, over_bytes=over_bytes)
    curves = []
    for i, (row, points) in enumerate(zip(rows, measured, strict=True)):
        x = points.bytes_R if over_bytes else [float(r) for r in points.rounds_R]
        untrained = points.rounds_R == [0]
        if untrained and ends:
            # What trains nothing has one accuracy, which holds for every round and any traffic.
            points, x = _level(points), list(ends)
        # A logarithmic axis cannot show round 0, before which nothing was sent.
        places = [k for k, value in enumerate(x) if value > 0 or not over_bytes]
        if not places:
            continue
        curves.append(
            Curve(
                name=row.name,
                color=palette(i),
                x=[x[k] for k in places],
                y=[points.mean_R[k] for k in places],
                spread=[points.std_R[k] for k in places] if len(row.runs) > 1 else None,
                # Colours repeat after the palette; dashes keep the repeated ones apart.
                dashed=i >= PALETTE or untrained,
                on=points.mean_R[-1] >= least,
            )
        )
    return curves


def _ends(measured: Sequence[SeedCurve], *, over_bytes: bool) -> tuple[float, float] | None:
    """Return the lowest and the highest x of the curves that were trained, None without any."""
    x = [
        float(value)
        for points in measured
        if points.rounds_R and points.rounds_R != [0]
        for value in (points.bytes_R if over_bytes else points.rounds_R)
        if value > 0 or not over_bytes
    ]
    return (min(x), max(x)) if x and min(x) < max(x) else None


def _level(points: SeedCurve) -> SeedCurve:
    """Repeat the only point of a curve, so that it becomes a horizontal line."""
    return SeedCurve([0, 0], points.bytes_R * 2, points.mean_R * 2, points.std_R * 2)


def clients_figure(rows: Sequence[Row]) -> Figure | None:
    """Describe box plots of the clients' own accuracies over all seeds; None without data."""
    accuracies = [client_accuracies(row) for row in rows]
    groups = [
        box(row.name, palette(i), values)
        for i, (row, values) in enumerate(zip(rows, accuracies, strict=True))
        if values
    ]
    if not groups:
        return None
    axis = replace(ACCURACY, label="Accuracy on own test images")
    return Figure(
        name="clients",
        title="Accuracy of the clients",
        caption="As measured last, clients of all seeds together. Box: quartiles; notch: median; "
        "line: lowest to highest.",
        panels=[Boxes(groups=groups, x=axis, noun="accuracies")],
        wide=len(groups) > AT_FIRST,
    )


def client_accuracies(row: Row) -> list[float]:
    """Return every client's last accuracy on its own test images, for all seeds."""
    return [a for run in row.runs.values() for a in accuracy_of(run.last("personal")).values()]


def heat_figure(rows: Sequence[Row], keys: tuple[str, str], metric: Metric) -> Figure:
    """Describe a map of one metric over two settings, with the number in every cell.

    Args:
        rows: The rows of the comparison.
        keys: The settings along the horizontal and the vertical axis.
        metric: What is shown, as a mean over seeds.

    Raises:
        UserError: A setting is unknown, or two rows share a cell because they differ in something
            else as well.
    """
    across, down, means = heat_values(rows, keys, metric)
    panel = Heat(
        rows=[plain(value) for value in down],
        columns=[plain(value) for value in across],
        cells=[[None if math.isnan(mean) else float(mean) for mean in line] for line in means],
        name=metric.title,
        format=FORMATS[metric.kind],
        x=Axis(label=keys[0]),
        y=Axis(label=keys[1]),
        missing=MISSING,
    )
    title = metric.title[:1].upper() + metric.title[1:]
    return Figure(
        name="heat",
        title=f"{title} over {keys[0]} and {keys[1]}",
        caption=f"Mean over seeds. Columns: {keys[0]}; rows: {keys[1]}.",
        panels=[panel],
    )


def heat_values(
    rows: Sequence[Row], keys: tuple[str, str], metric: Metric
) -> tuple[list[Any], list[Any], np.ndarray[Any, np.dtype[np.float64]]]:
    """Compute the numbers of a heat map.

    Args:
        rows: The rows of the comparison.
        keys: The settings along the horizontal and the vertical axis.
        metric: What is shown.

    Returns:
        The X values of the first setting, the Y values of the second one, and the metric's means
        over seeds (Y, X), NaN where there is none.

    Raises:
        UserError: A setting is unknown, or two rows share a cell because they differ in something
            else as well.
    """
    for key in keys:
        if not all(key in row.settings for row in rows):
            raise UserError(f"compare: --heat: not all runs have the setting '{key}'.")
    across, down = (_values(rows, key) for key in keys)
    means = np.full((len(down), len(across)), math.nan)
    owner: dict[tuple[int, int], Row] = {}
    for row in rows:
        values = metric.by_seed(row)
        place = _index(down, row.settings[keys[1]]), _index(across, row.settings[keys[0]])
        if place in owner:
            settings = differing([row, owner[place]])
            raise UserError(
                f"compare: --heat: '{row.name}' and '{owner[place].name}' share one cell because "
                f"they differ in {', '.join(settings)}. Choose one of them with --where KEY=VALUE."
            )
        owner[place] = row
        if values:
            means[place] = float(np.mean(list(values.values())))
    return across, down, means


def swept_settings(rows: Sequence[Row]) -> tuple[str, str] | None:
    """Return the two settings that rows vary independently, None unless there are exactly two."""
    keys = differing(rows)
    if len(keys) != 2 or any(key not in row.settings for row in rows for key in keys):
        return None
    cells = math.prod(len(_values(rows, key)) for key in keys)
    # Settings that always change together fill little more than the diagonal of the map.
    return (keys[0], keys[1]) if 2 * len(rows) > cells else None


def comparison_figures(rows: Sequence[Row]) -> list[Figure]:
    """Describe learning curves, accuracy over bytes, and clients, where there is data for them."""
    figures = [curves_figure(rows), curves_figure(rows, over_bytes=True), clients_figure(rows)]
    return [called(score_of(rows), figure) for figure in figures if figure is not None]


def _values(rows: Sequence[Row], key: str) -> list[Any]:
    """Return a setting's different values: numbers ascending, others in the order of the rows."""
    values: list[Any] = []
    for row in rows:
        if not any(_same(value, row.settings[key]) for value in values):
            values.append(row.settings[key])
    # Rows come in the order of the file, but a numeric axis should ascend.
    numbers = all(isinstance(v, (int, float)) for v in values)
    return sorted(values) if numbers else values


def _index(values: Sequence[Any], wanted: Any) -> int:
    return next(i for i, value in enumerate(values) if _same(value, wanted))


def _same(a: Any, b: Any) -> bool:
    # True == 1 in Python, but they are different settings.
    return type(a) is type(b) and a == b
