"""`fedprompt deploy predict` and `export`: a node's personal model, used on the node itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedprompt.cli.options import PredictionFile

NodeState = Annotated[
    Path,
    typer.Argument(
        help="The node's folder, its --state folder, or the folder of one run in there.",
        metavar="NODE_STATE",
    ),
]


def predict(
    state: NodeState,
    images: Annotated[list[Path], typer.Argument(help="Image files to classify.")],
    top: Annotated[
        int, typer.Option("--top", min=1, help="Number of classes to print per image.")
    ] = 3,
    out: PredictionFile = None,
) -> None:
    """Classify images with this node's personal model: its private and the last shared prompts."""
    from fedprompt.cli.predictions import show_predictions
    from fedprompt.deploy.node_model import find_model, load_model

    kept = find_model(state)
    show_predictions(load_model(kept).predictions(images, top), out)
    # Not on stdout, where a program may read the table.
    sys.stderr.write(f"{kept.title}\n")


def export(
    state: NodeState,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="File to write (default: class_embeddings.safetensors in the node's state).",
        ),
    ] = None,
) -> None:
    """Write the class embeddings of this node's personal model, for plain open_clip."""
    from fedprompt.deploy.node_model import find_model, load_model

    kept = find_model(state)
    path = out or kept.folder / "class_embeddings.safetensors"
    # They come from private prompts, so they are as private as these are.
    load_model(kept).export(path, mode=0o600)
    print(f"wrote {path}: {kept.title}")
