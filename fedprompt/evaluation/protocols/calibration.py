"""Calibration: is a model right in 80 % of the cases in which its confidence is 80 %?

Source: On Calibration of Modern Neural Networks (Guo et al., ICML 2017, arXiv 1706.04599). The
confidence of a prediction is its softmax probability at CLIP's logit scale. ECE is the mean of
|confidence - accuracy| over bins of equal width, weighted by images; MCE is the largest such gap.

Zero-shot and the global model are measured on the server's test images. Each personal model is
measured on its client's own test images. The images of all clients are pooled, so a client counts
in proportion to its number of images.

Shape suffixes: N images of a test set, B images of a batch, C classes, M bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fedprompt.backbone.memo import Memo
from fedprompt.config.fields import option
from fedprompt.data.features.inputs import Inputs
from fedprompt.evaluation.metrics import Reliability
from fedprompt.evaluation.protocol import Finished, Numbers, Part, Reported
from fedprompt.messages import MAX_EXAMPLES, Ranges
from fedprompt.methods.base import Method, Tensors
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import MODEL_COLOURS, Axis, Curve, Figure, Lines
from fedprompt.reports.figure_parts import stairs
from fedprompt.reports.format import Table, percent
from fedprompt.scoring import encode_global, encode_personal, logits_of, model_of

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace


@dataclass(frozen=True)
class CalibrationOptions:
    """How confidences are binned."""

    bins: int = option(15, "bins of equal width between 0 and 1", ge=1, le=1000)


class Calibration(Reported):
    """Expected and maximum calibration error, and the reliability diagram."""

    name = "calibration"
    title = "Calibration"
    caption = "Accuracy of predictions over their confidence; on the diagonal the two are equal."
    Options = CalibrationOptions
    asks_clients = True
    options: CalibrationOptions

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """Sums per bin over each client's own test images; see `Protocol.measure_clients`."""
        method = workspace.method
        encoded = encode_personal(method, shared, private, workspace.memo)
        return [
            _numbers(self._reliability(method, model_of(encoded, k), *workspace.test_data(client)))
            for k, client in enumerate(clients)
        ]

    def client_numbers(self, workspace: Workspace) -> Ranges:
        """Three sums per bin; see `Protocol.client_numbers`."""
        ranges: dict[str, tuple[float, float | str]] = {}
        for m in range(self.options.bins):
            ranges[f"count-{m}"] = (0, MAX_EXAMPLES)
            ranges[f"confidence-{m}"] = ranges[f"correct-{m}"] = (0, f"count-{m}")
        return ranges

    def measure(self, run: Finished) -> dict[str, Any]:
        """ECE, MCE and the reliability diagram of each model."""
        workspace, bins = run.workspace, self.options.bins
        test = workspace.server_test()
        reference = zero_shot(workspace.clip, workspace.task)
        models = {"zero-shot": self._reliability(reference, encode_global(reference, {}), *test)}
        if workspace.method.has_global:
            encoded = encode_global(workspace.method, run.shared, workspace.memo)
            models["global"] = self._reliability(workspace.method, encoded, *test, workspace.memo)
        own = _pooled(run.clients.values(), bins)
        # Clients that were not asked, or have no test images, report no sums.
        if own.count_M.sum():
            models["personal"] = own
        return {"bins": bins, "models": {name: _part(found) for name, found in models.items()}}

    def _reliability(
        self,
        method: Method,
        encoded: Tensors,
        inputs_N: Inputs,
        labels_N: Tensor,
        memo: Memo | None = None,
    ) -> Reliability:
        total = Reliability.of([], [], self.options.bins)
        first = 0
        for logits_BC in logits_of(method, encoded, inputs_N, memo):
            confidence_B, predicted_B = logits_BC.cpu().double().softmax(-1).max(-1)
            correct_B = predicted_B == labels_N[first : first + len(logits_BC)]
            # Rounding can put a probability slightly above 1.
            total += Reliability.of(
                confidence_B.clamp(max=1.0).numpy(), correct_B.numpy(), self.options.bins
            )
            first += len(logits_BC)
        return total

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per model."""
        rows = tuple(
            (
                name,
                percent(found["mean_accuracy"]),
                percent(found["mean_confidence"]),
                percent(found["ece"]),
                percent(found["mce"]),
            )
            for name, found in part["models"].items()
        )
        note = (
            f"{part['bins']} bins of equal width. Zero-shot and global: server's test images; "
            "personal: own test images of all clients, pooled."
        )
        return Table(cls.title, ("model", "accuracy", "confidence", "ECE", "MCE"), rows, note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """The reliability diagram, and below it the share of images in each confidence bin."""
        perfect = Curve(
            name="perfect calibration", color="alone", x=[0, 1], y=[0, 1], width=1.0, dashed=True
        )
        reliability, images = [perfect], []
        edges = np.linspace(0, 1, part["bins"] + 1).tolist()
        for name, bins in part["models"].items():
            pairs = zip(bins["confidence"], bins["accuracy"], strict=True)
            # A bin without images has neither confidence nor accuracy.
            points = [(c, a) for c, a in pairs if c is not None]
            color = MODEL_COLOURS[name]
            label = f"{name}, ECE {percent(bins['ece'])}"
            reliability.append(
                Curve(name=label, color=color, x=[c for c, _ in points], y=[a for _, a in points])
            )
            share_M = np.array(bins["count"]) / max(1, sum(bins["count"]))
            x, y = stairs(edges, share_M.tolist())
            images.append(Curve(name=name, color=color, x=x, y=y, width=1.4))
        confidence = Axis(label="Confidence", format="percent", low=0, high=1)
        accuracy = Axis(label="Accuracy", format="percent", low=0, high=1)
        share = Axis(label="Images", format="percent", low=0)
        return Figure(
            name=cls.name,
            title="Reliability",
            caption=cls.caption,
            panels=[
                Lines(
                    curves=reliability, x=replace(confidence, label=""), y=accuracy, nearest=True
                ),
                Lines(curves=images, x=confidence, y=share, nearest=True, small=True),
            ],
        )


def _numbers(found: Reliability) -> Numbers:
    """A client's sums as flat numbers, the only form that a reply can carry."""
    row: Numbers = {}
    for m in range(len(found.count_M)):
        row[f"count-{m}"] = int(found.count_M[m])
        row[f"confidence-{m}"] = float(found.confidence_M[m])
        row[f"correct-{m}"] = int(found.correct_M[m])
    return row


def _pooled(rows: Iterable[Mapping[str, int | float]], bins: int) -> Reliability:
    """The sums of all clients from what `_numbers` returned for each."""
    total = Reliability.of([], [], bins)
    for row in rows:
        total += Reliability(
            np.array([int(row[f"count-{m}"]) for m in range(bins)]),
            np.array([float(row[f"confidence-{m}"]) for m in range(bins)]),
            np.array([int(row[f"correct-{m}"]) for m in range(bins)]),
        )
    return total


def _part(found: Reliability) -> dict[str, Any]:
    images = int(found.count_M.sum())
    return {
        **found.to_json(),
        "images": images,
        "mean_confidence": float(found.confidence_M.sum() / images) if images else None,
        "mean_accuracy": float(found.correct_M.sum() / images) if images else None,
    }
