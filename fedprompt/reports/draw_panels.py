"""The four kinds of panels, drawn on matplotlib's axes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fedprompt.reports.draw_style import (
    GREY,
    INK,
    PALE_GREY,
    VALUES,
    label_axes,
    legend_above,
    set_ticks,
    shorten,
    style,
)
from fedprompt.reports.figure import COLOURS, Axis, Bars, Boxes, Curve, Heat, Level, Lines, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

DASHES = (0, (4, 3))
POINTS = 13
"""A curve of at most this many points shows where they are."""
NAMED = 46
"""Most names along a side of a picture."""
ROW_IN = 0.165
"""Height of a row with a name, in inches."""
WRITTEN = 18
"""Most bars that have their value written above them."""
LEGEND_LINE_IN = 0.2


def panel_height(panel: Panel) -> float:
    """The height of a panel in inches."""
    if isinstance(panel, Lines):
        named = 0 if panel.named_at_ends else len(_visible(panel)) + len(panel.levels)
        return (1.1 if panel.small else 2.9) + LEGEND_LINE_IN * math.ceil(named / _columns(panel))
    if isinstance(panel, Bars):
        names = len(panel.series) + len(panel.levels) + (panel.marks is not None)
        legend = LEGEND_LINE_IN * math.ceil(names / 3) if names > 1 else 0.0
        return (1.1 if panel.small else 2.7) + legend
    if isinstance(panel, Boxes):
        return 0.34 * len(panel.groups) + 0.7
    rows = len(panel.rows)
    if panel.square:
        return 4.9
    return max(1.2, 0.4 * rows if rows <= 8 else ROW_IN * min(max(rows, 20), NAMED)) + 0.9


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw a panel of any kind."""
    if isinstance(panel, Lines):
        draw_lines(axes, panel)
    elif isinstance(panel, Bars):
        draw_bars(axes, panel)
    elif isinstance(panel, Heat):
        draw_heat(axes, panel)
    else:
        draw_boxes(axes, panel)


# ------------------------------------------------------------------------------------- curves


def draw_lines(axes: Axes, panel: Lines) -> None:
    """Curves with their bands, and reference lines."""
    style(axes)
    for curve in _visible(panel):
        _draw_curve(axes, panel, curve)
    for level in panel.levels:
        _draw_level(axes, level)
    if panel.x.log:
        axes.set_xscale("log")
    label_axes(axes, panel.x, panel.y)
    _limit_x(axes, panel)
    # Data may lie anywhere within the bounds of an axis, but the picture never exceeds them.
    low, high = axes.get_ylim()
    low = low if panel.y.low is None else max(low, panel.y.low)
    high = high if panel.y.high is None or high <= panel.y.high else panel.y.high
    axes.set_ylim(low, high)
    if panel.named_at_ends:
        _name_ends(axes, panel)
    else:
        legend_above(axes, _columns(panel))


def _visible(panel: Lines) -> list[Curve]:
    """A picture cannot switch curves on, so it leaves out those that a page would not show."""
    return [curve for curve in panel.curves if curve.on]


def _columns(panel: Lines) -> int:
    longest = max((len(curve.name) for curve in panel.curves), default=0)
    return 3 if longest <= 20 else 2


def _draw_curve(axes: Axes, panel: Lines, curve: Curve) -> None:
    color = COLOURS[curve.color]
    # A single point would be invisible without a mark.
    few = len(curve.x) <= POINTS or not curve.joined
    axes.plot(
        curve.x, curve.y, color=color, lw=curve.width if curve.joined else 0, label=curve.name,
        ls=DASHES if curve.dashed else "-", marker="o" if few else "",
        ms=5 if len(curve.x) == 1 or not curve.joined else 2 + curve.width,
    )  # fmt: skip
    for at_x, at_y, note in zip(curve.x, curve.y, curve.notes, strict=False):
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
    low, high = np.clip(y - spread, *bounds), np.clip(y + spread, *bounds)
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def _draw_level(axes: Axes, level: Level) -> None:
    axes.axhline(
        level.value, color=COLOURS[level.color], lw=1.2, ls=DASHES, label=level.name, zorder=1
    )


def _limit_x(axes: Axes, panel: Lines) -> None:
    """No more room beside the curves than their points need."""
    if panel.x.low is not None and panel.x.high is not None:
        axes.set_xlim(panel.x.low, panel.x.high)
        return
    ends = [x for curve in _visible(panel) for x in curve.x]
    if not ends or panel.x.log:
        return
    low, high = min(ends), max(ends)
    margin = 0.02 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)


