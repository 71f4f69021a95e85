"""Figures of a run: `draw_all` draws them, those per round are made here.

plot_clients.py makes the figures per client, plot_style.py holds the colours' meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedprompt.reports.client_figures import figure_clients, figure_partition
from fedprompt.reports.format import ProtocolFigure, percent
from fedprompt.reports.run_data import (
    RunData,
    Series,
    check_partition,
    load_run,
    series_of,
    split_tests,
)
from fedprompt.reports.style import DPI, INK, LOCAL_ONLY, OWN_TESTS, SERVER_TEST, new_figure, style

Lines = Sequence[Mapping[str, Any]]

PROTOCOL = "protocol_"
"""What the files of protocols' figures begin with."""


def draw_all(run_dir: Path, protocols: Sequence[ProtocolFigure] = ()) -> list[Path]:
    """Draw every figure that the run has data for into `run_dir/plots`.

    Args:
        run_dir: the run folder.
        protocols: the figures of the run's evaluation protocols.

    Returns:
        The paths of the written files.

    Raises:
        UserError: the run folder lacks a file, or a file is damaged.
    """
    run = load_run(run_dir)
    figures: dict[str, Figure | None] = {
        "accuracy_per_round.png": figure_accuracy(run),
        "client_accuracy.png": figure_clients(run),
        "loss_per_round.png": figure_loss(run),
        "partition.png": figure_partition(run.partition) if run.partition else None,
    }
    figures |= {f"{PROTOCOL}{protocol.name}.png": protocol.figure for protocol in protocols}
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    for stale in folder.glob(f"{PROTOCOL}*.png"):
        stale.unlink()
    drawn = []
    for name, figure in figures.items():
        # A figure of an earlier state of the run must not stay beside the new ones.
        (folder / name).unlink(missing_ok=True)
        if figure is not None:
            save(figure, folder / name)
            drawn.append(folder / name)
    return drawn


