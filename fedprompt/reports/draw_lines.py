"""Draws curves, bands and reference lines with matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fedprompt.reports.draw_style import (
    DASHES,
    VALUES,
    draw_level,
    label_axes,
    legend_above,
    style,
)
from fedprompt.reports.figure import COLOURS, Curve, Lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes


POINTS = 13
"""A curve with at most this many points marks each of them."""


def draw_lines(axes: Axes, panel: Lines) -> None:
    """Draw curves with their bands, and reference lines.

    Args:
        axes: Where to draw.
        panel: What to draw.
    """
    style(axes)
    for curve in visible(panel):
        _draw_curve(axes, panel, curve)
    for level in panel.levels:
        draw_level(axes, level)
    if panel.x.log:
        axes.set_xscale("log")
    label_axes(axes, panel.x, panel.y)
    _limit_x(axes, panel)
    # The data decide the limits, but never beyond the bounds of the axis, e.g. 0 and 100 %.
    low, high = axes.get_ylim()
    low = low if panel.y.low is None else max(low, panel.y.low)
    high = high if panel.y.high is None or high <= panel.y.high else panel.y.high
    axes.set_ylim(low, high)
    if panel.named_at_ends:
        _name_ends(axes, panel)
    else:
        legend_above(axes, legend_columns(panel))


def visible(panel: Lines) -> list[Curve]:
    """Return the curves to draw: a picture omits those that a page would show only on request."""
    return [curve for curve in panel.curves if curve.on]


def legend_columns(panel: Lines) -> int:
    """Return how many names stand side by side in the legend."""
    longest = max((len(curve.name) for curve in panel.curves), default=0)
    return 3 if longest <= 20 else 2


def _draw_curve(axes: Axes, panel: Lines, curve: Curve) -> None:
    color = COLOURS[curve.color]
    # A line through a single point is invisible without a marker.
    few = len(curve.x) <= POINTS or not curve.joined
    axes.plot(
        curve.x, curve.y, color=color, lw=curve.width if curve.joined else 0, label=curve.name,
        ls=DASHES if curve.dashed else "-", marker="o" if few else "",
        ms=5 if len(curve.x) == 1 or not curve.joined else 2 + curve.width,
    )  # fmt: skip
    notes = curve.notes if curve.noted else ()
    for at_x, at_y, note in zip(curve.x, curve.y, notes, strict=False):
        axes.annotate(
            note, (at_x, at_y), xytext=(5, 5), textcoords="offset points", fontsize=8,
            color=color, parse_math=False,
        )  # fmt: skip
    known = [
        (x, y, spread)
        for x, y, spread in zip(curve.x, curve.y, curve.spread or (), strict=False)
        if spread is not None
    ]
    if not known:
        return
    x, y, spread = (np.array(column, dtype=float) for column in zip(*known, strict=True))
    if len(known) == 1:
        axes.errorbar(x, y, spread, color=color, alpha=0.5, capsize=4, ls="")
        return
    bounds = (
        -math.inf if panel.y.low is None else panel.y.low,
        math.inf if panel.y.high is None else panel.y.high,
    )
    # A band around an accuracy near 100 % must not rise above 100 %.
    low, high = np.clip(y - spread, *bounds), np.clip(y + spread, *bounds)
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def _limit_x(axes: Axes, panel: Lines) -> None:
    """Limit the horizontal axis to the curves, with a small margin."""
    if panel.x.low is not None and panel.x.high is not None:
        axes.set_xlim(panel.x.low, panel.x.high)
        return
    ends = [x for curve in visible(panel) for x in curve.x]
    if not ends or panel.x.log:
        return
    low, high = min(ends), max(ends)
    margin = 0.02 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)


def _name_ends(axes: Axes, panel: Lines) -> None:
    """Name every curve beside its last value, moving names apart where they would overlap."""
    write = VALUES[panel.y.format]
    ends = [(curve.y[-1], curve.name, curve.color) for curve in visible(panel)]
    ends += [(level.value, level.name, level.color) for level in panel.levels]
    low, high = axes.get_ylim()
    heights = spread_labels([(value - low) / (high - low) for value, *_ in ends], gap=0.085)
    for height, (value, name, color) in zip(heights, ends, strict=True):
        axes.annotate(
            f"{name} {write(value)}", (1.015, height), xycoords="axes fraction", va="center",
            fontsize=9.5, color=COLOURS[color], annotation_clip=False, parse_math=False,
        )  # fmt: skip


def spread_labels(heights: list[float], gap: float) -> list[float]:
    """Move positions apart so that labels do not overlap.

    Args:
        heights: Desired positions in [0, 1].
        gap: The smallest distance between two labels.

    Returns:
        Positions near the desired ones, in the same vertical order.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(heights[i], placed[-1] + gap) if placed else max(heights[i], 0.0))
    # The pass above only moves labels up; this one moves them down again below the top edge.
    ceiling = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    result = [0.0] * len(heights)
    for i, height in zip(order, placed, strict=True):
        result[i] = height
    return result
