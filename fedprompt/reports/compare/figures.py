"""Figures of a comparison: curves with bands over seeds, accuracy over bytes, clients, heat maps.

Rows have one colour and line style each, the same in every figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedprompt.errors import UserError
from fedprompt.reports.compare.load import Row, differing
from fedprompt.reports.compare.metrics import Metric
from fedprompt.reports.compare.names import plain
from fedprompt.reports.compare.table import number
from fedprompt.reports.run_data import RunData, accuracy_of
from fedprompt.reports.style import DOMAINS, INK, LOCAL_ONLY, new_figure, style

MOST = 16
"""Rows in a figure; a table shows more."""
CURVES = (("global", "accuracy", "Global"), ("personal", "mean", "Personalised"))
_LINES = ("-", "--")


@dataclass(frozen=True)
class Curve:
    """Mean and standard deviation over seeds in the rounds R that all of them have measured."""

    rounds_R: list[int]
    bytes_R: list[float]
    mean_R: list[float]
    std_R: list[float]


def curve(row: Row, part: str, key: str) -> Curve:
    """One row's accuracy per round; bytes are those sent up and down until then, a mean too."""
    found = [_points(run, part, key) for run in row.runs.values()]
    rounds = sorted(set.intersection(*(set(points) for points in found)))
    sent = [[points[r][0] for points in found] for r in rounds]
    values = [[points[r][1] for points in found] for r in rounds]
    return Curve(
        rounds,
        [float(np.mean(x)) for x in sent],
        [float(np.mean(x)) for x in values],
        [float(np.std(x)) for x in values],
    )


def figure_curves(rows: Sequence[Row], *, over_bytes: bool = False) -> Figure | None:
    """Accuracy per round, or over the bytes sent so far; band: ± std over seeds."""
    rows, left_out = rows[:MOST], len(rows) - MOST
    shown = []
    for part, key, title in CURVES:
        curves = {row.name: curve(row, part, key) for row in rows}
        if any(found.rounds_R for found in curves.values()):
            shown.append((title, curves))
    if not shown:
        return None
    what = "bytes sent" if over_bytes else "rounds"
    figure = _figure(f"Accuracy over {what}", 2.9 * len(shown), rows, left_out)
    panels = np.atleast_1d(figure.subplots(len(shown), 1, sharex=True))
    for axes, (title, curves) in zip(panels, shown, strict=True):
        style(axes)
        for i, row in enumerate(rows):
            _draw(axes, curves[row.name], i, over_bytes=over_bytes)
        axes.set_ylabel(title, fontsize=10.5, color=INK)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    if over_bytes:
        panels[-1].set_xlabel(
            "MiB up and down, all clients (band: ± std over seeds)", fontsize=10.5, color=INK
        )
        panels[-1].set_xscale("symlog", linthresh=_smallest(shown))
        panels[-1].set_xlim(left=0)
        panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    else:
        panels[-1].set_xlabel("Round (band: ± std over seeds)", fontsize=10.5, color=INK)
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _legend(figure, rows)
    return figure


