"""The figures of one run; those of clients and of the partition have modules of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedprompt.reports.client_figure import clients_figure
from fedprompt.reports.figure import ACCURACY, ROUND, Axis, Curve, Figure, Level, Lines
from fedprompt.reports.partition_figure import partition_figure
from fedprompt.reports.run_data import RunData, series_of, split_tests
from fedprompt.reports.score_names import called

LABEL_LOSSES = {
    "loss-ce": "Cross-entropy",
    "loss-asymmetric": "Asymmetric loss",
    "loss-bce": "Cross-entropy of labels",
}
"""The loss of the labels, by its key among the terms of the training loss."""


def run_figures(run: RunData) -> list[Figure]:
    """Describe every figure that the run has data for."""
    figures = [accuracy_figure(run), clients_figure(run), loss_figure(run), statistics_figure(run)]
    if run.partition is not None:
        figures.append(partition_figure(run.partition))
    return [called(run.score, figure) for figure in figures if figure is not None]


def accuracy_figure(run: RunData) -> Figure | None:
    """Describe test accuracy per round: global, personalised (mean, std, worst client), baselines.

    If rounds test only their participants, the last round, which tests all clients, is a separate
    point, because it is a mean over other clients.

    Args:
        run: The run, finished or not.

    Returns:
        The figure, None if no accuracy was measured.
    """
    rounds, all_rounds_end = split_tests(run, run.rounds)
    alone, alone_end = split_tests(run, run.local_only)
    # The labels mention participants only if there are two kinds of tests to tell apart.
    participants = bool(all_rounds_end or alone_end)
    among = ", participants" if participants else ""
    candidates = [
        _curve(run.rounds, "global", "accuracy", "Global", "server"),
        _curve(rounds, "personal", "mean", f"Personalised{among}", "own", band=True),
        _curve(
            rounds, "personal", "worst", f"Worst {'participant' if participants else 'client'}",
            "own", width=1.0,
        ),
        _curve(all_rounds_end, "personal", "mean", "Personalised, all", "own", band=True),
        _curve(alone, "personal", "mean", f"Local-only{among}", "alone"),
        _curve(alone_end, "personal", "mean", "Local-only, all", "alone"),
        _curve(run.rounds, "backdoor", "success", "Attack success", "bars"),
    ]  # fmt: skip
    curves = [curve for curve in candidates if curve is not None]
    if not curves:
        return None
    colors = {curve.color for curve in curves}
    panel = Lines(
        curves=curves,
        # A reference line is shown only beside a curve on the same test images.
        levels=[level for level in _zero_shot_levels(run) if level.color in colors],
        x=ROUND,
        y=ACCURACY,
        named_at_ends=True,
    )
    return Figure(
        name="accuracy_per_round",
        title="Test accuracy per round",
        caption="Orange: the server's test set. Blue and grey: the clients' own test images. Band: "
        "± 1 standard deviation over clients. Round 0 is before training."
        + (" Attack success: a backdoor's." if any("backdoor" in x for x in run.rounds) else ""),
        panels=[panel],
    )


def _label_loss(run: RunData) -> str:
    """The key of the run's loss of labels."""
    named = {key for line in run.rounds for key in line.get("train") or {}}
    return next((key for key in LABEL_LOSSES if key in named), "loss-ce")


def _zero_shot_levels(run: RunData) -> list[Level]:
    zero_shot = (run.summary or {}).get("zero_shot") or {}
    values = {
        "server": ("Zero-shot", zero_shot.get("accuracy")),
        "own": ("Zero-shot, own tests", (zero_shot.get("personal") or {}).get("mean")),
    }
    return [
        Level(name, color, value) for color, (name, value) in values.items() if value is not None
    ]


def loss_figure(run: RunData) -> Figure | None:
    """Describe cross-entropies in training and testing, and below them what training minimises.

    Methods minimise the cross-entropy plus terms of their own, which local-only training and tests
    do not have. Only cross-entropies share an axis.
    """
    key = _label_loss(run)
    crosses = [
        _curve(run.rounds, "train", key, "Training", "own"),
        _curve(run.rounds, "global", "loss", "Global test", "server"),
        _curve(run.local_only, "train", key, "Local-only training", "alone"),
    ]
    curves = [curve for curve in crosses if curve is not None]
    last = max(float(line["round"]) for line in run.rounds)
    # Both panels begin with round 0, in which nothing is trained yet.
    x = replace(ROUND, low=0, high=last) if last else ROUND
    panels = []
    if curves:
        axis = Axis(label=LABEL_LOSSES[key], low=0)
        panels.append(Lines(curves=curves, x=x, y=axis, named_at_ends=True))
    whole = _curve(run.rounds, "train", "loss", "All terms", "own")
    caption = f"{LABEL_LOSSES[key]} of the clients that trained, and of the global model on the "
    caption += "server's test set."
    cross = series_of(run.rounds, "train", key)
    # A loss of one term is the cross-entropy, unless the run does not name the terms.
    if whole is not None and list(whole.y) != cross.y:
        axis = Axis(label="Training loss", low=0)
        panels.append(Lines(curves=[whole], x=x, y=axis, named_at_ends=True, small=True))
        caption += " Below: what training minimises, with all terms of the method."
    if not panels:
        return None
    return Figure(name="loss_per_round", title="Loss per round", caption=caption, panels=panels)


def statistics_figure(run: RunData) -> Figure | None:
    """Describe what the method measures on clients in training, one panel for each statistic.

    Args:
        run: The run, finished or not.

    Returns:
        The figure, None if the method has no statistics.
    """
    names = sorted({name for line in run.rounds for name in line.get("statistics", {})})
    panels: list[Lines] = []
    for name in names:
        lines = [
            {"round": line["round"], name: line["statistics"][name]}
            for line in run.rounds
            if name in line.get("statistics", {})
        ]
        curves = [
            _curve(lines, name, "mean", "Mean over clients", "own", band=True),
            _curve(lines, name, "max", "Largest client", "own", width=1.0),
        ]
        axis = Axis(label=name.replace("_", " ").capitalize())
        shown = [curve for curve in curves if curve is not None]
        panels.append(Lines(curves=shown, x=ROUND, y=axis, named_at_ends=True, small=bool(panels)))
    if not panels:
        return None
    return Figure(
        name="statistics_per_round",
        title="Statistics of the method per round",
        caption="What the method measures in the training of a round, over the clients that "
        "trained. Band: ± 1 standard deviation over clients.",
        panels=panels,
    )


def _curve(
    lines: Sequence[Mapping[str, Any]],
    part: str,
    key: str,
    name: str,
    color: str,
    *,
    width: float = 2.2,
    band: bool = False,
) -> Curve | None:
    """Describe the values of `line[part][key]` by round.

    Args:
        lines: Metrics lines.
        part: A part of a metrics line, e.g. "personal".
        key: The key of the value in that part.
        name: The name of the curve.
        color: The role of its colour.
        width: Width of the line in pixels.
        band: Whether the part's `std` is drawn around the values.

    Returns:
        The curve, None if no line has such a value.
    """
    points = series_of(lines, part, key)
    if not points.y:
        return None
    spread = series_of(lines, part, "std") if band else None
    std_at = dict(zip(spread.x, spread.y, strict=True)) if spread else {}
    half_heights = [std_at.get(x) for x in points.x] if std_at else None
    return Curve(name=name, color=color, x=points.x, y=points.y, spread=half_heights, width=width)
