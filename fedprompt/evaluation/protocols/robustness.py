"""Robustness: accuracy when test images are changed to be misclassified (PGD).

Source: Towards Deep Learning Models Resistant to Adversarial Attacks (Madry et al., ICLR 2018,
arXiv 1706.06083); see `fedprompt/evaluation/perturbations.py`. Each model is attacked for itself,
with its gradient (white box), in the pixels that enter the image tower: zero-shot and the global
model on `images` of the server's test images, personal models on up to `client_images` of their
client's own. Personal models are attacked on the clients' side, and only if they differ from the
global model. An image has the same random start for all models and all eps.

Methods that read patches or local features of an image are refused: those come from the cache, and
an attack would not change them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.evaluation.perturbations import (
    ATTACKABLE,
    correct_under_attack,
    open_pixels,
    starts,
)
from fedprompt.evaluation.protocol import Finished, Numbers, Part, Reported
from fedprompt.messages import MAX_EXAMPLES, Ranges
from fedprompt.methods.base import Method, Tensors
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import MODEL_COLOURS, Axis, Curve, Figure, Lines, palette
from fedprompt.reports.format import Table, percent
from fedprompt.scoring import encode_global, encode_personal, model_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace


@dataclass(frozen=True)
class RobustnessOptions:
    """How large the changes are, and how many images are attacked."""

    eps: list[float] = option([1.0, 2.0, 4.0, 8.0], "largest changes of a pixel, of 255")
    steps: int = option(10, "steps of PGD", ge=1)
    images: int = option(128, "server's test images that are attacked", ge=1)
    client_images: int = option(4, "own test images of each client that are attacked", ge=0)

    def check(self) -> None:
        """Refuse changes that are none, or larger than the range of pixels."""
        if not self.eps or not all(0 < size <= 255 for size in self.eps):
            raise UserError(f"eps is {self.eps}; it must list numbers above 0 and at most 255.")


class Robustness(Reported):
    """Accuracy of each model under PGD."""

    name = "robustness"
    title = "Accuracy under attack"
    caption = "Accuracy on test images that are changed by at most eps per pixel (PGD)."
    Options = RobustnessOptions
    asks_clients = True
    options: RobustnessOptions

    @classmethod
    def suits(cls, method: Method) -> bool:
        """Whether all that the method reads of an image is a function of its pixels here."""
        return super().suits(method) and method.needs <= ATTACKABLE

    def open(self, workspace: Workspace) -> None:
        """Refuse methods whose inputs an attack would not change; see `Protocol.open`."""
        if not self.suits(workspace.method):
            needs = ", ".join(sorted(workspace.method.needs - ATTACKABLE))
            raise UserError(
                f"protocol robustness changes pixels, but method '{workspace.method.name}' also "
                f"reads {needs} of an image; leave the protocol out, or use another method."
            )

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """Correct predictions under each eps; see `Protocol.measure_clients`.

        All counts are zero where personal models are the global model.
        """
        sizes = range(1 + len(self.options.eps))
        # Strategies may send different shared tensors to clients that have no private ones.
        personal = any(private) or bool(workspace.extras_shapes) or not workspace.method.has_global
        if not personal or not self.options.client_images:
            return [{"tested": 0, **{f"correct-{n}": 0 for n in sizes}} for _ in clients]
        encoded = encode_personal(workspace.method, shared, private)
        rows: list[Numbers] = []
        for k, client in enumerate(clients):
            index = workspace.partition.test(client)[: self.options.client_images]
            counts = self._counts(workspace, workspace.method, model_of(encoded, k), index)
            rows.append(
                {"tested": len(index), **{f"correct-{n}": found for n, found in enumerate(counts)}}
            )
        return rows

    def client_numbers(self, workspace: Workspace) -> Ranges:
        """Images, and a count per eps; see `Protocol.client_numbers`."""
        sizes = range(1 + len(self.options.eps))
        return {"tested": (0, MAX_EXAMPLES), **{f"correct-{n}": (0, "tested") for n in sizes}}

    def measure(self, run: Finished) -> dict[str, Any]:
        """Accuracy of each model under each eps."""
        workspace, options = run.workspace, self.options
        index = workspace.partition.server_test
        if len(index) > options.images:
            # Evenly spread, because test images may be sorted by class.
            index = index[np.linspace(0, len(index) - 1, options.images).round().astype(np.int64)]
        models: dict[str, tuple[Method, Tensors]] = {
            "zero-shot": (zero_shot(workspace.clip, workspace.task), {})
        }
        if workspace.method.has_global:
            models["global"] = workspace.method, run.shared
        rows = [
            _row(name, len(index), self._counts(workspace, of, encode_global(of, shared), index))
            for name, (of, shared) in models.items()
        ]
        tested = sum(int(row["tested"]) for row in run.clients.values())
        if tested:
            sizes = range(1 + len(options.eps))
            counts = [sum(int(row[f"correct-{n}"]) for row in run.clients.values()) for n in sizes]
            rows.append(_row("personal", tested, counts))
        return {"eps": [0, *options.eps], "steps": options.steps, "rows": rows}

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per model."""
        columns = ("model", "images", *(_named(size) for size in part["eps"]))
        rows = tuple(
            (row["model"], f"{row['images']:,}", *map(percent, row["accuracy"]))
            for row in part["rows"]
        )
        note = (
            f"PGD of {part['steps']} steps on each model for itself, in the pixels that enter the "
            "image tower. Zero-shot and global: server's test images; personal: own test images of "
            "all clients, pooled."
        )
        return Table(cls.title, columns, rows, note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """A curve per model."""
        curves = [
            Curve(
                name=row["model"],
                color=MODEL_COLOURS[row["model"]],
                x=part["eps"],
                y=row["accuracy"],
            )
            for row in part["rows"]
        ]
        return _lines(cls.title, curves)

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure]:
        """One row per run, model and eps; a curve per run, of its last model."""
        rows = tuple(
            (name, row["model"], _named(size), percent(accuracy))
            for name, part in runs
            for row in part["rows"]
            for size, accuracy in zip(part["eps"], row["accuracy"], strict=True)
        )
        curves = [
            Curve(
                name=f"{name}, {part['rows'][-1]['model']}",
                color=palette(i),
                x=part["eps"],
                y=part["rows"][-1]["accuracy"],
            )
            for i, (name, part) in enumerate(runs)
        ]
        table = Table(cls.title, ("run", "model", "eps", "accuracy"), rows, cls.caption)
        return table, _lines(cls.title, curves)

    def _counts(
        self, workspace: Workspace, method: Method, encoded: Tensors, index: NDArray[np.int64]
    ) -> list[int]:
        options, dataset = self.options, workspace.dataset
        if not len(index):
            return [0] * (1 + len(options.eps))
        pixels = open_pixels(workspace.clip, dataset, index.tolist())
        start = starts(pixels, index.tolist(), self.config.seed)
        labels = torch.from_numpy(dataset.labels_N[index])
        sizes = [size / 255 for size in options.eps]
        return correct_under_attack(method, encoded, pixels, labels, start, sizes, options.steps)


def _named(size: float) -> str:
    return f"{size:g} / 255" if size else "unchanged"


def _row(model: str, images: int, counts: Sequence[int]) -> dict[str, Any]:
    # A server without test images has no accuracy.
    accuracy = [found / images if images else None for found in counts]
    return {"model": model, "images": images, "accuracy": accuracy}


def _lines(title: str, curves: list[Curve]) -> Figure:
    panel = Lines(
        curves=curves,
        x=Axis(label="Largest change of a pixel (of 255)", noun="under", low=0),
        y=Axis(label="Accuracy", format="percent", low=0, high=1),
    )
    return Figure(name=Robustness.name, title=title, caption=Robustness.caption, panels=[panel])
