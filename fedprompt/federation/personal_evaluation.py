"""Tests of the clients' personal models, on the clients' side: the counts that a client reports."""

from __future__ import annotations

from collections.abc import Sequence

from fedprompt.federation.screening import (
    COMMON_COUNTS,
    NOT_FINITE,
    TEST_COUNTS,
    VALIDATION_COUNTS,
    Row,
)
from fedprompt.files.tensors import checksum
from fedprompt.methods.base import Tensors
from fedprompt.scoring import encode_personal, score_each, score_models
from fedprompt.workspace import Workspace


def reported_counts(workspace: Workspace, *, common: bool) -> list[tuple[str, str]]:
    """The pairs of metrics that every client of an experiment reports in an evaluation.

    Args:
        workspace: tells whether clients have validation images.
        common: whether the clients are asked for the server's test images as well.
    """
    counts = [TEST_COUNTS]
    if workspace.validates_locally:
        counts.append(VALIDATION_COUNTS)
    if common:
        counts.append(COMMON_COUNTS)
    return counts


def count_correct(
    workspace: Workspace,
    clients: Sequence[int],
    shared: Sequence[Tensors],
    private: Sequence[Tensors],
    *,
    common: bool,
) -> list[Row]:
    """Test the models of some clients.

    Clients that have the same model, without private tensors, are tested together: the model is
    encoded once, and scored once on the server's images. Several such models in one block, as with
    clusters of clients, are encoded one after the other and not in one product, which can change
    the last bits of their logits (1e-6 of them).

    Args:
        workspace: this process's data, CLIP and method.
        clients: client ids.
        shared: per client, the tensors that it has received.
        private: per client, its private tensors.
        common: whether to test on the server's test images as well.

    Returns:
        Per client, the counts of `reported_counts`, and `NOT_FINITE` if its model has diverged.
    """
    rows: list[Row] = [{} for _ in clients]
    for places in _same_models(workspace, shared, private):
        _test(
            workspace,
            [clients[k] for k in places],
            [shared[k] for k in places],
            [private[k] for k in places],
            [rows[k] for k in places],
            common=common,
        )
    return rows


def _same_models(
    workspace: Workspace, shared: Sequence[Tensors], private: Sequence[Tensors]
) -> list[list[int]]:
    """Group clients by their models, as positions in the block.

    Models that differ from client to client are one group: they are encoded faster together.
    """
    if any(private) or workspace.extras_shapes:
        return [list(range(len(shared)))]
    groups: dict[str, list[int]] = {}
    for k, tensors in enumerate(shared):
        groups.setdefault(checksum(tensors), []).append(k)
    return list(groups.values())


def _test(
    workspace: Workspace,
    clients: Sequence[int],
    shared: Sequence[Tensors],
    private: Sequence[Tensors],
    rows: Sequence[Row],
    *,
    common: bool,
) -> None:
    """Add the counts of one group of `_same_models` to the clients' rows."""
    method = workspace.method
    memo = None if any(private) else workspace.memo
    encoded = encode_personal(method, shared, private, memo)
    # Images of each client, by the names of their counts in the reply.
    images = {TEST_COUNTS: [workspace.test_data(c) for c in clients]}
    if workspace.validates_locally:
        images[VALIDATION_COUNTS] = [workspace.validation_data(c) for c in clients]
    measured = {n: score_each(method, encoded, own) for n, own in images.items()}
    if common:
        test = workspace.server_test()
        measured[COMMON_COUNTS] = score_models(method, encoded, len(clients), *test, memo)
    for k, row in enumerate(rows):
        for (tested, correct), of_clients in measured.items():
            row |= {tested: of_clients[k].tested, correct: of_clients[k].credit}
        # Reported by models that have diverged only, so the server knows why nothing is correct.
        if unanswered := sum(of_clients[k].unanswered for of_clients in measured.values()):
            row[NOT_FINITE] = unanswered
