"""Charts of a report as plain data, which the page's own script (assets/charts.js) draws.

A chart's `spec` is JSON: numbers, names and roles of colours (`own`, `server`, `alone`, `c0`...,
see assets/report.css). Accuracies are fractions with the format "percent"; None = not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Format = Literal["percent", "number", "count", "bytes"]
Spec = dict[str, Any]
PALETTE = 8
"""Colours `c0` ... of charts whose series have no role."""
ROUND: Spec = {"label": "Round", "format": "count"}
ACCURACY: Spec = {"format": "percent", "min": 0, "max": 1}


@dataclass(frozen=True)
class Chart:
    """One chart: the id of its element, a title, one line below it, and what is drawn."""

    name: str
    title: str
    caption: str
    spec: Spec
    wide: bool = False


def curve(
    name: str,
    color: str,
    x: Sequence[float],
    y: Sequence[float],
    spread: Sequence[float | None] | None = None,
    *,
    width: float = 2.0,
    dash: bool = False,
    on: bool = True,
) -> Spec:
    """A series of a line chart; `spread` is drawn as a band around it (one point: as a bar).

    Points without a spread have none in the band.
    """
    series: Spec = {"name": name, "color": color, "x": list(x), "y": list(y)}
    series |= {"width": width, "dash": dash, "on": on}
    if spread is not None and any(s is not None for s in spread):
        pairs = [(value, s or 0.0) for value, s in zip(y, spread, strict=True)]
        series["spread"] = list(spread)
        series["low"] = [value - s for value, s in pairs]
        series["high"] = [value + s for value, s in pairs]
    return series


def level(name: str, color: str, value: float) -> Spec:
    """A dashed horizontal line across a line chart."""
    flat: Spec = {"name": name, "color": color, "x": [], "y": [value], "flat": True}
    return flat | {"dash": True, "width": 1.3}


def lines(series: Sequence[Spec], x: Spec, y: Spec, *, nearest: bool = False) -> Spec:
    """A line chart; with `nearest` the pointer finds single points, else all values of one x."""
    return {"kind": "lines", "series": list(series), "x": x, "y": y, "nearest": nearest}


def histogram(
    values: Sequence[float], edges: Sequence[float], marks: Sequence[float] | None = None
) -> tuple[list[int], list[int] | None]:
    """How many values lie between neighbouring edges; likewise for `marks`."""
    counts = np.histogram(values, edges)[0].tolist()
    return counts, None if marks is None else np.histogram(marks, edges)[0].tolist()


def box(name: str, color: str, values: Sequence[float]) -> Spec:
    """A group of a box plot: extremes and quartiles (interpolated) of its values."""
    low, q1, median, q3, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
    group: Spec = {"name": name, "color": color, "n": len(values), "low": low, "q1": q1}
    return group | {"median": median, "q3": q3, "high": high}


def palette(i: int) -> str:
    """The colour of the i-th series."""
    return f"c{i % PALETTE}"


def by_name(charts: Sequence[Chart]) -> Mapping[str, Spec]:
    """What the page's script reads."""
    return {chart.name: chart.spec for chart in charts}
