"""Draws heat maps and box plots with matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fedprompt.reports.draw_style import (
    INK,
    NAMED,
    PALE_GREY,
    VALUES,
    label_axes,
    set_ticks,
    shorten,
    style,
)
from fedprompt.reports.figure import COLOURS, Axis, Boxes, Heat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def draw_heat(axes: Axes, panel: Heat) -> None:
    """Draw coloured cells, with their values where there is room.

    Args:
        axes: Where to draw.
        panel: What to draw.
    """
    from matplotlib.colors import Normalize, PowerNorm

    cells = np.array(
        [[math.nan if cell is None else cell for cell in row] for row in panel.cells], dtype=float
    )
    known = cells[np.isfinite(cells)]
    low = panel.low if panel.low is not None else float(known.min(initial=0 if panel.root else 1))
    # The smallest distance keeps the norm from dividing by zero where all cells are equal.
    high = panel.high if panel.high is not None else max(float(known.max(initial=low)), low + 1e-9)
    # Counts can span orders of magnitude; with a square root, single images remain visible.
    norm = PowerNorm(0.5, vmin=low, vmax=high) if panel.root else Normalize(low, high)
    rows, columns = cells.shape
    image = axes.imshow(
        np.ma.masked_invalid(cells), aspect="equal" if panel.square else "auto", cmap="Blues",
        norm=norm, interpolation="nearest" if max(rows, columns) < 600 else "auto",
    )  # fmt: skip
    label_axes(axes, panel.x, panel.y)
    _name_rows_and_columns(axes, panel)
    axes.tick_params(length=0, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_color(PALE_GREY)
    if columns <= (25 if panel.square else 12) and rows <= NAMED:
        write = VALUES[panel.format]
        size = 6.5 if panel.square else 7.5 if rows > 8 else 9
        for (row, column), value in np.ndenumerate(cells):
            if math.isfinite(value) and not (panel.square and value < 0.005):
                text = write(value).removesuffix(" %")
                text = f"{100 * value:.0f}" if panel.square else text
                # White letters on the dark end of the colour map, dark letters elsewhere.
                color = "white" if norm(value) > 0.6 else INK
                axes.text(column, row, text, ha="center", va="center", fontsize=size, color=color)
    _draw_scale(axes, image, panel)


def _draw_scale(axes: Axes, image: AxesImage, panel: Heat) -> None:
    """Draw the colour scale below the cells, so that they stay aligned with a panel above."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    if panel.square:
        bar = figure.colorbar(image, ax=axes, location="right", fraction=0.04, pad=0.02)
    else:
        # Matplotlib sizes a colour bar as a fraction of the axes; the bar should be equally high in
        # all.
        inches = axes.bbox.height / figure.dpi
        bar = figure.colorbar(
            image, ax=axes, location="bottom", fraction=0.12 / inches, pad=0.06 / inches, aspect=45
        )
    bar.set_label(panel.name.capitalize(), fontsize=9, color=INK)
    bar.outline.set_visible(False)

    set_ticks(bar.ax.yaxis if panel.square else bar.ax.xaxis, Axis(format=panel.format), 6)
    bar.ax.tick_params(labelsize=8.5, color=PALE_GREY)


def _name_rows_and_columns(axes: Axes, panel: Heat) -> None:
    """Name every row while each fits on a line; with more rows, every n-th."""
    rows, columns = [shorten(name) for name in panel.rows], [shorten(n) for n in panel.columns]
    step = math.ceil(len(rows) / NAMED)
    size = 9 if len(rows) <= NAMED and not panel.square else 7.5
    axes.set_yticks(range(0, len(rows), step), rows[::step], parse_math=False, fontsize=size)
    if step > 1:
        every = f"{panel.y.label} (every {_ordinal(step)} is named)"
        axes.set_ylabel(every, fontsize=10, color=INK)
    letters = max((len(name) for name in columns), default=0) + 2
    step = math.ceil(len(columns) / NAMED if panel.square else letters * len(columns) / 66)
    ticks = range(0, len(columns), max(1, step))
    axes.set_xticks(ticks, columns[:: max(1, step)], parse_math=False, fontsize=size,
                    rotation=90 if panel.square else 0)  # fmt: skip


def _ordinal(n: int) -> str:
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"


def draw_boxes(axes: Axes, panel: Boxes) -> None:
    """Draw boxes from quartile to quartile, with lines to the extremes.

    Args:
        axes: Where to draw.
        panel: What to draw.
    """
    style(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#E6E6E6", lw=0.8)
    statistics = [
        {"med": g.median, "q1": g.q1, "q3": g.q3, "whislo": g.low, "whishi": g.high}
        for g in panel.groups
    ]
    drawn = axes.bxp(
        statistics, orientation="horizontal", patch_artist=True, widths=0.6, showfliers=False,
        medianprops={"color": INK, "lw": 1.5},
    )  # fmt: skip
    for patch, group in zip(drawn["boxes"], panel.groups, strict=True):
        color = COLOURS[group.color]
        patch.set(facecolor=color, alpha=0.5, edgecolor=color)
    label_axes(axes, panel.x, panel.x)
    axes.set_ylabel("")
    names = [shorten(group.name, 34) for group in panel.groups]
    axes.set_yticks(range(1, len(names) + 1), names, parse_math=False)
    # Matplotlib places the first group at the bottom.
    axes.invert_yaxis()
