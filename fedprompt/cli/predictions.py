"""How the commands that classify images show their result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console

from fedprompt.reports.terminal import fields, fitted

if TYPE_CHECKING:
    from fedprompt.experiment.predict import Prediction


def print_predictions(predictions: Iterable[Prediction]) -> None:
    """Print a table with the most probable classes of each image."""
    rows = []
    for prediction in predictions:
        for i, (name, p) in enumerate(
            zip(prediction.classes, prediction.probabilities, strict=True)
        ):
            rows.append((str(prediction.image) if i == 0 else "", name, f"{100 * p:.1f} %"))
    heads = ("image", "class", "probability")
    image, *columns = fields(heads, rows, left=heads[:2], most={"class": 30})
    console = Console()
    console.print(fitted(image, columns, console.width))
