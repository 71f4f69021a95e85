"""Figures per client: personal accuracies, and the partition of the training images.

Up to `MANY` clients each has a bar or a column; beyond, figures show distributions over clients.

Shapes: K clients, C classes, D domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from fedprompt.data.partition import dense
from fedprompt.reports.format import percent_spread
from fedprompt.reports.run_data import RunData, accuracy_of
from fedprompt.reports.style import (
    BARS,
    DOMAINS,
    DPI,
    INK,
    LOCAL_ONLY,
    OWN_TESTS,
    PALE,
    legend_above,
    new_figure,
    style,
)

MANY = 200
"""More clients than can be told apart at a figure's width."""


def figure_clients(run: RunData) -> Figure | None:
    """Each client's last personal accuracy, above the number of images it was measured on.

    Beyond `MANY` clients: how these numbers are distributed.
    """
    personal = run.last("personal")
    accuracy = accuracy_of(personal)
    if personal is None or not accuracy:
        return None
    counts_K = _test_images(run)
    clients = max(accuracy) + 1 if counts_K is None else len(counts_K)
    zero_shot = ((run.summary or {}).get("zero_shot") or {}).get("personal")
    before = accuracy_of(zero_shot)
    mean = (personal.get("mean"), personal.get("std"))
    if clients > MANY:
        return _distribution(accuracy, before, counts_K, mean)
    figure = new_figure("Personal accuracy per client, last round", 4.4)
    if counts_K is None:
        top, bottom = figure.subplots(), None
    else:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    style(top)
    top.bar(list(accuracy), list(accuracy.values()), width=0.8, color=PALE, label="Personalised")
    untested = [k for k in range(clients) if k not in accuracy]
    if untested:
        top.plot(
            untested, np.full(len(untested), 0.02), "x", color=LOCAL_ONLY, ms=5, label="Not tested"
        )
    if before:
        width = max(2.0, min(16.0, 300 / clients))
        top.plot(
            list(before), list(before.values()),
            "_", color=INK, ms=width, mew=2, label="Zero-shot",
        )  # fmt: skip
    if mean[0] is not None:
        label = f"Mean {percent_spread(*mean)}"
        top.axhline(mean[0], color=OWN_TESTS, lw=1.4, ls=(0, (4, 3)), label=label)
    top.set_ylim(0, 1)
    top.set_xlim(-0.6, clients - 0.4)
    top.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    legend_above(top)
    lowest = top
    if bottom is not None and counts_K is not None:
        lowest = bottom
        style(bottom)
        bottom.bar(range(clients), counts_K, width=0.8, color=BARS, label="test images")
        bottom.set_ylabel("Test images", fontsize=10, color=INK)
        bottom.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    lowest.set_xlabel("Client", fontsize=10.5, color=INK)
    lowest.xaxis.set_major_locator(MaxNLocator(nbins=11, integer=True, min_n_ticks=1))
    return figure


def _distribution(
    accuracy: Mapping[int, float],
    before: Mapping[int, float],
    counts_K: NDArray[np.int64] | None,
    mean: tuple[float | None, float | None],
) -> Figure:
    """Clients by accuracy, above clients by the number of their test images."""
    figure = new_figure(f"Personal accuracy of {len(accuracy):,} tested clients", 4.4)
    if counts_K is None:
        top, bottom = figure.subplots(), None
    else:
        top, bottom = figure.subplots(2, 1, height_ratios=[2, 1])
    style(top)
    edges = np.linspace(0, 1, 21).tolist()
    top.hist(list(accuracy.values()), edges, color=PALE, label="Personalised")
    if before:
        own = [value for client, value in before.items() if client in accuracy]
        top.hist(own, edges, histtype="step", color=INK, lw=1.4, label="Zero-shot")
    if mean[0] is not None:
        label = f"Mean {percent_spread(*mean)}"
        top.axvline(mean[0], color=OWN_TESTS, lw=1.4, ls=(0, (4, 3)), label=label)
    top.set_xlim(0, 1)
    top.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
    top.set_xlabel("Accuracy on own test images", fontsize=10.5, color=INK)
    legend_above(top)
    for axes in (top, bottom):
        if axes is not None:
            axes.set_ylabel("Clients", fontsize=10, color=INK)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    if bottom is not None and counts_K is not None:
        style(bottom)
        _draw_histogram(bottom, counts_K, ticks=11)
        bottom.set_xlabel("Own test images", fontsize=10.5, color=INK)
    return figure


def _draw_histogram(axes: Axes, values_K: NDArray[np.int64], ticks: int) -> None:
    """Clients by a whole number: a bar for each number while there is room, else for a range."""
    low, high = int(values_K.min()), int(values_K.max())
    step = max(1, math.ceil((high - low + 1) / 40))
    edges = (np.arange(low, high + step + 1, step) - 0.5).tolist()
    axes.hist(values_K, edges, color=BARS, rwidth=0.85)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True, min_n_ticks=1))


def _test_images(run: RunData) -> NDArray[np.int64] | None:
    if run.partition is None or run.partition.get("test_counts") is None:
        return None
    rows = run.partition["test_counts"]
    counts_K: NDArray[np.int64] = dense(rows, len(run.partition["class_names"])).sum(axis=1)
    return counts_K


