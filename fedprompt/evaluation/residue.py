"""What a global model knows of images that were to be forgotten: accuracies and extraction.

The protocol `unlearning` calls it on the server.

Shape suffixes: N images, C classes, M classes with test images.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedprompt.data.features.inputs import Inputs
from fedprompt.evaluation.forgetting import Request
from fedprompt.evaluation.membership import Floats, margins
from fedprompt.methods.base import Method, Tensors
from fedprompt.rng import generator
from fedprompt.scoring import encode_global, logits_of
from fedprompt.statistics import sample_std

if TYPE_CHECKING:
    from fedprompt.workspace import Workspace

ACCURACIES = ("forgotten", "unseen", "retained")


class RequestImages:
    """The images of the accuracies.

    Args:
        workspace: the server's workspace.
        request: what is forgotten.
        means: test images per class from which the means of the extraction are computed.
    """

    def __init__(self, workspace: Workspace, request: Request, means: int) -> None:
        server = workspace.partition.server_test
        labels_N = workspace.dataset.labels_N
        gone_N = np.isin(labels_N[server], request.classes)
        by_class = [server[labels_N[server] == c][:means] for c in np.unique(labels_N[server])]
        fitted = np.concatenate([server[:0], *by_class])
        of_client = request.client is not None
        unseen = request.others if of_client else server[gone_N]
        index = {
            "forgotten": request.forgotten,
            "unseen": unseen,
            "retained": server if of_client else server[~gone_N],
        }
        self._sets = {name: workspace.images(found) for name, found in index.items()}
        self._fitted = workspace.images(fitted)
        self._tested = workspace.images(np.setdiff1d(unseen, fitted))

    def counts(self) -> dict[str, int]:
        """The number of images of each set."""
        return {name: len(labels) for name, (_, labels) in self._sets.items()}

    def accuracies(self, method: Method, shared: Tensors) -> dict[str, float | None]:
        """Accuracies of one model; None on a set without images."""
        found: dict[str, float | None] = {
            name: _share(_logits(method, shared, inputs).argmax(-1) == labels)
            for name, (inputs, labels) in self._sets.items()
        }
        fitted_NC, labels_N = _logits(method, shared, self._fitted[0]), self._fitted[1]
        if not len(labels_N):
            return found | {"extracted": None}
        known = labels_N.unique()
        means_MC = torch.stack([fitted_NC[labels_N == c].mean(0) for c in known])
        tested_NC, truth_N = _logits(method, shared, self._tested[0]), self._tested[1]
        nearest_N = torch.cdist(tested_NC, means_MC).argmin(-1)
        return found | {"extracted": _share(known[nearest_N] == truth_N)}


def _logits(method: Method, shared: Tensors, inputs: Inputs) -> Tensor:
    """Logits (N, C) of the global model of these tensors."""
    if not len(inputs):
        return torch.zeros(0, len(method.task.class_names))
    return torch.cat(list(logits_of(method, encode_global(method, shared), inputs)))


def margins_under(method: Method, shared: Tensors, inputs: Inputs, labels: Tensor) -> Floats:
    """The margins (N,) of images under the global model of these tensors."""
    return margins(_logits(method, shared, inputs), labels)


def _share(hits_N: Tensor) -> float | None:
    return float(hits_N.double().mean()) if len(hits_N) else None


def classes_alone(workspace: Workspace, request: Request) -> list[int]:
    """The classes that nobody has after the request; they can be left out without training."""
    if request.client is None:
        return list(request.classes)
    labels_N, partition = workspace.dataset.labels_N, workspace.partition
    own = set(labels_N[request.forgotten].tolist())
    others = set(labels_N[request.without(partition).train_flat].tolist())
    return sorted(own - others)


def _sets(classes: int, size: int, most: int, seed: int) -> list[list[int]]:
    """All sets of `size` classes, or `most` of them at random."""
    if math.comb(classes, size) <= most:
        return [list(found) for found in itertools.combinations(range(classes), size)]
    draws = generator(seed, "forgotten sets", size)
    return [sorted(draws.permutation(classes)[:size].tolist()) for _ in range(most)]


def left_out_in_turn(workspace: Workspace, shared: Tensors, most: int) -> list[dict[str, Any]]:
    """Accuracies with sets of 1, half and all but one of the classes left out in turn.

    Args:
        workspace: the server's workspace.
        shared: the final shared tensors, without a client axis.
        most: the largest number of sets of each size.

    Returns:
        One row per size; none if `most` is 0 or the method's tensors are not separated by class.
    """
    method, classes = workspace.method, len(workspace.task.class_names)
    if not most or method.without_classes(shared, [0]) is None:
        return []
    inputs_N, labels_N = workspace.server_test()
    rows = []
    for size in sorted({1, max(1, classes // 2), classes - 1}):
        accuracy: dict[str, list[float]] = {"forgotten": [], "retained": []}
        sets = _sets(classes, size, most, workspace.config.seed)
        for gone in sets:
            kept = method.without_classes(shared, gone)
            assert kept is not None
            hits_N = _logits(method, kept, inputs_N).argmax(-1) == labels_N
            of_gone_N = torch.isin(labels_N, torch.tensor(gone))
            for key, mask_N in (("forgotten", of_gone_N), ("retained", ~of_gone_N)):
                if mask_N.any():
                    accuracy[key].append(float(hits_N[mask_N].double().mean()))
        row: dict[str, Any] = {"classes": size, "sets": len(sets)}
        for key, values in accuracy.items():
            row |= {key: float(np.mean(values)) if values else None}
            row |= {f"{key}_std": sample_std(values)}
        rows.append(row)
    return rows
