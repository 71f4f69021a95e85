"""Accuracy by group of images: the worst group, and its distance to the best.

Source: Uplifting Lower-Income Data (Nwatu, Ignat and Mihalcea, 2023, arXiv 2407.02623), which
reports CLIP's accuracy by income and country of the images. Groups here are the domains of the data
set or its superclasses.

Zero-shot and the global model are measured on the server's test images. Personal models are
measured on their clients' own test images, and the images of all clients are pooled. `client gap`
is the mean over clients of the distance between the best and the worst group on a client's own
images, over clients with images of two groups or more.

Shape suffix: G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedprompt.config.fields import option
from fedprompt.data.dataset import ImageDataset
from fedprompt.errors import UserError
from fedprompt.evaluation.metrics import Ints
from fedprompt.evaluation.predictions import by_group, hits, shares
from fedprompt.evaluation.protocol import Finished, Numbers, Part, Reported
from fedprompt.messages import MAX_EXAMPLES, Ranges
from fedprompt.methods.base import Tensors
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import Figure
from fedprompt.reports.figure_parts import model_bars
from fedprompt.reports.format import Table, percent
from fedprompt.scoring import encode_global, encode_personal, model_of

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace


@dataclass(frozen=True)
class PerGroupOptions:
    """What the groups are."""

    by: Literal["domain", "superclass"] = option("domain", "what the groups of images are")


class PerGroup(Reported):
    """Accuracy of every group, the worst one and the gap."""

    name = "per_group"
    title = "Accuracy per group"
    caption = "Accuracy of each group; gap: between the best and the worst group."
    Options = PerGroupOptions
    asks_clients = True
    options: PerGroupOptions

    def open(self, workspace: Workspace) -> None:
        """Refuse a data set with fewer than two groups; see `Protocol.open`."""
        names = group_names(workspace.dataset, self.options.by)
        if len(names) < 2:
            raise UserError(
                f"protocol per_group: by {self.options.by}, '{workspace.dataset.name}' has "
                f"{len(names)} groups, and two or more are needed; change "
                "protocol_options.per_group.by or the data set."
            )

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """Counts per group over each client's own test images; see `Protocol.measure_clients`."""
        method, groups = workspace.method, len(group_names(workspace.dataset, self.options.by))
        encoded = encode_personal(method, shared, private, workspace.memo)
        rows: list[Numbers] = []
        for k, client in enumerate(clients):
            found_N = hits(method, model_of(encoded, k), *workspace.test_data(client))
            group_N = groups_of(workspace.dataset, self.options.by)[
                workspace.partition.test(client)
            ]
            tested_G, correct_G = by_group(found_N, group_N, groups)
            row: Numbers = {f"tested-{g}": n for g, n in enumerate(tested_G.tolist())}
            rows.append(row | {f"correct-{g}": n for g, n in enumerate(correct_G.tolist())})
        return rows

    def client_numbers(self, workspace: Workspace) -> Ranges:
        """Two counts per group; see `Protocol.client_numbers`."""
        ranges: dict[str, tuple[float, float | str]] = {}
        for g in range(len(group_names(workspace.dataset, self.options.by))):
            ranges |= {f"tested-{g}": (0, MAX_EXAMPLES), f"correct-{g}": (0, f"tested-{g}")}
        return ranges

    def measure(self, run: Finished) -> dict[str, Any]:
        """Accuracies per group and model."""
        workspace, test = run.workspace, run.workspace.server_test()
        names = group_names(workspace.dataset, self.options.by)
        group_N = groups_of(workspace.dataset, self.options.by)[workspace.partition.server_test]
        plain = zero_shot(workspace.clip, workspace.task)
        found = {"zero-shot": hits(plain, encode_global(plain, {}), *test)}
        if workspace.method.has_global:
            encoded = encode_global(workspace.method, run.shared, workspace.memo)
            found["global"] = hits(workspace.method, encoded, *test, workspace.memo)
        models = {
            model: _summary(*by_group(hits_N, group_N, len(names)))
            for model, hits_N in found.items()
        }
        client_gap = None
        if run.clients:
            tested_KG, correct_KG = (
                np.array(
                    [[int(row[f"{kind}-{g}"]) for g in range(len(names))]
                     for row in run.clients.values()]
                )
                for kind in ("tested", "correct")
            )  # fmt: skip
            models["personal"] = _summary(tested_KG.sum(0), correct_KG.sum(0))
            gaps = [
                summary["gap"]
                for tested_G, correct_G in zip(tested_KG, correct_KG, strict=True)
                if (summary := _summary(tested_G, correct_G))["gap"] is not None
            ]
            client_gap = float(np.mean(gaps)) if gaps else None
        return {
            "by": self.options.by,
            "names": list(names),
            "images": np.bincount(group_N, minlength=len(names)).tolist(),
            "models": models,
            "client_gap": client_gap,
        }

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per group, then the mean over groups, the worst group and the gap."""
        models = part["models"]
        rows = [
            (
                name,
                str(part["images"][g]),
                *(percent(found["accuracy"][g]) for found in models.values()),
            )
            for g, name in enumerate(part["names"])
        ]
        for key in ("mean", "worst", "gap"):
            rows.append((key, "", *(percent(found[key]) for found in models.values())))
        note = (
            f"Groups by {part['by']}. Zero-shot and global: server's test images; personal: own "
            f"test images of all clients, pooled. Mean over clients of the gap on a client's own "
            f"images: {percent(part['client_gap'])}."
        )
        return Table(cls.title, (part["by"], "test images", *models), tuple(rows), note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """Bars of every group."""
        models = {name: found["accuracy"] for name, found in part["models"].items()}
        return model_bars(cls.name, cls.title, cls.caption, part["names"], models)

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure]:
        """One row per run and model; bars of the worst group."""
        rows = tuple(
            (name, model, *(percent(found[key]) for key in ("mean", "worst", "gap")))
            for name, part in runs
            for model, found in part["models"].items()
        )
        table = Table(cls.title, ("run", "model", "mean", "worst", "gap"), rows, cls.caption)
        names = list(dict.fromkeys(model for _, part in runs for model in part["models"]))
        worst = {
            model: [_worst_of(part["models"].get(model)) for _, part in runs] for model in names
        }
        title = f"{cls.title}: worst group"
        return table, model_bars(cls.name, title, cls.caption, [n for n, _ in runs], worst)


def _worst_of(found: Mapping[str, Any] | None) -> float | None:
    return None if found is None else found["worst"]


def group_names(dataset: ImageDataset, by: str) -> tuple[str, ...]:
    """The names of the groups by `domain` or `superclass`."""
    if by == "domain":
        return dataset.domain_names
    return tuple(dict.fromkeys(dataset.superclass_names))


def groups_of(dataset: ImageDataset, by: str) -> Ints:
    """The group of every image (N,); meaningless where an image has no label here."""
    if by == "domain":
        return dataset.domains_N
    names = group_names(dataset, by)
    group_C = np.array([names.index(name) for name in dataset.superclass_names], dtype=np.int64)
    return group_C[dataset.labels_N]


def _summary(tested_G: Ints, correct_G: Ints) -> dict[str, Any]:
    """Accuracy of every group, their mean, the worst one and the gap; over groups with images."""
    accuracy = shares(correct_G, tested_G)
    known = [share for share in accuracy if share is not None]
    return {
        "accuracy": accuracy,
        "mean": float(np.mean(known)) if known else None,
        "worst": min(known, default=None),
        "gap": max(known) - min(known) if len(known) > 1 else None,
    }
