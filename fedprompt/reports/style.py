"""Colours and axes that all figures have in common.

Colour says on which images a model was tested: vermilion = the server's test set, blue = each
client's own test images, grey = the local-only baseline. Line style says which model. The palette
is Okabe and Ito's, safe for colour-blind readers. Figures are matplotlib objects without pyplot:
no global state, no display.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

OWN_TESTS, SERVER_TEST, LOCAL_ONLY, INK = "#0072B2", "#D55E00", "#6B6B6B", "#222222"
DOMAINS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#222222")
BARS, PALE = "#B5B5B5", "#8CBFDD"
WIDTH, DPI = 5.6, 150


def new_figure(title: str, height: float) -> Figure:
    """An empty figure of the common width, `height` inches high, under a bold title."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    return figure


def style(axes: Axes) -> None:
    """Thin grey axes and horizontal lines behind what is drawn."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    axes.tick_params(color="#999999", labelcolor=INK, labelsize=10)
    axes.grid(axis="y", color="#E6E6E6", lw=0.8)
    axes.set_axisbelow(True)


def legend_above(axes: Axes) -> None:
    """The legend in a line above the axes, the personalised model first."""
    handles, labels = axes.get_legend_handles_labels()
    first = sorted(range(len(labels)), key=lambda i: labels[i] != "Personalised")
    axes.legend(
        [handles[i] for i in first],
        [labels[i] for i in first],
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=4,
        frameon=False,
        fontsize=9.5,
        handlelength=1.3,
        columnspacing=1.1,
        handletextpad=0.5,
        borderaxespad=0.2,
    )
