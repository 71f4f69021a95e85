"""The figure of a partition: which client holds how many images of which class.

It is drawn for a run's report, and by `fedprompt data show` before any run.

Shapes: K clients, C classes, D domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.partition import dense
from fedprompt.files import refuse_foreign
from fedprompt.reports.client_figure import MANY
from fedprompt.reports.draw import MARK, save
from fedprompt.reports.figure import PALETTE, Axis, Bars, BarSeries, Figure, Heat, palette
from fedprompt.reports.figure_parts import count_bars
from fedprompt.reports.run_checks import check_partition

LISTED = 20
"""Maximum number of clients whose ids a caption lists."""


def plot_partition(description: Mapping[str, Any], path: Path) -> None:
    """Draw a partition into a PNG file.

    Args:
        description: The content of a run folder's `partition.json`.
        path: The file; its folder is created if necessary.

    Raises:
        UserError: The description lacks its counts, or the file is somebody else's.
        OSError: The file cannot be written.
    """
    check_partition(description, path)
    refuse_foreign(path, MARK)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(partition_figure(description), path)


def partition_figure(description: Mapping[str, Any]) -> Figure:
    """Describe training images per class (rows) and client (columns), below each client's total.

    With more than `MANY` clients, the figure shows how images and classes are distributed over
    clients.

    Args:
        description: The content of a run folder's `partition.json`, which must have passed
            `check_partition`.
    """
    names = [str(name) for name in description["class_names"]]
    train_KC = dense(description["train_counts"], len(names))
    clients = len(train_KC)
    if clients > MANY:
        return _distributions(train_KC, names)
    unlabelled = sorted(description.get("unlabelled_clients") or ())
    heat = Heat(
        rows=names,
        columns=[str(client) for client in range(clients)],
        # Cells of 0 stay empty, so that missing classes differ from classes with one image.
        cells=[[count or None for count in row] for row in train_KC.T.astype(int).tolist()],
        name="training images",
        format="count",
        x=Axis(label=f"Client ({len(unlabelled)} without labels)" if unlabelled else "Client"),
        y=Axis(label="", noun="Class"),
        low=0,
        root=True,
        missing="0",
    )
    return Figure(
        name="partition",
        title=f"Training images of {clients} clients in {len(names)} classes",
        caption="Images per class and client; their colour grows with the square root of the "
        f"count.{_without_labels(unlabelled)}",
        panels=[_totals(train_KC, unlabelled, description), heat],
    )


def _without_labels(clients: Sequence[int]) -> str:
    if not clients:
        return ""
    if len(clients) > LISTED:
        return f" {len(clients)} clients have no labels."
    return f" Without labels: {', '.join(map(str, clients))}."


def _totals(
    train_KC: NDArray[np.int64], unlabelled: Sequence[int], description: Mapping[str, Any]
) -> Bars:
    """Describe images per client: training images, or training and local test images by domain.

    Args:
        train_KC: Training images per client and class.
        unlabelled: Ids of clients without labels.
        description: The content of `partition.json`, which may have counts of domains.
    """
    total_K = train_KC.sum(axis=1)
    labels = [str(client) for client in range(len(total_K))]
    by_domain = _by_domain(train_KC, description)
    if by_domain is not None:
        series = [
            BarSeries(name, palette(d), images_K) for d, (name, images_K) in enumerate(by_domain)
        ]
        label = "Train + test"
    else:
        label = "Images"
        without_K = np.isin(np.arange(len(total_K)), unlabelled)
        series = [BarSeries("training images", "bars", np.where(without_K, 0, total_K).tolist())]
        if unlabelled:
            hidden_K = np.where(without_K, total_K, 0).tolist()
            series.append(BarSeries("training images without labels", "c5", hidden_K))
    return Bars(
        labels=labels, series=series, stacked=True, x=Axis(), y=Axis(label=label, format="count"),
        noun="Client", small=True,
    )  # fmt: skip


def _by_domain(
    train_KC: NDArray[np.int64], description: Mapping[str, Any]
) -> list[tuple[str, list[int]]] | None:
    """Return names of domains and images per client of each, None if the counts are inconsistent.

    Domains are counted over a client's training and test images together.
    """
    names = [str(name) for name in description.get("domain_names") or []]
    # More domains than colours could not be told apart in a stack.
    if not 1 < len(names) <= PALETTE:
        return None
    images_K, test_rows = train_KC.sum(axis=1), description.get("test_counts")
    if test_rows is not None:
        images_K = images_K + dense(test_rows, train_KC.shape[1]).sum(axis=1)
    counts_KD = dense(description.get("domain_counts") or [], len(names))
    if len(counts_KD) != len(images_K) or (counts_KD.sum(axis=1) != images_K).any():
        return None
    return list(zip(names, counts_KD.T.tolist(), strict=True))


def _distributions(train_KC: NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Describe clients by their training images, by their classes, and per class."""
    clients, classes = train_KC.shape
    held_KC = train_KC > 0
    images = count_bars(
        "Training images of a client", train_KC.sum(axis=1).tolist(), noun="Images:", small=True
    )
    held = count_bars(
        "Classes of a client", held_KC.sum(axis=1).tolist(), noun="Classes:", small=True
    )
    holders = Bars(
        labels=names,
        series=[BarSeries("clients that hold it", "bars", held_KC.sum(axis=0).tolist())],
        x=Axis(label="Class"),
        y=Axis(label="Clients", format="count"),
    )
    return Figure(
        name="partition",
        title=f"Training images of {clients:,} clients in {classes} classes",
        caption="How many clients have so many training images, hold so many classes, and hold "
        "images of each class.",
        panels=[images, held, holders],
    )
