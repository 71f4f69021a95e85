"""Draws bar charts, stacked or side by side, with matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fedprompt.reports.draw_style import (
    GREY,
    INK,
    NAMED,
    VALUES,
    draw_level,
    label_axes,
    legend_above,
    shorten,
    style,
)
from fedprompt.reports.figure import COLOURS, Bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes


WRITTEN = 18
"""Up to this many bars have their value written above them."""


def draw_bars(axes: Axes, panel: Bars) -> None:
    """Draw bars with notches, error bars and reference lines.

    Args:
        axes: Where to draw.
        panel: What to draw.
    """
    style(axes)
    count = len(panel.labels)
    places = np.arange(count)
    base = np.zeros(count)
    width = 0.8 if panel.stacked else 0.8 / max(1, len(panel.series))
    for i, series in enumerate(panel.series):
        known = [k for k, value in enumerate(series.values) if value is not None]
        if not known:
            continue  # A legend would show a series without bars in a colour of its own.
        values = np.array([series.values[k] for k in known], dtype=float)
        at = places[known] + (0.0 if panel.stacked else (i + 0.5) * width - 0.4)
        bottom = base[known] if panel.stacked else None
        axes.bar(
            at, values, width * (1 if panel.stacked else 0.92), bottom=bottom,
            color=COLOURS[series.color], alpha=0.6, label=series.name,
        )  # fmt: skip
        if panel.stacked:
            base[known] += values
            continue
        spread = [(series.spread or [None] * count)[k] for k in known]
        _finish_bars(axes, panel, at, values, spread)
    _mark_bars(axes, panel)
    for level in panel.levels:
        draw_level(axes, level)
    label_axes(axes, panel.x, panel.y)
    _name_bars(axes, panel)
    axes.set_xlim(-0.6, count - 0.4)
    if panel.y.high is not None:
        # The value above a bar of full height must still fit.
        axes.set_ylim(0, panel.y.high * (1.08 if _written(panel) else 1))
    if len(panel.series) + len(panel.levels) > 1 or panel.marks is not None:
        legend_above(axes)


def _written(panel: Bars) -> bool:
    return not panel.small and len(panel.labels) * len(panel.series) <= WRITTEN


def _finish_bars(
    axes: Axes, panel: Bars, at: np.ndarray, values: np.ndarray, spread: list[float | None]
) -> None:
    """Draw error bars, and write values where there is room.

    Args:
        axes: Where to draw.
        panel: What is drawn, for the format of values.
        at: (B,) horizontal positions of the bars.
        values: (B,) heights of the bars.
        spread: B half lengths of error bars, None for a bar without one.
    """
    write = VALUES[panel.y.format]
    size = 8.5 if len(panel.labels) * len(panel.series) <= 9 else 7
    for x, value, half in zip(at, values, spread, strict=True):
        if half is not None:
            axes.errorbar(x, value, half, color=INK, lw=1, capsize=3)
        if _written(panel):
            axes.annotate(
                write(value).removesuffix(" %"), (x, value + (half or 0)), xytext=(0, 2),
                textcoords="offset points", ha="center", color=INK, fontsize=size,
            )  # fmt: skip


def _mark_bars(axes: Axes, panel: Bars) -> None:
    count = len(panel.labels)
    if panel.missing:
        absent = [
            k for k in range(count) if all(series.values[k] is None for series in panel.series)
        ]
        if absent:
            axes.plot(absent, np.full(len(absent), 0.02), "x", color=GREY, ms=5,
                      label=panel.missing.capitalize())  # fmt: skip
    if panel.marks is not None:
        known = [(k, value) for k, value in enumerate(panel.marks.values) if value is not None]
        width = max(2.0, min(16.0, 300 / count))
        axes.plot([k for k, _ in known], [value for _, value in known], "_", color=INK, ms=width,
                  mew=2, label=panel.marks.name)  # fmt: skip


def _name_bars(axes: Axes, panel: Bars) -> None:
    """Label as many bars as there is room for; long labels are rotated."""
    names = [shorten(label) for label in panel.labels]
    letters = max((len(name) for name in names), default=0) + 2
    # Numbers can be thinned out, since a reader infers those in between; words cannot.
    words = any(character.isalpha() for name in names for character in name)
    turned = words and letters * len(names) > 84
    step = math.ceil(len(names) / NAMED) if turned else math.ceil(letters * len(names) / 84)
    ticks = range(0, len(names), max(1, step))
    axes.set_xticks(ticks, names[:: max(1, step)], parse_math=False, fontsize=9)
    if turned:
        axes.tick_params(axis="x", labelrotation=90 if len(names) > 12 else 60)
