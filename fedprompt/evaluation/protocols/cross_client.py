"""Clients x clients: every personal model on every client's test images.

A personal model can be good on its own client's images and useless elsewhere. Source of the
question: COTE (CVPR 2026) reports personalised prompts with 96 % on their own test images and 22 %
on another client's; the table and its measures here are ours. The images of other clients are read
in the simulation only, and only to test: nothing is trained on them.

Measures, over the clients with test images: accuracy on own images (the diagonal), on other
clients' images (the rest), their difference, and the same for the global model and for zero-shot,
which are equal for all clients. Every client counts alike, however many images it has.

Shape suffix: K clients that are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.backbone.memo import Memo
from fedprompt.config.fields import option
from fedprompt.evaluation.predictions import hits
from fedprompt.evaluation.protocol import Finished, Numbers, Part, Reported
from fedprompt.messages import MAX_EXAMPLES, Ranges
from fedprompt.methods.base import Method, Tensors
from fedprompt.methods.registry import zero_shot
from fedprompt.reports.figure import Axis, Figure, Heat
from fedprompt.reports.format import Table, percent
from fedprompt.rng import generator
from fedprompt.scoring import encode_global, encode_personal, model_of

if TYPE_CHECKING:
    from fedprompt.reports.run_data import RunData
    from fedprompt.workspace import Workspace


@dataclass(frozen=True)
class CrossClientOptions:
    """How many clients' images every model is tested on."""

    clients: int = option(
        50, "most clients whose test images are used, drawn by the seed if there are more", ge=2
    )


class CrossClient(Reported):
    """A matrix of accuracies: models of clients by test images of clients."""

    name = "cross_client"
    title = "Clients x clients"
    caption = "Accuracy of each client's model (rows) on each client's test images (columns)."
    Options = CrossClientOptions
    asks_clients = True
    simulation_only = "tests a client's model on the images of others"

    def targets(self, workspace: Workspace) -> list[int]:
        """The clients whose test images are used, ascending: the same in every process."""
        partition = workspace.partition
        tested = [k for k in range(partition.num_clients) if len(partition.test(k))]
        most = self.options.clients
        if len(tested) <= most:
            return tested
        draw = generator(workspace.config.seed, "cross client")
        return sorted(int(k) for k in draw.choice(np.array(tested), size=most, replace=False))

    def measure_clients(
        self,
        workspace: Workspace,
        clients: Sequence[int],
        shared: Sequence[Tensors],
        private: Sequence[Tensors],
    ) -> list[Numbers]:
        """Correct answers on each target's images; see `Protocol.measure_clients`."""
        encoded = encode_personal(workspace.method, shared, private, workspace.memo)
        targets = self.targets(workspace)
        return [
            {
                f"correct-{target}": right
                for target, right in _correct(
                    workspace, workspace.method, model_of(encoded, k), targets
                ).items()
            }
            for k in range(len(clients))
        ]

    def client_numbers(self, workspace: Workspace) -> Ranges:
        """One count for each target; see `Protocol.client_numbers`."""
        return {f"correct-{k}": (0, MAX_EXAMPLES) for k in self.targets(workspace)}

    def measure(self, run: Finished) -> dict[str, Any]:
        """The matrix, and the accuracies of the models that are equal for all clients."""
        workspace = run.workspace
        targets = self.targets(workspace)
        images_K = np.array([len(workspace.partition.test(k)) for k in targets], dtype=np.float64)
        rows = {
            client: np.array([row[f"correct-{k}"] for k in targets]) / images_K
            for client, row in sorted(run.clients.items())
            if client in targets
        }
        reference = zero_shot(workspace.clip, workspace.task)
        common = {"zero-shot": _accuracies(workspace, reference, {}, targets)}
        if workspace.method.has_global:
            shared = _accuracies(workspace, workspace.method, run.shared, targets, workspace.memo)
            common["global"] = shared
        matrix_KK = np.array(list(rows.values())).reshape(len(rows), len(targets))
        return {
            "models": list(rows),
            "targets": targets,
            "accuracy": matrix_KK.tolist(),
            "common": {name: values.tolist() for name, values in common.items()},
            "personal": own_and_others(matrix_KK, list(rows), targets),
        }

    @classmethod
    def table(cls, part: Part) -> Table:
        """One row per model: on own images, on those of others, and the difference."""
        rows = []
        for name, values in part["common"].items():
            mean = float(np.mean(values)) if values else None
            rows.append(
                (name, percent(mean), percent(mean), "-", percent(min(values, default=None)))
            )
        found = part["personal"]
        difference = found["difference"]
        shown = "-" if difference is None else f"{100 * difference:+.1f}"
        rows.append(
            ("personal", percent(found["own"]), percent(found["others"]), shown,
             percent(found["lowest"]))
        )  # fmt: skip
        note = (
            f"{len(part['models'])} models on the test images of {len(part['targets'])} clients; "
            "every client counts alike. Difference: own minus others, in points. Lowest: the "
            "lowest accuracy of a model on a client's images."
        )
        columns = ("model", "own images", "others' images", "difference", "lowest")
        return Table(cls.title, columns, tuple(rows), note)

    @classmethod
    def figure(cls, part: Part, run: RunData) -> Figure:
        """The matrix, below the rows of the models that are equal for all clients."""
        common = part["common"]
        panel = Heat(
            rows=[*common, *(f"client {k}" for k in part["models"])],
            columns=[f"client {k}" for k in part["targets"]],
            cells=[*common.values(), *part["accuracy"]],
            name="accuracy",
            format="percent",
            x=Axis(label="Test images of"),
            y=Axis(label="Model of"),
            low=0,
            high=1,
        )
        return Figure(name=cls.name, title=cls.title, caption=cls.caption, panels=[panel])


def own_and_others(
    matrix: NDArray[np.float64], models: Sequence[int], targets: Sequence[int]
) -> dict[str, float | None]:
    """Summary of a matrix of accuracies.

    Args:
        matrix: (models, targets), accuracies.
        models: clients of the rows.
        targets: clients of the columns.

    Returns:
        Mean accuracy on own images, on others' images, their difference, and the lowest accuracy
        of all; None where there is nothing to average.
    """
    is_own = np.array(models)[:, None] == np.array(targets)[None]
    own = float(matrix[is_own].mean()) if is_own.any() else None
    others = float(matrix[~is_own].mean()) if (~is_own).any() else None
    return {
        "own": own,
        "others": others,
        "difference": None if own is None or others is None else own - others,
        "lowest": float(matrix.min()) if matrix.size else None,
    }


def _accuracies(
    workspace: Workspace,
    method: Method,
    shared: Tensors,
    targets: Sequence[int],
    memo: Memo | None = None,
) -> NDArray[np.float64]:
    """Accuracies (K,) of one model on the targets' images."""
    right = _correct(workspace, method, encode_global(method, shared, memo), targets)
    return np.array([right[k] / len(workspace.partition.test(k)) for k in targets])


def _correct(
    workspace: Workspace, method: Method, encoded: Tensors, targets: Sequence[int]
) -> Mapping[int, int]:
    """Correct answers of one encoded model, by client whose test images they are on."""
    return {k: int(hits(method, encoded, *workspace.test_data(k)).sum()) for k in targets}
