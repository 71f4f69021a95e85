"""The figure of one run's clients: their personal accuracies and their numbers of images.

Up to `MANY` clients have a bar each; for more clients the figure shows distributions.

Shapes: K clients, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedprompt.data.partition import dense
from fedprompt.reports.figure import ACCURACY, Axis, Bars, BarSeries, Figure, Level, Marks, Panel
from fedprompt.reports.figure_parts import count_bars, shares
from fedprompt.reports.format import percent_spread
from fedprompt.reports.run_data import FEW_TEST_IMAGES, RunData, accuracy_of

FEW_MARK = "*"
MANY = 200
"""With more clients than this, single bars cannot be told apart at the width of a figure."""


def clients_figure(run: RunData) -> Figure | None:
    """Describe each client's last personal accuracy, above the number of images it was measured on.

    With more than `MANY` clients, the figure shows the distributions of these numbers.

    Args:
        run: The run, finished or not.

    Returns:
        The figure, None if no personal accuracy was measured.
    """
    personal = run.last("personal")
    accuracy = accuracy_of(personal)
    if personal is None or not accuracy:
        return None
    zero_shot = accuracy_of(((run.summary or {}).get("zero_shot") or {}).get("personal"))
    alone = alone_of(run)
    train_K, test_K = _images(run, "train_counts"), _images(run, "test_counts")
    # A run that tests its participants only may not have tested the client with the highest id.
    clients = max(max(accuracy) + 1, len(test_K))
    if clients > MANY:
        return _distributions(accuracy, alone, zero_shot, test_K)
    few = [k < len(test_K) and 0 < test_K[k] < FEW_TEST_IMAGES for k in range(clients)]
    labels = [f"{client}{FEW_MARK * few[client]}" for client in range(clients)]
    counts = {"training images": train_K, "test images": test_K}
    mean = personal.get("mean")
    levels = []
    if mean is not None:
        levels = [Level(f"Mean {percent_spread(mean, personal.get('std'))}", "own", mean)]
    caption = "Accuracy of each client's model on the client's own test images, as measured last."
    if any(few):
        caption += f" {FEW_MARK}: fewer than {FEW_TEST_IMAGES} test images."
    models = [BarSeries("Personalised", "own", [accuracy.get(k) for k in range(clients)])]
    if alone:
        models.append(BarSeries("Local-only", "alone", [alone.get(k) for k in range(clients)]))
    panels: list[Panel] = [
        Bars(
            labels=labels,
            series=models,
            marks=_marks(zero_shot, clients),
            levels=levels,
            x=Axis(label="" if test_K else "Client"),
            y=ACCURACY,
            noun="Client",
            # A cross tells a client that was not tested from one with an accuracy of 0.
            missing="not tested" if len(accuracy) < clients else "",
            notes=[
                [(name, f"{rows[k]:,}") for name, rows in counts.items() if k < len(rows)]
                for k in range(clients)
            ],
        )
    ]
    if test_K:
        series = [BarSeries("test images", "bars", test_K)]
        axis = Axis(label="Test images", format="count")
        panels.append(
            Bars(
                labels=labels[: len(test_K)], series=series, x=Axis(label="Client"), y=axis,
                noun="Client", small=True,
            )
        )  # fmt: skip
    return Figure(
        name="client_accuracy",
        title="Personal accuracy per client",
        caption=caption,
        panels=panels,
    )


def alone_of(run: RunData) -> dict[int, float]:
    """Return each client's accuracy after local-only training, as measured last."""
    tested = [line["personal"] for line in run.local_only if line.get("personal")]
    return accuracy_of(tested[-1] if tested else None)


def _marks(zero_shot: Mapping[int, float], clients: int) -> Marks | None:
    if not zero_shot:
        return None
    return Marks("Zero-shot", [zero_shot.get(client) for client in range(clients)])


def _distributions(
    accuracy: Mapping[int, float],
    alone: Mapping[int, float],
    zero_shot: Mapping[int, float],
    test_K: list[int],
) -> Figure:
    """Describe how many clients have which accuracy, and how many test images."""
    labels, counts, _ = shares(list(accuracy.values()))
    series = [BarSeries("Clients, personalised", "own", counts)]
    if alone:
        numbers = shares([value for client, value in alone.items() if client in accuracy])[1]
        series.append(BarSeries("Clients, local-only", "alone", numbers))
    # Both distributions cover the same clients: those that were tested.
    reference = [value for client, value in zero_shot.items() if client in accuracy]
    marks = Marks("Clients, zero-shot", [float(n) for n in shares(reference)[1]])
    panels: list[Panel] = [
        Bars(
            labels=labels,
            series=series,
            marks=marks if reference else None,
            x=Axis(label="Accuracy on own test images"),
            y=Axis(label="Clients", format="count"),
            noun="Accuracy",
        )
    ]
    if test_K:
        panels.append(count_bars("Test images of a client", test_K, noun="Images:", small=True))
    return Figure(
        name="client_accuracy",
        title=f"Personal accuracy of {len(accuracy):,} tested clients",
        caption="How many clients have which accuracy on their own test images, as measured last.",
        panels=panels,
    )


def _images(run: RunData, part: str) -> list[int]:
    """Return the images per client (K) from `train_counts` or `test_counts`, empty if unknown."""
    if run.partition is None or run.partition.get(part) is None:
        return []
    counts_KC = dense(run.partition[part], len(run.partition["class_names"]))
    images_K: list[int] = counts_KC.sum(axis=1).tolist()
    return images_K
