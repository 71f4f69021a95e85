"""The charts of one run: accuracy and loss per round, clients, partition.

Shapes: K clients, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.partition import dense
from fedprompt.reports.charts import ACCURACY, ROUND, Chart, Spec, curve, histogram, level, lines
from fedprompt.reports.client_figures import MANY
from fedprompt.reports.run_data import RunData, accuracy_of, series_of, split_tests

BINS = 40
"""Most bars of a histogram of whole numbers."""


def run_charts(run: RunData) -> list[Chart]:
    """Every chart that the run has data for."""
    found = [accuracy_chart(run), clients_chart(run), loss_chart(run)]
    found += partition_charts(run.partition) if run.partition else []
    return [chart for chart in found if chart is not None]


def accuracy_chart(run: RunData) -> Chart | None:
    """Test accuracy per round: global, personalised (mean, std, worst client) and baselines.

    Where rounds test their participants only, the last one, which tests all clients, is a point of
    its own: it is a mean over other clients.
    """
    own, own_end = split_tests(run, run.rounds)
    alone, alone_end = split_tests(run, run.local_only)
    among = ", participants" if own_end or alone_end else ""
    series: list[Spec] = []

    def draw(part_lines: Sequence[Mapping[str, Any]], key: str, name: str, color: str) -> None:
        part, _, value = key.partition("/")
        points = series_of(part_lines, part, value)
        spread = series_of(part_lines, part, "std") if value == "mean" else None
        by_round = dict(zip(spread.x, spread.y, strict=True)) if spread else {}
        band = [by_round.get(x) for x in points.x] if color == "own" and by_round else None
        if points.y:
            width = 1.0 if value == "worst" else 2.2
            series.append(curve(name, color, points.x, points.y, band, width=width))

    draw(run.rounds, "global/accuracy", "Global", "server")
    draw(own, "personal/mean", f"Personalised{among}", "own")
    draw(own, "personal/worst", f"Worst {'participant' if among else 'client'}", "own")
    draw(own_end, "personal/mean", "Personalised, all", "own")
    draw(alone, "personal/mean", f"Local-only{among}", "alone")
    draw(alone_end, "personal/mean", "Local-only, all", "alone")
    if not series:
        return None
    zero_shot = (run.summary or {}).get("zero_shot") or {}
    for value, name, color in (
        (zero_shot.get("accuracy"), "Zero-shot", "server"),
        ((zero_shot.get("personal") or {}).get("mean"), "Zero-shot, own tests", "own"),
    ):
        if value is not None and any(one["color"] == color for one in series):
            series.append(level(name, color, value))
    return Chart(
        "accuracy_per_round",
        "Test accuracy per round",
        "Orange: the server's test set; blue and grey: clients' own tests; band: ± 1 standard "
        "deviation over clients. Round 0 is before training.",
        lines(series, ROUND, ACCURACY),
    )


def loss_chart(run: RunData) -> Chart | None:
    """Training loss of the clients, test loss of the global model, and local-only training."""
    series = []
    for part_lines, part, name, color in (
        (run.rounds, "train", "Training", "own"),
        (run.rounds, "global", "Global test", "server"),
        (run.local_only, "train", "Local-only training", "alone"),
    ):
        points = series_of(part_lines, part, "loss")
        if points.y:
            series.append(curve(name, color, points.x, points.y))
    if not series:
        return None
    return Chart(
        "loss_per_round",
        "Loss per round",
        "Mean loss of the clients that trained, and of the global model in tests.",
        lines(series, ROUND, {"format": "number", "min": 0}),
    )


def clients_chart(run: RunData) -> Chart | None:
    """Each client's last personal accuracy; beyond `MANY` clients, how they are distributed."""
    personal = run.last("personal")
    accuracy = accuracy_of(personal)
    if personal is None or not accuracy:
        return None
    before = accuracy_of(((run.summary or {}).get("zero_shot") or {}).get("personal"))
    train_K, test_K = _images(run, "train_counts"), _images(run, "test_counts")
    clients = max(max(accuracy) + 1, 0 if test_K is None else len(test_K))
    if clients > MANY:
        return _many_clients(accuracy, before)
    notes = [
        [
            [name, f"{counts_K[k]:,}"]
            for name, counts_K in (("training images", train_K), ("test images", test_K))
            if counts_K is not None and k < len(counts_K)
        ]
        for k in range(clients)
    ]
    spec: Spec = {
        "kind": "bars",
        "labels": [str(k) for k in range(clients)],
        "each": "Client",
        "name": "Personalised",
        "color": "own",
        "values": [accuracy.get(k) for k in range(clients)],
        "marks": [before.get(k) for k in range(clients)] if before else None,
        "mark_name": "Zero-shot",
        "mean": personal.get("mean"),
        "notes": notes,
        "x": {"label": "Client"},
        "y": ACCURACY,
    }
    caption = "Last measured accuracy on the client's own test images; dashed: mean"
    caption += "; notch: zero-shot" if before else ""
    untested = "; crosses: no test images" if len(accuracy) < clients else ""
    return Chart("client_accuracy", "Personal accuracy per client", f"{caption}{untested}.", spec)


