"""How the commands that classify images show their result: as a table, or in a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fedprompt.errors import UserError
from fedprompt.files import refuse_foreign, replacing
from fedprompt.reports.terminal import fields, fitted

if TYPE_CHECKING:
    from fedprompt.experiment.predict import Prediction


COLUMNS = ("image", "rank", "class", "probability")


def show_predictions(predictions: Iterable[Prediction], out: Path | None) -> None:
    """Print a table of predictions, or write them to a file as they come.

    Args:
        predictions: the most probable classes of each image.
        out: the CSV file to write, with a row per image and class; None prints the table.

    Raises:
        UserError: the file cannot be written, or is somebody else's.
    """
    if out is None:
        print_predictions(predictions)
        return
    refuse_foreign(out, ",".join(COLUMNS).encode())
    try:
        with (
            replacing(out) as temporary,
            temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for prediction in predictions:
                named = zip(prediction.classes, prediction.probabilities, strict=True)
                for rank, (name, p) in enumerate(named, start=1):
                    writer.writerow((prediction.image, rank, name, f"{p:.6f}"))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}.") from None


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