def _name_ends(axes: Axes, panel: Lines) -> None:
    """Name every curve beside its last value, moved apart where names would overlap."""
    write = VALUES[panel.y.format]
    ends = [(curve.y[-1], curve.name, curve.color) for curve in _visible(panel)]
    ends += [(level.value, level.name, level.color) for level in panel.levels]
    low, high = axes.get_ylim()
    heights = spread_labels([(value - low) / (high - low) for value, *_ in ends], gap=0.085)
    for height, (value, name, color) in zip(heights, ends, strict=True):
        axes.annotate(
            f"{name} {write(value)}", (1.015, height), xycoords="axes fraction", va="center",
            fontsize=9.5, color=COLOURS[color], annotation_clip=False, parse_math=False,
        )  # fmt: skip


def spread_labels(heights: list[float], gap: float) -> list[float]:
    """Positions in [0, 1] near the given ones and in their order, at least `gap` apart."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(heights[i], placed[-1] + gap) if placed else max(heights[i], 0.0))
    ceiling = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    result = [0.0] * len(heights)
    for i, height in zip(order, placed, strict=True):
        result[i] = height
    return result


# --------------------------------------------------------------------------------------- bars


def draw_bars(axes: Axes, panel: Bars) -> None:
    """Bars beside or on top of each other, with notches, error bars and reference lines."""
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
        _draw_level(axes, level)
    label_axes(axes, panel.x, panel.y)
    _name_bars(axes, panel)
    axes.set_xlim(-0.6, count - 0.4)
    if panel.y.high is not None:
        # Above a bar of full height its value must still fit.
        axes.set_ylim(0, panel.y.high * (1.08 if _written(panel) else 1))
    if len(panel.series) + len(panel.levels) > 1 or panel.marks is not None:
        legend_above(axes)


def _written(panel: Bars) -> bool:
    return not panel.small and len(panel.labels) * len(panel.series) <= WRITTEN


def _finish_bars(
    axes: Axes, panel: Bars, at: np.ndarray, values: np.ndarray, spread: list[float | None]
) -> None:
    """Error bars, and values where there is room."""
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
    """Name as many bars as there is room for; long names are turned."""
    names = [shorten(label) for label in panel.labels]
    letters = max((len(name) for name in names), default=0) + 2
    # Numbers and ranges of numbers are read without the ones in between.
    words = any(character.isalpha() for name in names for character in name)
    turned = words and letters * len(names) > 84
    step = math.ceil(len(names) / NAMED) if turned else math.ceil(letters * len(names) / 84)
    ticks = range(0, len(names), max(1, step))
    axes.set_xticks(ticks, names[:: max(1, step)], parse_math=False, fontsize=9)
    if turned:
        axes.tick_params(axis="x", labelrotation=90 if len(names) > 12 else 60)


# ------------------------------------------------------------------------- heat maps and boxes


def draw_heat(axes: Axes, panel: Heat) -> None:
    """Coloured cells, with their values where there is room."""
    from matplotlib.colors import Normalize, PowerNorm

    cells = np.array(
        [[math.nan if cell is None else cell for cell in row] for row in panel.cells], dtype=float
    )
    known = cells[np.isfinite(cells)]
    low = panel.low if panel.low is not None else float(known.min(initial=0 if panel.root else 1))
    high = panel.high if panel.high is not None else max(float(known.max(initial=low)), low + 1e-9)
    # Counts can span orders of magnitude; a square root keeps single ones visible.
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
                color = "white" if norm(value) > 0.6 else INK
                axes.text(column, row, text, ha="center", va="center", fontsize=size, color=color)
    _draw_scale(axes, image, panel)


def _draw_scale(axes: Axes, image: AxesImage, panel: Heat) -> None:
    """What the colours mean: below the cells, so that they stay in line with a panel above."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    if panel.square:
        bar = figure.colorbar(image, ax=axes, location="right", fraction=0.04, pad=0.02)
    else:
        inches = axes.bbox.height / figure.dpi
        bar = figure.colorbar(
            image, ax=axes, location="bottom", fraction=0.12 / inches, pad=0.06 / inches, aspect=45
        )
    bar.set_label(panel.name.capitalize(), fontsize=9, color=INK)
    bar.outline.set_visible(False)

    set_ticks(bar.ax.yaxis if panel.square else bar.ax.xaxis, Axis(format=panel.format), 6)
    bar.ax.tick_params(labelsize=8.5, color=PALE_GREY)


def _name_rows_and_columns(axes: Axes, panel: Heat) -> None:
    """Name every row while there is room for a line each; beyond, every n-th."""
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
    """Boxes from quartile to quartile, with lines to the extremes."""
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
    axes.invert_yaxis()
