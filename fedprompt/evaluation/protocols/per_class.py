"""Accuracy per class, and which classes are confused with each other.

Zero-shot and the global model are measured on the server's test images. Each personal model is
measured on its client's own test images. The images of all clients are pooled, so a client counts
in proportion to its number of images. The confusion matrix is that of the global model, or of
zero-shot if a method has none; the figure divides each row by the number of images of its class.

Shape suffixes: N images of a test set, B images of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fedprompt.backbone.memo import Memo
from fedprompt.data.features.inputs import Inputs
from fedprompt.evaluation.metrics import Ints, confusion
from fedprompt.evaluation.protocol import Finished, Numbers, Part, Reported
from fedprompt.messages import MAX_EXAMPLES, Ranges
from fedprompt.methods.base import Method, Tensors
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import Axis, Figure, Heat
from fedprompt.reports.format import Table, percent
from fedprompt.scoring import encode_global, encode_personal, logits_of, model_of

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace

NAMED = 46
"""The largest number of rows of the table, and of classes whose names fit on the axes."""


@dataclass(frozen=True)
class PerClassOptions:
    """The protocol has no options."""


class PerClass(Reported):
    """Accuracy of every class, and the confusion matrix."""

    name = "per_class"
    title = "Accuracy per class"
    caption = "Confusion matrix: share of each true class (rows) predicted as each class (columns)."
    Options = PerClassOptions
    asks_clients = True

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """Counts per class over each client's own test images; see `Protocol.measure_clients`."""
        method = workspace.method
        encoded = encode_personal(method, shared, private, workspace.memo)
        rows: list[Numbers] = []
        for k, client in enumerate(clients):
            counts_CC = _confusion(method, model_of(encoded, k), *workspace.test_data(client))
            row: Numbers = {}
            for c in range(len(counts_CC)):
                row[f"tested-{c}"] = int(counts_CC[c].sum())
                row[f"correct-{c}"] = int(counts_CC[c, c])
            rows.append(row)
        return rows

    def client_numbers(self, workspace: Workspace) -> Ranges:
        """Two counts per class; see `Protocol.client_numbers`."""
        ranges: dict[str, tuple[float, float | str]] = {}
        for c in range(len(workspace.task.class_names)):
            ranges[f"tested-{c}"] = (0, MAX_EXAMPLES)
            ranges[f"correct-{c}"] = (0, f"tested-{c}")
        return ranges

    def measure(self, run: Finished) -> dict[str, Any]:
        """Accuracies per class and model, and one confusion matrix."""
        workspace = run.workspace
        names, test = workspace.task.class_names, workspace.server_test()
        reference = zero_shot(workspace.clip, workspace.task)
        shown = _confusion(reference, encode_global(reference, {}), *test)
        models = {"zero-shot": _accuracy(shown)}
        if workspace.method.has_global:
            encoded = encode_global(workspace.method, run.shared, workspace.memo)
            shown = _confusion(workspace.method, encoded, *test, workspace.memo)
            models["global"] = _accuracy(shown)
        if run.clients:
            # Counts are added and then divided: a client may have no images of a class.
            sums = {
                name: [sum(int(row[f"{name}-{c}"]) for row in run.clients.values())
                       for c in range(len(names))]
                for name in ("tested", "correct")
            }  # fmt: skip
            pairs = zip(sums["correct"], sums["tested"], strict=True)
            models["personal"] = [hits / images if images else None for hits, images in pairs]
        return {
            "class_names": list(names),
            "images": shown.sum(1).tolist(),
            "accuracy": models,
            "confusion_of": list(models)[1] if workspace.method.has_global else "zero-shot",
            "confusion": shown.tolist(),
        }

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per class; with more than `NAMED` classes, those with the lowest accuracies."""
        counts = np.array(part["confusion"], dtype=np.int64)
        models, names = part["accuracy"], part["class_names"]
        shown, note = list(range(len(names))), ""
        if len(names) > NAMED:
            accuracy = models[part["confusion_of"]]
            tested = [c for c in shown if accuracy[c] is not None]
            shown = sorted(tested, key=lambda c: (accuracy[c], c))[:NAMED]
            note = f"The {NAMED} of {len(names)} classes with the lowest accuracy. "
        rows = []
        for c in shown:
            name = names[c]
            wrong = counts[c].copy()
            wrong[c] = 0
            most = int(wrong.argmax())
            images = max(1, counts[c].sum())
            mistaken = f"{part['class_names'][most]} ({100 * wrong[most] / images:.0f} %)"
            rows.append(
                (
                    name,
                    str(part["images"][c]),
                    *(percent(found[c]) for found in models.values()),
                    mistaken if wrong[most] else "-",
                )
            )
        note += (
            "Zero-shot and global: server's test images; personal: own test images of all clients, "
            f"pooled. Most taken for: by the {part['confusion_of']} model."
        )
        columns = ("class", "test images", *models, "most taken for")
        return Table(cls.title, columns, tuple(rows), note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """The confusion matrix."""
        counts = np.array(part["confusion"], dtype=np.float64)
        # A class without test images has a row of zeros.
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        panel = Heat(
            rows=part["class_names"],
            columns=part["class_names"],
            cells=share.tolist(),
            name="share of the class's images",
            format="percent",
            x=Axis(label="Predicted"),
            y=Axis(label="True"),
            low=0,
            high=1,
            square=True,
        )
        return Figure(
            name=cls.name,
            title=f"Confusion matrix, {part['confusion_of']} model",
            caption=cls.caption,
            panels=[panel],
        )


def _confusion(
    method: Method,
    encoded: Tensors,
    inputs_N: Inputs,
    labels_N: Tensor,
    memo: Memo | None = None,
) -> Ints:
    """The confusion matrix (C, C) of one encoded model on a test set."""
    classes = len(method.task.class_names)
    total = np.zeros((classes, classes), dtype=np.int64)
    first = 0
    for logits_BC in logits_of(method, encoded, inputs_N, memo):
        labels_B = labels_N[first : first + len(logits_BC)]
        total += confusion(labels_B.numpy(), logits_BC.argmax(-1).numpy(), classes)
        first += len(logits_BC)
    return total


def _accuracy(counts_CC: Ints) -> list[float | None]:
    images_C = counts_CC.sum(1)
    return [int(counts_CC[c, c]) / int(n) if n else None for c, n in enumerate(images_C)]
