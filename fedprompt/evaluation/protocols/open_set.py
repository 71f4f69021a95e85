"""Open-set split: classes that all clients hold, that some hold, and that none holds.

Source: SegPrompt (Zhu et al., ICCV 2023, arXiv 2308.06531), which divides classes into known, seen
and unseen ones. The federated form is ours: a class is held by a client that has training images of
it. The last `held_share` of the classes is held out, so that no client has them; if base_to_new
runs as well, its new classes are these. In every test the names of all classes compete.

All models are tested on the server's test images and on the test images of the held-out classes.
Results of personal models are means over clients. A method whose tensors belong to the training
classes is tested without the held-out ones, with its own class names.

Shape suffixes: N images, C classes, K clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedprompt.config.fields import option
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.inputs import Inputs
from fedprompt.data.held_out import HeldOut
from fedprompt.errors import UserError
from fedprompt.evaluation.held_classes import hold_out_last
from fedprompt.evaluation.metrics import Ints
from fedprompt.evaluation.predictions import by_group, hits, shares
from fedprompt.evaluation.protocol import Finished, Numbers, Part, Reported
from fedprompt.messages import MAX_EXAMPLES, Ranges
from fedprompt.methods.base import Task, Tensors
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import Figure
from fedprompt.reports.figure_parts import model_bars
from fedprompt.reports.format import Table, percent, percent_spread
from fedprompt.scoring import encode_global, encode_personal, model_of
from fedprompt.statistics import sample_std

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace

HOLDERS = ("all", "some", "none")


@dataclass(frozen=True)
class OpenSetOptions:
    """Which classes nobody holds."""

    held_share: float = option(0.25, "share of classes held out, the last ones", gt=0, lt=1)


class OpenSet(Reported):
    """Accuracy on classes by how many clients hold them."""

    name = "open_set"
    title = "Open-set split"
    caption = "Accuracy on classes that all clients hold, that some hold and that none holds."
    Options = OpenSetOptions
    asks_clients = True
    needs_new_names = True
    options: OpenSetOptions

    @property
    def holds_out(self) -> Literal["classes"]:
        """The classes that nobody holds are held out."""
        return "classes"

    @property
    def takes_held_out(self) -> bool:
        """The new classes of base_to_new can serve."""
        return True

    def hold_out(self, dataset: ImageDataset) -> tuple[ImageDataset, HeldOut]:
        """Hold out the last classes; see `Protocol.hold_out`."""
        return hold_out_last(dataset, self.options.held_share, self.name)

    def open(self, workspace: Workspace) -> None:
        """Refuse a server that does not know the partition; see `Protocol.open`."""
        if not len(workspace.partition.train_flat):
            raise UserError(
                "protocol open_set: this server does not know which classes the clients hold; "
                "leave it out of protocols."
            )

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """Correct predictions of each class; see `Protocol.measure_clients`."""
        task, inputs_N, labels_N = _test(workspace)
        method = workspace.method_for(task)
        encoded = encode_personal(method, shared, private, None if any(private) else workspace.memo)
        rows: list[Numbers] = []
        for k in range(len(clients)):
            found_N = hits(method, model_of(encoded, k), inputs_N, labels_N)
            _, correct_C = by_group(found_N, labels_N.numpy(), len(task.class_names))
            rows.append({f"correct-{c}": n for c, n in enumerate(correct_C.tolist())})
        return rows

    def client_numbers(self, workspace: Workspace) -> Ranges:
        """A count per class; see `Protocol.client_numbers`."""
        classes = len(_test(workspace)[0].class_names)
        return {f"correct-{c}": (0, MAX_EXAMPLES) for c in range(classes)}

    def measure(self, run: Finished) -> dict[str, Any]:
        """Accuracy of each model on each kind of class."""
        workspace = run.workspace
        task, inputs_N, labels_N = _test(workspace)
        classes, kind_C = len(task.class_names), _kinds(workspace)
        tested_C = np.bincount(labels_N.numpy(), minlength=classes).astype(np.int64)

        def accuracy(correct_C: Ints) -> list[float | None]:
            sums = [
                [int(n_C[kind_C == h].sum()) for h in range(3)] for n_C in (correct_C, tested_C)
            ]
            return shares(np.array(sums[0]), np.array(sums[1]))

        models = {"zero-shot": (zero_shot(workspace.clip, task), Tensors())}
        if workspace.method.has_global:
            models["global"] = workspace.method_for(task), run.shared
        rows: list[dict[str, Any]] = []
        for model, (method, shared) in models.items():
            found_N = hits(method, encode_global(method, shared), inputs_N, labels_N)
            correct_C = by_group(found_N, labels_N.numpy(), classes)[1]
            found = dict(zip(HOLDERS, accuracy(correct_C), strict=True))
            rows.append({"model": model, **found, "std": {}})
        if run.clients:
            each = [
                accuracy(np.array([int(row[f"correct-{c}"]) for c in range(classes)]))
                for row in run.clients.values()
            ]
            means: dict[str, Any] = {"model": "personal", "std": {}}
            for h, holders in enumerate(HOLDERS):
                known = [values[h] for values in each if values[h] is not None]
                means[holders] = float(np.mean(known)) if known else None  # type: ignore[arg-type]
                means["std"][holders] = sample_std(known)  # type: ignore[arg-type]
            rows.append(means)
        return {
            "classes": {h: int((kind_C == i).sum()) for i, h in enumerate(HOLDERS)},
            "images": {h: int(tested_C[kind_C == i].sum()) for i, h in enumerate(HOLDERS)},
            "why": workspace.method.no_transfer_reason,
            "rows": rows,
        }

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per model."""
        rows = tuple(
            (row["model"], *(percent_spread(row[h], row["std"].get(h)) for h in HOLDERS))
            for row in part["rows"]
        )
        counts = ", ".join(
            f"{part['classes'][h]} held by {h} ({part['images'][h]:,} test images)" for h in HOLDERS
        )
        note = f"Classes: {counts}; the names of all of them compete. Personal: mean ± std."
        if part["why"]:
            note += f" Held-out classes are left out: {part['why']}."
        return Table(cls.title, ("model", *(f"held by {h}" for h in HOLDERS)), rows, note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """Bars per model."""
        rows = part["rows"]
        return model_bars(
            cls.name,
            cls.title,
            cls.caption,
            [f"held by {h}" for h in HOLDERS],
            {row["model"]: [row[h] for h in HOLDERS] for row in rows},
            {row["model"]: [row["std"].get(h) for h in HOLDERS] for row in rows},
        )

    @classmethod
    def compare(cls, runs: Sequence[tuple[str, Part]]) -> tuple[Table, Figure]:
        """One row per run and model; bars of the last model of each run."""
        rows = tuple(
            (name, row["model"], *(percent(row[h]) for h in HOLDERS))
            for name, part in runs
            for row in part["rows"]
        )
        columns = ("run", "model", *(f"held by {h}" for h in HOLDERS))
        bars = {h: [part["rows"][-1][h] for _, part in runs] for h in HOLDERS}
        title = f"{cls.title}: {runs[0][1]['rows'][-1]['model']}"
        figure = model_bars(cls.name, title, cls.caption, [name for name, _ in runs], bars)
        return Table(cls.title, columns, rows, cls.caption), figure


def _test(workspace: Workspace) -> tuple[Task, Inputs, Tensor]:
    """All class names, the test images, and their labels among these names."""
    task, (inputs_N, labels_N) = workspace.task, workspace.server_test()
    held = workspace.held_out
    assert held is not None
    if workspace.method.no_transfer_reason is not None:
        return task, inputs_N, labels_N
    new_inputs, new_labels = workspace.held_out_test()
    every = replace(task, class_names=(*task.class_names, *held.class_names))
    # In the joint list of names, the held-out classes follow the others.
    shifted = new_labels + len(task.class_names)
    return every, Inputs.cat([inputs_N, new_inputs]), torch.cat([labels_N, shifted])


def _kinds(workspace: Workspace) -> Ints:
    """The index in `HOLDERS` of every class of the test (C,)."""
    own = len(workspace.task.class_names)
    counts_KC = workspace.partition.train_counts(workspace.dataset.labels_N, own)
    holders_C = (counts_KC > 0).sum(0)
    kind_C = np.where(holders_C == len(counts_KC), 0, np.where(holders_C > 0, 1, 2))
    more = len(_test(workspace)[0].class_names) - own
    return np.concatenate([kind_C, np.full(more, 2)]).astype(np.int64)
