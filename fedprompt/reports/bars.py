"""Bars side by side and a curve or two: what most protocols' figures are made of.

In these figures colour says which model: grey = zero-shot, vermilion = the global model, blue = the
personal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fedprompt.reports.style import BARS, INK, LOCAL_ONLY, OWN_TESTS, SERVER_TEST, new_figure, style

MODEL_COLOURS = {
    "zero-shot": BARS,
    "global": SERVER_TEST,
    "personal": OWN_TESTS,
    "local-only": LOCAL_ONLY,
}


@dataclass(frozen=True)
class Series:
    """One colour of bars; None = not measured. `errors` are half lengths of error bars."""

    label: str
    values: Sequence[float | None]
    errors: Sequence[float | None] | None = None

    @property
    def colour(self) -> str:
        """The model's colour."""
        return MODEL_COLOURS.get(self.label, OWN_TESTS)


def percent_axis(axes: Axes, *, of_x: bool = False) -> None:
    """Fractions as percent, on y or on x."""
    axis = axes.xaxis if of_x else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %"))


def shorten(name: str, limit: int = 24) -> str:
    """A name with an ellipsis where a line of it is too long for an axis."""
    lines = name.split("\n")
    return "\n".join(x if len(x) <= limit else f"{x[: limit - 1]}…" for x in lines)


def bar_figure(title: str, groups: Sequence[str], series: Sequence[Series]) -> Figure:
    """Groups of bars of fractions, each bar with its value in percent where there is room."""
    figure = new_figure(title, 3.6)
    axes = figure.subplots()
    style(axes)
    draw_bars(axes, groups, series)
    return figure


def draw_bars(axes: Axes, groups: Sequence[str], series: Sequence[Series]) -> None:
    """The bars of `bar_figure`, on axes of the caller."""
    width = 0.8 / max(1, len(series))
    bars = len(groups) * len(series)
    for i, one in enumerate(series):
        at = np.arange(len(groups)) - 0.4 + (i + 0.5) * width
        kept = [
            (x, v, g) for g, (x, v) in enumerate(zip(at, one.values, strict=True)) if v is not None
        ]
        errors = one.errors or [None] * len(groups)
        axes.bar(
            [x for x, *_ in kept], [v for _, v, _ in kept], width * 0.92,
            color=one.colour, label=one.label,
        )  # fmt: skip
        for x, v, g in kept:
            spread = errors[g]
            if spread is not None:
                axes.errorbar(x, v, spread, color=INK, lw=1, capsize=3)
            if bars <= 18:
                axes.annotate(
                    f"{100 * v:.1f}", (x, v + (spread or 0)), xytext=(0, 2),
                    textcoords="offset points", ha="center", color=INK,
                    fontsize=8.5 if bars <= 9 else 7,
                )  # fmt: skip
    axes.set_xticks(
        range(len(groups)), [shorten(g) for g in groups], parse_math=False, fontsize=9.5
    )
    if len(groups) > 6:
        axes.tick_params(axis="x", labelrotation=60)
    axes.set_xlim(-0.55, len(groups) - 0.45)
    axes.set_ylim(0, 1.08)
    axes.set_yticks(np.linspace(0, 1, 6))
    percent_axis(axes)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, frameon=False, fontsize=9.5,
        handlelength=1.0, columnspacing=1.1, handletextpad=0.5, borderaxespad=0.2,
    )  # fmt: skip