def figure_clients(rows: Sequence[Row]) -> Figure | None:
    """Box plots of the clients' own accuracies in the last round, those of all seeds together."""
    rows, left_out = rows[:MOST], len(rows) - MOST
    values = {row.name: client_accuracies(row) for row in rows}
    kept = [(i, row) for i, row in enumerate(rows) if values[row.name]]
    if not kept:
        return None
    figure = _figure("Accuracy of the clients", 0.9 + 0.34 * len(kept), (), left_out)
    axes = figure.subplots()
    style(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#E6E6E6", lw=0.8)
    boxes = axes.boxplot(
        [values[row.name] for _, row in kept],
        orientation="horizontal",
        patch_artist=True,
        widths=0.6,
        medianprops={"color": INK, "lw": 1.5},
        flierprops={"marker": "o", "ms": 3, "markeredgecolor": LOCAL_ONLY},
    )
    for box, (i, _) in zip(boxes["boxes"], kept, strict=True):
        box.set(facecolor=_colour(i), alpha=0.45, edgecolor=_colour(i))
    axes.set_yticks(range(1, len(kept) + 1), [_short(row.name) for _, row in kept])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
    axes.set_xlabel("Own test images; box: quartiles; line: median", fontsize=10, color=INK)
    return figure


def client_accuracies(row: Row) -> list[float]:
    """Every client's last accuracy on its own test images, of all seeds."""
    return [a for run in row.runs.values() for a in accuracy_of(run.last("personal")).values()]


def heat_values(
    rows: Sequence[Row], keys: tuple[str, str], metric: Metric
) -> tuple[list[Any], list[Any], np.ndarray[Any, np.dtype[np.float64]]]:
    """Values of both settings, and the metric's mean over seeds (Y, X); NaN where there is none.

    Raises:
        UserError: unknown settings, or rows that differ in something else as well.
    """
    for key in keys:
        if not all(key in row.settings for row in rows):
            raise UserError(f"compare: --heat: not all runs have the setting '{key}'.")
    across, down = (_values(rows, key) for key in keys)
    table = np.full((len(down), len(across)), math.nan)
    owner: dict[tuple[int, int], Row] = {}
    for row in rows:
        values = metric.by_seed(row)
        place = _index(down, row.settings[keys[1]]), _index(across, row.settings[keys[0]])
        if place in owner:
            others = differing([row, owner[place]])
            raise UserError(
                f"compare: --heat: '{row.name}' and '{owner[place].name}' fall on one field; they "
                f"differ in {', '.join(others)}. Choose among them with --where KEY=VALUE."
            )
        owner[place] = row
        if values:
            table[place] = float(np.mean(list(values.values())))
    return across, down, table


def figure_heat(rows: Sequence[Row], keys: tuple[str, str], metric: Metric) -> Figure:
    """A map of one metric over two settings, with the number in every field."""
    across, down, table = heat_values(rows, keys, metric)
    figure = new_figure(_capital(metric.title), 1.6 + 0.45 * len(down))
    axes = figure.subplots()
    image = axes.imshow(table, cmap="cividis", aspect="auto")
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for (y, x), value in np.ndenumerate(table):
        shown = number(metric, value) if math.isfinite(value) else "-"
        colour = INK if not math.isfinite(value) or value > middle else "white"
        axes.text(x, y, shown, ha="center", va="center", fontsize=10, color=colour)
    axes.set_xticks(range(len(across)), [plain(v) for v in across])
    axes.set_yticks(range(len(down)), [plain(v) for v in down])
    axes.set_xlabel(keys[0], fontsize=10.5, color=INK)
    axes.set_ylabel(keys[1], fontsize=10.5, color=INK)
    bar = figure.colorbar(image, ax=axes)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(metric, v)))
    return figure


def _points(run: RunData, part: str, key: str) -> dict[int, tuple[float, float]]:
    """By round: bytes sent so far, and accuracy."""
    points, sent = {}, 0.0
    for line in run.rounds:
        sent += (line.get("bytes_up") or 0) + (line.get("bytes_down") or 0)
        value = (line.get(part) or {}).get(key)
        if value is not None:
            points[int(line["round"])] = sent, float(value)
    return points


def _draw(axes: Axes, curve: Curve, i: int, *, over_bytes: bool) -> None:
    if not curve.rounds_R:
        return
    x = np.array(curve.bytes_R) / 2**20 if over_bytes else np.array(curve.rounds_R, dtype=float)
    mean_R, std_R = np.array(curve.mean_R), np.array(curve.std_R)
    marker = "o" if len(x) <= 13 else ""
    axes.plot(x, mean_R, color=_colour(i), ls=_line(i), lw=1.8, marker=marker, ms=3.5)
    if std_R.any():
        low, high = np.clip(mean_R - std_R, 0, 1), np.clip(mean_R + std_R, 0, 1)
        axes.fill_between(x, low, high, color=_colour(i), alpha=0.13, lw=0)


def _smallest(shown: Sequence[tuple[str, Mapping[str, Curve]]]) -> float:
    """The fewest bytes above zero of any curve, in MiB."""
    sent = [b for _, curves in shown for c in curves.values() for b in c.bytes_R if b > 0]
    return min(sent, default=1.0) / 2**20


def _figure(title: str, height: float, rows: Sequence[Row], left_out: int) -> Figure:
    more = f" (first {MOST} of {MOST + left_out} rows)" if left_out > 0 else ""
    return new_figure(title + more, height + 0.6 + 0.21 * math.ceil(len(rows) / 2))


def _legend(figure: Figure, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_colour(i), ls=_line(i), lw=1.8, label=_short(row.name))
        for i, row in enumerate(rows)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def _colour(i: int) -> str:
    return DOMAINS[i % len(DOMAINS)]


def _line(i: int) -> str:
    return _LINES[i // len(DOMAINS) % len(_LINES)]


def _short(name: str) -> str:
    return name if len(name) <= 34 else f"{name[:33]}…"


def _values(rows: Sequence[Row], key: str) -> list[Any]:
    """Different values of a setting; numbers in order, others as they come."""
    values: list[Any] = []
    for row in rows:
        if not any(_same(value, row.settings[key]) for value in values):
            values.append(row.settings[key])
    numbers = all(isinstance(v, (int, float)) for v in values)
    return sorted(values) if numbers else values


def _index(values: Sequence[Any], wanted: Any) -> int:
    return next(i for i, value in enumerate(values) if _same(value, wanted))


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
