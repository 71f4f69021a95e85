"""Views of data sets: the table of a partition for the terminal, and a contact sheet.

Shapes: K clients, C classes, D domains, N images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Group

from fedprompt.data.dataset import ImageDataset
from fedprompt.data.partition import dense
from fedprompt.reports.terminal import fields, fitted

CLIENTS_SHOWN = 30
"""Maximum number of clients in the table."""
TILE, COLUMNS, LABEL = 96, 8, 150
"""Size of an image in pixels, images per row, and pixels for the name of a class."""


def partition_table(name: str, description: Mapping[str, Any], width: int) -> Group:
    """Lay out one row per client: training and test images, classes held, the largest class.

    There is a column of domains if the data set has several, and a column of labels if there are
    clients without labels.

    Args:
        name: The name of the data set.
        description: The content of `partition.json`.
        width: Width of the terminal, in characters.
    """
    classes = description["class_names"]
    train_KC = dense(description["train_counts"], len(classes))
    test_KC = dense(description["test_counts"], len(classes))
    domain_KD = dense(description["domain_counts"], len(description["domain_names"]))
    several_domains = domain_KD.shape[1] > 1
    unlabelled = set(description.get("unlabelled_clients", ()))
    words = ["largest class"] + ["domains"] * several_domains + ["labels"] * bool(unlabelled)
    rows = []
    for k, row_C in enumerate(train_KC[:CLIENTS_SHOWN]):
        largest = int(row_C.argmax())
        # `max(..., 1)`: a client may hold no training image.
        share = f"{classes[largest]} ({100 * row_C[largest] / max(row_C.sum(), 1):.0f} %)"
        cells = [
            str(k),
            str(row_C.sum()),
            str(test_KC[k].sum()),
            str((row_C > 0).sum()),
            share if row_C.any() else "-",
        ]
        if several_domains:
            cells.append(_domains(domain_KD[k], description["domain_names"]))
        if unlabelled:
            cells.append("none" if k in unlabelled else "all")
        rows.append(cells)
    hidden = len(train_KC) - CLIENTS_SHOWN
    server = sum(description["server_test_counts"])
    note = (f"and {hidden} more clients; " if hidden > 0 else "") + (
        f"{train_KC.sum()} local training, {test_KC.sum()} local test, {server} server test images"
    )
    if "validation_counts" in description:
        local = dense(description["validation_counts"], len(classes)).sum()
        on_server = sum(description["server_validation_counts"])
        official = description.get("official_validation_images")
        origin = "of the official split" if official else "taken from the test images"
        note += f"; {local} local validation images, {on_server} on the server"
        note += f" ({origin})" if on_server else ""
    heads = ["client", "train", "test", "classes", *words]
    client, *columns = fields(heads, rows, left=words, most={"largest class": 30})
    title = f"{name}: {len(train_KC)} clients, {len(classes)} classes"
    return fitted(client, columns, width, title=title, note=note)


def _domains(row_D: NDArray[np.int64], names: Sequence[str]) -> str:
    """Return the name of a client's only domain, or the number of its domains."""
    held = np.flatnonzero(row_D)
    return names[held[0]] if len(held) == 1 else str(len(held))


def contact_sheet(dataset: ImageDataset) -> Image.Image:
    """Draw one row per class with `COLUMNS` images spread evenly over its domains."""
    rows = len(dataset.class_names)
    sheet = Image.new("RGB", (LABEL + COLUMNS * (TILE + 2), rows * (TILE + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, name in enumerate(dataset.class_names):
        top = c * (TILE + 2)
        draw.text((4, top + TILE // 2 - 6), name[:24], fill="black")
        members = np.flatnonzero(dataset.labels_N == c)
        # A stable sort keeps the images of a domain in their order, so the sheet is the same every
        # time.
        members = members[np.argsort(dataset.domains_N[members], kind="stable")]
        picks = np.linspace(0, len(members) - 1, min(COLUMNS, len(members))).round().astype(int)
        for column, i in enumerate(members[picks]):
            tile = dataset.open_image(int(i)).resize((TILE, TILE), Image.Resampling.BICUBIC)
            sheet.paste(tile, (LABEL + column * (TILE + 2), top))
    return sheet