def figure_partition(description: Mapping[str, Any]) -> Figure:
    """Training images per class (rows) and client (columns), with each client's total above.

    Beyond `MANY` clients: how images and classes are distributed over clients.
    """
    names = [_shorten(str(name)) for name in description["class_names"]]
    counts_KC = dense(description["train_counts"], len(names))
    clients, classes = counts_KC.shape
    if clients > MANY:
        return _partition_of_many(counts_KC, names)
    height = 0.165 * min(max(classes, 12), 46)
    figure = new_figure(f"Training images of {clients} clients in {classes} classes", height + 2.1)
    top, heat = figure.subplots(2, 1, sharex=True, height_ratios=[0.9, height])
    _draw_totals(top, counts_KC, description)
    pixels = height * DPI
    image = heat.imshow(
        np.ma.masked_equal(counts_KC.T, 0),
        aspect="auto",
        cmap="Blues",
        # Dirichlet counts span orders of magnitude; a square root keeps single images visible.
        norm=PowerNorm(0.5, vmin=0, vmax=max(1, int(counts_KC.max(initial=1)))),
        interpolation="nearest" if max(classes, clients) < pixels else "auto",
    )
    _name_classes(heat, names)
    hidden = len(description.get("unlabelled_clients") or ())
    label = f"Client ({hidden} without labels, hatched)" if hidden else "Client"
    heat.set_xlabel(label, fontsize=10.5, color=INK)
    heat.xaxis.set_major_locator(MaxNLocator(nbins=11, integer=True, min_n_ticks=1))
    heat.tick_params(length=0, labelcolor=INK)
    for spine in heat.spines.values():
        spine.set_color("#999999")
    if clients <= 12 and classes <= 46:
        _write_counts(heat, counts_KC)
    bar = figure.colorbar(
        image, ax=heat, location="bottom", fraction=0.12 / height, pad=0.08 / height, aspect=45
    )
    bar.set_label("Images per class and client", fontsize=9.5, color=INK)
    bar.ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    bar.ax.tick_params(labelsize=9, color="#999999")
    bar.outline.set_visible(False)
    return figure


def _partition_of_many(counts_KC: NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Clients by their training images, by their classes, and per class."""
    clients, classes = counts_KC.shape
    height = 0.165 * min(max(classes, 12), 46)
    figure = new_figure(
        f"Training images of {clients:,} clients in {classes} classes", height + 2.3
    )
    grid = figure.add_gridspec(2, 2, height_ratios=[1.3, height])
    images, held = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    for axes, values_K, label in (
        (images, counts_KC.sum(axis=1), "Images of a client"),
        (held, (counts_KC > 0).sum(axis=1), "Classes of a client"),
    ):
        style(axes)
        _draw_histogram(axes, values_K, ticks=5)
        axes.set_xlabel(label, fontsize=10, color=INK)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    images.set_ylabel("Clients", fontsize=10, color=INK)
    bottom = figure.add_subplot(grid[1, :])
    style(bottom)
    bottom.grid(axis="y", visible=False)
    bottom.grid(axis="x", color="#E6E6E6", lw=0.8)
    bottom.barh(range(classes), (counts_KC > 0).sum(axis=0), height=0.8, color=BARS)
    bottom.set_ylim(classes - 0.4, -0.6)
    _name_classes(bottom, names)
    bottom.set_xlabel("Clients that hold images of the class", fontsize=10, color=INK)
    bottom.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    return figure


def _name_classes(axes: Axes, names: Sequence[str]) -> None:
    """Every class is named while there is room for a line each; beyond, every n-th."""
    step = math.ceil(len(names) / 46)
    axes.set_yticks(range(0, len(names), step), names[::step], parse_math=False, fontsize=9)
    if step > 1:
        axes.set_ylabel(f"Class (every {_ordinal(step)} is named)", fontsize=10, color=INK)


def _draw_totals(axes: Axes, counts_KC: NDArray[np.int64], description: Mapping[str, Any]) -> None:
    """Images per client: of training, or of training and local test where domains are known."""
    style(axes)
    totals_K, test_rows = counts_KC.sum(axis=1), description.get("test_counts")
    classes = counts_KC.shape[1]
    local_K = totals_K if test_rows is None else totals_K + dense(test_rows, classes).sum(axis=1)
    domains = [str(name) for name in description.get("domain_names") or []]
    # Domains are counted over a client's training and test images together.
    by_domain = dense(description.get("domain_counts") or [], len(domains))
    stacked = (
        1 < len(domains) <= len(DOMAINS)
        and len(by_domain) == len(totals_K)
        and bool((by_domain.sum(axis=1) == local_K).all())
    )
    base = np.zeros(len(totals_K), dtype=np.int64)
    columns = by_domain.T if stacked else totals_K[None]
    for d, column in enumerate(columns):
        color = DOMAINS[d] if stacked else BARS
        label = domains[d] if stacked else "images"
        axes.bar(range(len(totals_K)), column, 0.8, bottom=base, color=color, label=label)
        base = base + column
    hidden = list(description.get("unlabelled_clients") or ())
    axes.bar(hidden, base[hidden], 0.8, facecolor="none", edgecolor="white", hatch="////", lw=0)
    if stacked:
        legend_above(axes)
    axes.set_ylabel("Train + test" if stacked else "Images", fontsize=9.5, color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True))
    axes.tick_params(axis="x", length=0, labelbottom=False)


def _write_counts(axes: Axes, counts_KC: NDArray[np.int64]) -> None:
    dark = max(1, int(counts_KC.max(initial=1))) * 0.4
    for client, row in enumerate(counts_KC):
        for label, count in enumerate(row):
            if count:
                color = "white" if count > dark else INK
                axes.text(
                    client, label, str(count), ha="center", va="center", fontsize=7.5, color=color
                )


def _shorten(name: str, limit: int = 24) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _ordinal(n: int) -> str:
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