def plot_partition(description: Mapping[str, Any], path: Path) -> None:
    """Draw the class counts of every client (`partition.json`'s content) into a PNG file."""
    check_partition(description, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure_partition(description), path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file."""
    # No software tag: the file then depends on the data only.
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})


# ---------------------------------------------------------------------------------- per round


def figure_accuracy(run: RunData) -> Figure | None:
    """Test accuracy per round: global, personalised (mean, std, worst client) and baselines.

    Where rounds test their participants only, the last one, which tests all clients, is drawn as a
    point of its own: it is a mean over other clients.
    """
    figure, axes = _new_figure("Test accuracy per round")
    ends: list[tuple[float, str, str]] = []

    def draw(lines: Lines, part: str, key: str, label: str, color: str, width: float) -> None:
        series = series_of(lines, part, key)
        if series.y:
            _draw_line(axes, series, label, color, width)
            ends.append((series.y[-1], f"{label} {percent(series.y[-1])}", color))

    own, own_end = split_tests(run, run.rounds)
    alone, alone_end = split_tests(run, run.local_only)
    among = ", participants" if own_end or alone_end else ""
    for lines in (own, own_end):
        _draw_band(axes, series_of(lines, "personal", "mean"), series_of(lines, "personal", "std"))
    draw(run.rounds, "global", "accuracy", "Global", SERVER_TEST, 2.0)
    draw(own, "personal", "mean", f"Personalised{among}", OWN_TESTS, 2.0)
    draw(own, "personal", "worst", f"Worst {'participant' if among else 'client'}", OWN_TESTS, 0.9)
    draw(own_end, "personal", "mean", "Personalised, all", OWN_TESTS, 2.0)
    draw(alone, "personal", "mean", f"Local-only{among}", LOCAL_ONLY, 1.6)
    draw(alone_end, "personal", "mean", "Local-only, all", LOCAL_ONLY, 1.6)
    zero_shot = (run.summary or {}).get("zero_shot") or {}
    for value, label, color in (
        (zero_shot.get("accuracy"), "Zero-shot", SERVER_TEST),
        ((zero_shot.get("personal") or {}).get("mean"), "Zero-shot, own", OWN_TESTS),
    ):
        if value is not None and any(color == drawn for *_, drawn in ends):
            axes.axhline(value, color=color, lw=1.2, ls=(0, (4, 3)), label=label, zorder=1)
            ends.append((value, f"{label} {percent(value)}", color))
    if not ends:
        return None
    _finish_rounds(axes, run)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 1.0) if high > 1.0 else high)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    _label_ends(axes, ends)
    key = "orange: server's test set; blue, grey: clients' own tests; band: ± 1 std"
    figure.supxlabel(key, fontsize=9, color=LOCAL_ONLY)
    return figure


def figure_loss(run: RunData) -> Figure | None:
    """Training loss of the clients, test loss of the global model, and local-only training."""
    figure, axes = _new_figure("Loss per round")
    ends: list[tuple[float, str, str]] = []
    for lines, part, label, color in (
        (run.rounds, "train", "Training", OWN_TESTS),
        (run.rounds, "global", "Global test", SERVER_TEST),
        (run.local_only, "train", "Local-only training", LOCAL_ONLY),
    ):
        series = series_of(lines, part, "loss")
        if series.y:
            _draw_line(axes, series, label, color, 2.0 if lines is run.rounds else 1.6)
            ends.append((series.y[-1], f"{label} {series.y[-1]:.3f}", color))
    if not ends:
        return None
    _finish_rounds(axes, run)
    axes.set_ylim(max(axes.get_ylim()[0], 0.0), None)
    _label_ends(axes, ends)
    return figure


def _new_figure(title: str) -> tuple[Figure, Axes]:
    figure = new_figure(title, 3.9)
    axes = figure.subplots()
    style(axes)
    return figure, axes


def _draw_line(axes: Axes, series: Series, label: str, color: str, width: float) -> None:
    # Few points: show where they are. A single point would otherwise be invisible.
    marker = "o" if len(series.x) <= 13 else ""
    size = 5 if len(series.x) == 1 else 2 + width
    axes.plot(series.x, series.y, color=color, lw=width, label=label, marker=marker, ms=size)


def _draw_band(axes: Axes, mean: Series, std: Series) -> None:
    """One standard deviation to either side of the mean, where both were measured."""
    std_at = dict(zip(std.x, std.y, strict=True))
    kept = [(r, m, std_at[r]) for r, m in zip(mean.x, mean.y, strict=True) if r in std_at]
    if not kept:
        return
    x, y, spread = (np.array(column, dtype=float) for column in zip(*kept, strict=True))
    label = "Personalised ± std"
    if len(kept) == 1:
        axes.errorbar(x, y, spread, color=OWN_TESTS, alpha=0.5, capsize=4, ls="", label=label)
    else:
        low, high = np.clip(y - spread, 0, 1), np.clip(y + spread, 0, 1)
        axes.fill_between(x, low, high, color=OWN_TESTS, alpha=0.15, lw=0, label=label)


def _finish_rounds(axes: Axes, run: RunData) -> None:
    last = max(line["round"] for line in (*run.rounds, *run.local_only))
    axes.set_xlabel("Round", fontsize=10.5, color=INK)
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )
    axes.set_xlim(-0.5 if last == 0 else -0.02 * last, last + (0.5 if last == 0 else 0.02 * last))


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name every curve beside its last value, moved apart where names would overlap."""
    low, high = axes.get_ylim()
    at = spread_labels([(value - low) / (high - low) for value, *_ in ends], gap=0.075)
    for y, (_, text, color) in zip(at, ends, strict=True):
        axes.annotate(
            text,
            (1.015, y),
            xycoords="axes fraction",
            va="center",
            fontsize=10,
            color=color,
            annotation_clip=False,
        )


def spread_labels(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions in [0, 1], near the wanted ones and in their order, at least `gap` apart."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], placed[-1] + gap) if placed else max(wanted[i], 0.0))
    ceiling = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    result = [0.0] * len(wanted)
    for i, y in zip(order, placed, strict=True):
        result[i] = y
    return result
