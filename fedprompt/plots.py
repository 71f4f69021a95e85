"""Figures of a run.

Colour says on which images a model was tested: vermilion = the server's test set, blue = each
client's own test images, grey = the local-only baseline. Line style says which model. The palette
is Okabe and Ito's, safe for colour-blind readers. Figures are matplotlib objects without pyplot:
no global state, no display.

Shapes: K clients, C classes, D domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from fedprompt.display import percent, percent_spread
from fedprompt.run_data import RunData, check_partition, load_run

OWN_TESTS, SERVER_TEST, LOCAL_ONLY, INK = "#0072B2", "#D55E00", "#6B6B6B", "#222222"
DOMAINS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#222222")
WIDTH, DPI = 5.6, 150


def draw_all(run_dir: Path) -> list[Path]:
    """Draw every figure that the run has data for into `run_dir/plots`; return their paths."""
    run = load_run(run_dir)
    figures = {
        "accuracy_per_round.png": figure_accuracy(run),
        "client_accuracy.png": figure_clients(run),
        "loss_per_round.png": figure_loss(run),
        "partition.png": figure_partition(run.partition) if run.partition else None,
    }
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    drawn = []
    for name, figure in figures.items():
        # A figure of an earlier state of the run must not stay beside the new ones.
        (folder / name).unlink(missing_ok=True)
        if figure is not None:
            _save(figure, folder / name)
            drawn.append(folder / name)
    return drawn


def plot_partition(description: Mapping[str, Any], path: Path) -> None:
    """Draw the class counts of every client (`partition.json`'s content) into a PNG file."""
    check_partition(description, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(figure_partition(description), path)


def _save(figure: Figure, path: Path) -> None:
    # No software tag: the file then depends on the data only.
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})


# ---------------------------------------------------------------------------------- per round


def figure_accuracy(run: RunData) -> Figure | None:
    """Test accuracy per round: global, personalised (mean, std, worst client) and baselines."""
    figure, axes = _new_figure("Test accuracy per round")
    ends: list[tuple[float, str, str]] = []

    def curve(lines: Sequence[Mapping[str, Any]], part: str, key: str) -> _Series:
        return _series(lines, lambda line: (line.get(part) or {}).get(key))

    mean, std = curve(run.rounds, "personal", "mean"), curve(run.rounds, "personal", "std")
    _draw_band(axes, mean, std)
    for series, label, color, width in (
        (curve(run.rounds, "global", "accuracy"), "Global", SERVER_TEST, 2.0),
        (mean, "Personalised", OWN_TESTS, 2.0),
        (curve(run.rounds, "personal", "worst"), "Worst client", OWN_TESTS, 0.9),
        (curve(run.local_only, "personal", "mean"), "Local-only", LOCAL_ONLY, 1.6),
    ):
        if series.y:
            _draw_line(axes, series, label, color, width)
            ends.append((series.y[-1], f"{label} {percent(series.y[-1])}", color))
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
        series = _series(lines, lambda line, part=part: (line.get(part) or {}).get("loss"))
        if series.y:
            _draw_line(axes, series, label, color, 2.0 if lines is run.rounds else 1.6)
            ends.append((series.y[-1], f"{label} {series.y[-1]:.3f}", color))
    if not ends:
        return None
    _finish_rounds(axes, run)
    axes.set_ylim(max(axes.get_ylim()[0], 0.0), None)
    _label_ends(axes, ends)
    return figure


@dataclass(frozen=True)
class _Series:
    """Measured points: round numbers and values; rounds without a value are left out."""

    x: list[int]
    y: list[float]


def _series(lines: Sequence[Mapping[str, Any]], value_of: Any) -> _Series:
    points = [(line["round"], value_of(line)) for line in lines]
    kept = [(r, v) for r, v in points if v is not None and math.isfinite(v)]
    return _Series([r for r, _ in kept], [v for _, v in kept])


