"""Options that several commands have: how runs are executed, and where predictions go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Quick = Annotated[
    bool, typer.Option("--quick", help="Run the small variant that the file describes.")
]
Serial = Annotated[
    bool, typer.Option("--serial", help="Do one run after the other, in this process.")
]
Jobs = Annotated[
    int | None, typer.Option(min=1, help="Most runs at once \\[as the machine has room for].")
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Ray cluster to join, e.g. auto; its nodes must share the folder."),
]
PredictionFile = Annotated[
    Path | None,
    typer.Option("--out", help="Write a CSV file, image by image, instead of printing a table."),
]
