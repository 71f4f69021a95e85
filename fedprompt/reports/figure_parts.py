"""Ready-made parts of figures: histograms, box plots, steps, and bars that compare models.

Shapes: K clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from fedprompt.reports.figure import (
    ACCURACY,
    MODEL_COLOURS,
    Axis,
    Bars,
    BarSeries,
    Box,
    Figure,
    palette,
)

MOST_BARS = 40
"""A histogram of whole numbers that span more values than this has one bar per range of numbers."""


def box(name: str, color: str, values: Sequence[float]) -> Box:
    """Return the box plot of some values: their extremes and quartiles, interpolated linearly.

    Args:
        name: What the values belong to, e.g. a row of a comparison.
        color: The role of its colour.
        values: At least one value.
    """
    low, q1, median, q3, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
    return Box(
        name=name, color=color, count=len(values), low=low, q1=q1, median=median, q3=q3, high=high
    )


def stairs(edges: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the corners of a step curve that has `values[i]` from `edges[i]` to `edges[i + 1]`.

    Args:
        edges: N + 1 positions, in ascending order.
        values: N values.

    Returns:
        2 N positions and 2 N values.
    """
    x = [edge for pair in pairwise(edges) for edge in pair]
    return x, [value for value in values for _ in range(2)]


def shares(values: Sequence[float]) -> tuple[list[str], list[int], list[float]]:
    """Count fractions in 20 equal ranges of [0, 1].

    Returns:
        The labels of the ranges, the number of values in each, and the 21 edges.
    """
    edges = np.linspace(0, 1, 21).tolist()
    labels = [f"{100 * low:.0f}-{100 * high:.0f} %" for low, high in pairwise(edges)]
    return labels, np.histogram(values, edges)[0].tolist(), edges


def count_bars(label: str, values_K: Sequence[int], *, noun: str = "", small: bool = False) -> Bars:
    """Describe how many clients have each whole number, with a bar per number or range of numbers.

    Args:
        label: What is counted per client, e.g. "Training images of a client".
        values_K: One number per client, at least one.
        noun: What the page says before a number.
        small: Whether the panel is a low one below another.
    """
    low, high = min(values_K), max(values_K)
    step = max(1, math.ceil((high - low + 1) / MOST_BARS))
    # One step more than the range needs, so that the last bar includes `high`.
    edges = range(low, high + step + 1, step)
    # Edges between whole numbers, because NumPy's last bin includes its right edge, unlike the
    # others.
    counts = np.histogram(values_K, [edge - 0.5 for edge in edges])[0].tolist()
    return Bars(
        labels=[str(a) if step == 1 else f"{a}-{b - 1}" for a, b in pairwise(edges)],
        series=[BarSeries("clients", "bars", counts)],
        x=Axis(label=label),
        y=Axis(label="Clients", format="count"),
        noun=noun,
        small=small,
    )


def model_bars(
    name: str,
    title: str,
    caption: str,
    groups: Sequence[str],
    models: Mapping[str, Sequence[float | None]],
    spreads: Mapping[str, Sequence[float | None]] | None = None,
) -> Figure:
    """Describe accuracies of models side by side, in the colours of the models.

    Args:
        name: The stem of the figure's file.
        title: The figure's title.
        caption: Whole sentences that say what is drawn.
        groups: What the G groups of bars stand for.
        models: Per model G fractions; None where a model was not measured.
        spreads: Per model G half lengths of error bars.

    Returns:
        A figure with one panel of bars.
    """
    series = [
        BarSeries(
            model,
            MODEL_COLOURS.get(model, palette(i)),
            list(values),
            (spreads or {}).get(model),
        )
        for i, (model, values) in enumerate(models.items())
    ]
    panel = Bars(labels=list(groups), series=series, x=Axis(), y=ACCURACY)
    return Figure(name=name, title=title, caption=caption, panels=[panel])