def _many_clients(accuracy: Mapping[int, float], before: Mapping[int, float]) -> Chart:
    edges = np.linspace(0, 1, 21)
    own = [value for client, value in before.items() if client in accuracy]
    values, marks = histogram(list(accuracy.values()), edges.tolist(), own or None)
    spec: Spec = {
        "kind": "bars",
        "labels": [f"{100 * low:.0f}-{100 * high:.0f} %" for low, high in pairwise(edges)],
        "each": "Accuracy",
        "name": "clients",
        "color": "own",
        "values": values,
        "marks": marks,
        "mark_name": "clients, zero-shot",
        "x": {"label": "Accuracy on own test images"},
        "y": {"format": "count"},
    }
    return Chart(
        "client_accuracy",
        f"Personal accuracy of {len(accuracy):,} tested clients",
        "Clients by their last measured accuracy; notch: zero-shot.",
        spec,
    )


def partition_charts(description: Mapping[str, Any]) -> list[Chart]:
    """Training images per class and client; beyond `MANY` clients, two histograms."""
    names = [str(name) for name in description["class_names"]]
    train_KC = dense(description["train_counts"], len(names))
    if not train_KC.size:
        return []
    if len(train_KC) > MANY:
        held = (train_KC > 0).sum(axis=1)
        return [
            _whole_numbers("partition", "Training images of a client", train_KC.sum(axis=1)),
            _whole_numbers("classes_held", "Classes of a client", held),
        ]
    hidden = set(description.get("unlabelled_clients") or ())
    counts_CK = train_KC.T.astype(int).tolist()
    spec: Spec = {
        "kind": "heat",
        "rows": names,
        "columns": [str(k) for k in range(len(train_KC))],
        "cells": [[count or None for count in row] for row in counts_CK],
        "from": 0,
        "root": True,
        "format": "count",
        "color": "own",
        "name": "training images",
        "none": "0",
        "x_name": "client",
        "y_name": "Class",
        "x_label": "Client",
    }
    caption = "Training images per class and client; colour grows with their square root."
    if hidden:
        caption += f" Without labels: clients {', '.join(map(str, sorted(hidden)))}."
    title = f"Training images of {len(train_KC)} clients in {len(names)} classes"
    return [Chart("partition", title, caption, spec)]


def _whole_numbers(name: str, title: str, values_K: NDArray[np.int64]) -> Chart:
    """Clients by a whole number: a bar for each number while there is room, else for a range."""
    low, high = int(values_K.min()), int(values_K.max())
    step = max(1, math.ceil((high - low + 1) / BINS))
    edges = list(range(low, high + step + 1, step))
    counts, _ = histogram(values_K.tolist(), [edge - 0.5 for edge in edges])
    labels = [str(a) if step == 1 else f"{a}-{b - 1}" for a, b in pairwise(edges)]
    spec: Spec = {
        "kind": "bars", "labels": labels, "values": counts, "each": title.split(" of ")[0] + ":",
        "name": "clients", "color": "bars", "x": {"label": title}, "y": {"format": "count"},
    }  # fmt: skip
    return Chart(name, title, f"How many of {len(values_K):,} clients have so many.", spec)


def _images(run: RunData, part: str) -> list[int] | None:
    if run.partition is None or run.partition.get(part) is None:
        return None
    counts: list[int] = (
        dense(run.partition[part], len(run.partition["class_names"])).sum(1).tolist()
    )
    return counts
