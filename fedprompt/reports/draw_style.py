"""Axes, number formats and legends that all pictures share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedprompt.reports.figure import COLOURS, Axis, Format, Level
from fedprompt.reports.format import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis as AxisOfPicture

INK, GREY, PALE_GREY = "#222222", "#6B6B6B", "#999999"
DASHES = (0, (4, 3))
NAMED = 46
"""Maximum number of names along one side of a picture."""
NAME_LETTERS = 24
"""Maximum length of a name beside an axis, in characters."""

TICKS: dict[Format, Callable[[float], str]] = {
    "percent": lambda value: f"{100 * value:g} %",
    "number": lambda value: f"{value:g}",
    "count": lambda value: f"{value:,.0f}",
    "bytes": lambda value: human_bytes(round(value)).replace(".0 ", " "),
}
"""How a value is written beside an axis, by format."""
VALUES: dict[Format, Callable[[float], str]] = {
    **TICKS,
    "percent": lambda value: f"{100 * value:.1f} %",
    "number": lambda value: f"{value:.4g}",
}
"""How a value is written on its own, by format."""


def style(axes: Axes) -> None:
    """Set thin grey axes, with horizontal lines behind what is drawn."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(PALE_GREY)
    axes.tick_params(color=PALE_GREY, labelcolor=INK, labelsize=9.5)
    axes.grid(axis="y", color="#E6E6E6", lw=0.8)
    axes.set_axisbelow(True)


def label_axes(axes: Axes, x: Axis, y: Axis) -> None:
    """Write the labels of the axes, and their values in their formats.

    Args:
        axes: Where to draw.
        x: The horizontal axis.
        y: The vertical axis.
    """
    axes.set_xlabel(x.label, fontsize=10, color=INK, parse_math=False)
    axes.set_ylabel(y.label, fontsize=10, color=INK, parse_math=False)
    set_ticks(axes.xaxis, x, 8)
    # 150 pixels: a small panel has room for three values.
    set_ticks(axes.yaxis, y, 3 if axes.bbox.height < 150 else 6)


def set_ticks(axis: AxisOfPicture, described: Axis, most: int) -> None:
    """Set the values along an axis, or the names of its categories.

    Args:
        axis: Where to draw.
        described: The axis, whose format decides what counts as a round value.
        most: The maximum number of values.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if described.names:
        axis.set_ticks(range(len(described.names)), list(described.names), parse_math=False)
        return
    if described.log:
        axis.set_major_locator(LogLocator(base=2 if described.format == "bytes" else 10))
        # On a short logarithmic axis matplotlib also labels minor ticks, and not in our format.
        axis.set_minor_locator(NullLocator())
    else:
        whole = described.format == "count"
        locator = MaxNLocator(most, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1)
        if described.format == "bytes":
            # Round numbers of bytes are multiples of KiB, MiB, ..., not of powers of ten.
            low, high = axis.get_view_interval()
            unit = 1024 ** int(math.log(max(high, 1), 1024))
            axis.set_major_locator(
                FixedLocator(locator.tick_values(low / unit, high / unit) * unit)
            )
        else:
            axis.set_major_locator(locator)
    write = TICKS[described.format]
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def legend_above(axes: Axes, columns: int = 3) -> None:
    """Draw the legend above the axes if anything drawn has a name."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    legend = axes.legend(
        handles, [shorten(label, 34) for label in labels], loc="lower left",
        bbox_to_anchor=(-0.02, 1.0), ncols=columns, frameon=False, fontsize=9, handlelength=1.5,
        columnspacing=1.1, handletextpad=0.5, borderaxespad=0.2,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def shorten(name: str, limit: int = NAME_LETTERS) -> str:
    """Return a name, with an ellipsis if it is longer than `limit` characters."""
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def draw_level(axes: Axes, level: Level) -> None:
    """Draw a dashed line across the whole panel, behind everything else."""
    axes.axhline(
        level.value, color=COLOURS[level.color], lw=1.2, ls=DASHES, label=level.name, zorder=1
    )
