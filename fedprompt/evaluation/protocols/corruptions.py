"""Corruptions: accuracy when test images are noisy, blurred, in bad weather or badly stored.

Source: Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks
and Dietterich, ICLR 2019, arXiv 1903.12261), the 15 corruptions of ImageNet-C at five severities;
see `fedprompt/data/corruptions`. Mean corruption accuracy is the mean over corruptions and
severities. How we differ: the paper's mCE divides errors by those of AlexNet, which fits ImageNet
alone.

Zero-shot and the global model are tested on `images` of the server's test images, personal models
on up to `client_images` of their client's own, on the clients' side and only if they differ from
the global model. Corrupted images are encoded once, before the first round for the server's, and
their features are cached; all models see the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedprompt.config.fields import option
from fedprompt.data.cache_files import default_cache_dir
from fedprompt.data.corruptions import CORRUPTIONS, SEVERITIES
from fedprompt.data.corruptions.dataset import corrupted_dataset
from fedprompt.data.features.inputs import Inputs
from fedprompt.data.features.table import open_feature_table
from fedprompt.errors import UserError
from fedprompt.evaluation.protocol import Finished, Numbers, Part, Reported
from fedprompt.messages import MAX_EXAMPLES, Ranges
from fedprompt.methods.base import Method, Tensors
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import MODEL_COLOURS, Axis, Curve, Figure, Lines, palette
from fedprompt.reports.format import Table, percent
from fedprompt.scoring import encode_global, encode_personal, model_of, score_models

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace


@dataclass(frozen=True)
class CorruptionOptions:
    """Which corruptions, at which severities, of how many images."""

    kinds: list[str] = option([], "names of corruptions; empty = all 15")
    severities: list[int] = option(list(SEVERITIES), "severities, from 1 to 5")
    images: int = option(128, "server's test images that are corrupted", ge=1)
    client_images: int = option(2, "own test images of each client that are corrupted", ge=0)

    def check(self) -> None:
        """Refuse names and severities that do not exist, or are named twice."""
        for name in self.kinds:
            if name not in CORRUPTIONS:
                raise UserError(f"kinds contains '{name}'; it must be of {', '.join(CORRUPTIONS)}.")
        if not self.severities or not set(self.severities) <= set(SEVERITIES):
            raise UserError(f"severities is {self.severities}; it must list numbers from 1 to 5.")
        for key, chosen in (("kinds", self.kinds), ("severities", self.severities)):
            if len(set(chosen)) < len(chosen):
                raise UserError(f"{key} is {chosen}; name each of them once.")


class Corruptions(Reported):
    """Accuracy of each model under each corruption."""

    name = "corruptions"
    title = "Accuracy under corruptions"
    caption = "Mean accuracy over the corruptions of ImageNet-C, by severity; 0 is without."
    Options = CorruptionOptions
    asks_clients = True
    options: CorruptionOptions

    @property
    def kinds(self) -> tuple[str, ...]:
        """The corruptions, in the order of the paper."""
        return tuple(n for n in CORRUPTIONS if not self.options.kinds or n in self.options.kinds)

    @property
    def severities(self) -> tuple[int, ...]:
        """The severities, ascending."""
        return tuple(sorted(self.options.severities))

    def open(self, workspace: Workspace) -> None:
        """Encode what no cache holds, so that an unreadable image ends the run before training."""
        self._inputs(workspace, self._server_images(workspace), progress=True)

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """Correct predictions under each corruption; see `Protocol.measure_clients`.

        All counts are zero where personal models are the global model.
        """
        names = self._counted()
        # Strategies may send different shared tensors to clients that have no private ones.
        personal = any(private) or bool(workspace.extras_shapes) or not workspace.method.has_global
        if not personal or not self.options.client_images:
            return [{"tested": 0, **dict.fromkeys(names, 0)} for _ in clients]
        encoded = encode_personal(workspace.method, shared, private)
        rows: list[Numbers] = []
        for k, client in enumerate(clients):
            index_N = workspace.partition.test(client)[: self.options.client_images]
            counts = self._counts(workspace, workspace.method, model_of(encoded, k), index_N)
            rows.append({"tested": len(index_N), **dict(zip(names, counts, strict=True))})
        return rows

    def client_numbers(self, workspace: Workspace) -> Ranges:
        """Images, and a count per corruption and severity; see `Protocol.client_numbers`."""
        return {"tested": (0, MAX_EXAMPLES), **dict.fromkeys(self._counted(), (0, "tested"))}

    def measure(self, run: Finished) -> dict[str, Any]:
        """Accuracy of each model under each corruption and severity."""
        workspace = run.workspace
        index_N = self._server_images(workspace)
        models: dict[str, tuple[Method, Tensors]] = {
            "zero-shot": (zero_shot(workspace.clip, workspace.task), {})
        }
        if workspace.method.has_global:
            models["global"] = workspace.method, run.shared
        rows = []
        for name, (of, shared) in models.items():
            counts = self._counts(workspace, of, encode_global(of, shared), index_N)
            rows.append(self._row(name, len(index_N), counts))
        tested = sum(int(row["tested"]) for row in run.clients.values())
        if tested:
            counts = [sum(int(row[n]) for row in run.clients.values()) for n in self._counted()]
            rows.append(self._row("personal", tested, counts))
        return {"severities": list(self.severities), "rows": rows}

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per model and corruption, after a row per model with the means."""
        levels = [f"severity {severity}" for severity in part["severities"]]
        means = [
            (f"{row['model']}, mean of {len(row['accuracy'])}", percent(row["clean"]),
             *(percent(v) for v in row["by_severity"]), percent(row["mean"]))
            for row in part["rows"]
        ]  # fmt: skip
        single = [
            (f"{row['model']}, {kind.replace('_', ' ')}", percent(row["clean"]),
             *(percent(v) for v in found), percent(_mean(found)))
            for row in part["rows"]
            for kind, found in row["accuracy"].items()
        ]  # fmt: skip
        images = ", ".join(f"{row['images']:,} ({row['model']})" for row in part["rows"])
        note = (
            f"Test images: {images}. Zero-shot and global: server's test images; personal: own "
            "test images of all clients, pooled."
        )
        columns = ("model, corruption", "without", *levels, "mean")
        return Table(cls.title, columns, (*means, *single), note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """A curve per model."""
        curves = [
            _curve(row["model"], MODEL_COLOURS[row["model"]], part, row) for row in part["rows"]
        ]
        return _lines(cls.title, curves)

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure]:
        """One row per run and model; a curve per run, of its last model."""
        rows = tuple(
            (name, row["model"], percent(row["clean"]), percent(row["mean"]))
            for name, part in runs
            for row in part["rows"]
        )
        curves = [
            _curve(f"{name}, {part['rows'][-1]['model']}", palette(i), part, part["rows"][-1])
            for i, (name, part) in enumerate(runs)
        ]
        columns = ("run", "model", "without", "mean corruption accuracy")
        return Table(cls.title, columns, rows, cls.caption), _lines(cls.title, curves)

    def _server_images(self, workspace: Workspace) -> NDArray[np.int64]:
        index_N = workspace.partition.server_test
        if len(index_N) > self.options.images:
            # Evenly spread, because test images may be sorted by class.
            place = np.linspace(0, len(index_N) - 1, self.options.images).round().astype(np.int64)
            index_N = index_N[place]
        return index_N

    def _counted(self) -> list[str]:
        """Names of a client's counts, in the order of `_counts`."""
        return ["correct", *(f"correct-{k}-{s}" for k in self.kinds for s in self.severities)]

    def _inputs(
        self, workspace: Workspace, index_N: NDArray[np.int64], progress: bool = False
    ) -> Inputs:
        """The corrupted images of the method, by kind, severity and image, from the cache."""
        clip, seed = workspace.clip, self.config.seed
        dataset = corrupted_dataset(
            clip, workspace.dataset, index_N, self.kinds, self.severities, seed
        )
        cache_dir = default_cache_dir(self.config.output.cache)
        table = open_feature_table(
            clip,
            dataset,
            cache_dir,
            workspace.method.needs,
            routing=workspace.method.routing,
            progress=progress,
        )
        return table.rows(np.arange(len(dataset)))

    def _counts(
        self, workspace: Workspace, method: Method, encoded: Tensors, index_N: NDArray[np.int64]
    ) -> list[int]:
        """Correct predictions without corruption, then under each one."""
        if not len(index_N):
            return [0] * len(self._counted())
        labels_N = torch.from_numpy(workspace.dataset.labels_N[index_N])
        corrupted = self._inputs(workspace, index_N)
        groups = [
            corrupted[first : first + len(index_N)]
            for first in range(0, len(corrupted), len(index_N))
        ]
        plain = workspace.views[0].rows(index_N, workspace.method.needs)
        every = (plain, *groups)
        return [score_models(method, encoded, 1, one, labels_N)[0].correct for one in every]

    def _row(self, model: str, images: int, counts: Sequence[int]) -> dict[str, Any]:
        # A server without test images has no accuracy.
        clean, *found = [count / images if images else None for count in counts]
        size = len(self.severities)
        accuracy = {kind: found[i * size : (i + 1) * size] for i, kind in enumerate(self.kinds)}
        by_severity = [_mean([one[s] for one in accuracy.values()]) for s in range(size)]
        return {
            "model": model,
            "images": images,
            "clean": clean,
            "accuracy": accuracy,
            "by_severity": by_severity,
            "mean": _mean(found),
        }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _curve(name: str, color: str, part: Part, row: Part) -> Curve:
    return Curve(
        name=name, color=color, x=[0, *part["severities"]], y=[row["clean"], *row["by_severity"]]
    )


def _lines(title: str, curves: list[Curve]) -> Figure:
    panel = Lines(
        curves=curves,
        x=Axis(label="Severity", noun="at severity", low=0),
        y=Axis(label="Accuracy", format="percent", low=0, high=1),
    )
    return Figure(name=Corruptions.name, title=title, caption=Corruptions.caption, panels=[panel])