def _new_figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 3.9), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    _style(axes)
    figure.suptitle(title, x=0.02, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    return figure, axes


def _style(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    axes.tick_params(color="#999999", labelcolor=INK, labelsize=10)
    axes.grid(axis="y", color="#E6E6E6", lw=0.8)
    axes.set_axisbelow(True)


def _draw_line(axes: Axes, series: _Series, label: str, color: str, width: float) -> None:
    # Few points: show where they are. A single point would otherwise be invisible.
    marker = "o" if len(series.x) <= 13 else ""
    size = 5 if len(series.x) == 1 else 2 + width
    axes.plot(series.x, series.y, color=color, lw=width, label=label, marker=marker, ms=size)


def _draw_band(axes: Axes, mean: _Series, std: _Series) -> None:
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


# --------------------------------------------------------------------------------- per client


def figure_clients(run: RunData) -> Figure | None:
    """Each client's last personal accuracy, above the number of images it was measured on."""
    personal = run.last("personal")
    accuracy = (personal or {}).get("accuracy")
    if personal is None or not accuracy or all(value is None for value in accuracy):
        return None
    clients = np.arange(len(accuracy))
    tested = np.array([value is not None for value in accuracy])
    bars = np.array([value or 0.0 for value in accuracy])
    counts = _test_images(run, len(accuracy))
    figure = Figure(figsize=(WIDTH, 4.4), dpi=DPI, layout="constrained")
    if counts is None:
        top, bottom = figure.subplots(), None
    else:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    figure.suptitle(
        "Personal accuracy per client, last round",
        x=0.02, ha="left", fontsize=12.5, fontweight="bold", color=INK,
    )  # fmt: skip
    _style(top)
    top.bar(clients[tested], bars[tested], width=0.8, color="#8CBFDD", label="Personalised")
    if not tested.all():
        untested = clients[~tested]
        top.plot(
            untested, np.full(len(untested), 0.02), "x", color=LOCAL_ONLY, ms=5, label="Not tested"
        )
    zero_shot = ((run.summary or {}).get("zero_shot") or {}).get("personal") or {}
    before = zero_shot.get("accuracy")
    if before and len(before) == len(accuracy):
        known = [(k, v) for k, v in enumerate(before) if v is not None]
        width = max(2.0, min(16.0, 300 / len(accuracy)))
        top.plot(
            [k for k, _ in known], [v for _, v in known],
            "_", color=INK, ms=width, mew=2, label="Zero-shot",
        )  # fmt: skip
    mean = personal.get("mean")
    if mean is not None:
        label = f"Mean {percent_spread(mean, personal.get('std'))}"
        top.axhline(mean, color=OWN_TESTS, lw=1.4, ls=(0, (4, 3)), label=label)
    top.set_ylim(0, 1)
    top.set_xlim(-0.6, len(accuracy) - 0.4)
    top.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    _legend_above(top)
    lowest = top
    if bottom is not None and counts is not None:
        lowest = bottom
        _style(bottom)
        bottom.bar(clients, counts, width=0.8, color="#B5B5B5", label="test images")
        bottom.set_ylabel("Test images", fontsize=10, color=INK)
        bottom.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    lowest.set_xlabel("Client", fontsize=10.5, color=INK)
    lowest.xaxis.set_major_locator(MaxNLocator(nbins=11, integer=True, min_n_ticks=1))
    return figure


def _legend_above(axes: Axes) -> None:
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


def _test_images(run: RunData, clients: int) -> NDArray[np.int64] | None:
    if run.partition is None or run.partition.get("test_counts") is None:
        return None
    counts = np.asarray(run.partition["test_counts"], dtype=np.int64).sum(axis=1)
    return counts if len(counts) == clients else None


# ---------------------------------------------------------------------------------- partition


def figure_partition(description: Mapping[str, Any]) -> Figure:
    """Training images per class (rows) and client (columns), with each client's total above."""
    counts_KC = np.asarray(description["train_counts"], dtype=np.int64)
    clients, classes = counts_KC.shape
    names = [_shorten(str(name)) for name in description["class_names"]]
    # Every class is named while there is room for a line each; beyond, every n-th.
    height = 0.165 * min(max(classes, 12), 46)
    figure = Figure(figsize=(WIDTH, height + 2.1), dpi=DPI, layout="constrained")
    top, heat = figure.subplots(2, 1, sharex=True, height_ratios=[0.9, height])
    figure.suptitle(
        f"Training images of {clients} clients in {classes} classes",
        x=0.02, ha="left", fontsize=12.5, fontweight="bold", color=INK,
    )  # fmt: skip
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
    step = math.ceil(classes / 46)
    heat.set_yticks(range(0, classes, step), names[::step], parse_math=False, fontsize=9)
    if step > 1:
        heat.set_ylabel(f"Class (every {_ordinal(step)} is named)", fontsize=10, color=INK)
    heat.set_xlabel("Client", fontsize=10.5, color=INK)
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


def _draw_totals(axes: Axes, counts_KC: NDArray[np.int64], description: Mapping[str, Any]) -> None:
    """Images per client: of training, or of training and local test where domains are known."""
    _style(axes)
    totals_K, test_KC = counts_KC.sum(axis=1), description.get("test_counts")
    local_K = totals_K if test_KC is None else totals_K + np.asarray(test_KC).sum(axis=1)
    domains = [str(name) for name in description.get("domain_names") or []]
    # Domains are counted over a client's training and test images together.
    by_domain = np.asarray(description.get("domain_counts") or [], dtype=np.int64)
    stacked = (
        1 < len(domains) <= len(DOMAINS)
        and by_domain.shape == (len(totals_K), len(domains))
        and bool((by_domain.sum(axis=1) == local_K).all())
    )
    base = np.zeros(len(totals_K), dtype=np.int64)
    columns = by_domain.T if stacked else totals_K[None]
    for d, column in enumerate(columns):
        color = DOMAINS[d] if stacked else "#B5B5B5"
        label = domains[d] if stacked else "images"
        axes.bar(range(len(totals_K)), column, 0.8, bottom=base, color=color, label=label)
        base = base + column
    if stacked:
        _legend_above(axes)
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
