"""A federation whose clients' backbones differ: in the format of the weights or the image tower."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from fedprompt.federation.server_app import Federation
from fedprompt.scoring import score_global


def clients_by_backbone(federation: Federation) -> dict[str, list[int]]:
    """The clients of every kind of backbone, such as `int8`.

    Returns:
        Ids of clients by kind. Empty if all clients have the server's backbone in its format.
    """
    found: dict[str, list[int]] = {}
    for client in sorted(federation.strategy.clients):
        found.setdefault(federation.backbone_kind(client), []).append(client)
    return {} if set(found) <= {federation.config.backbone.weights} else found


def backbones_note(federation: Federation) -> str:
    """One line about backbones that differ; empty if none does."""
    found = clients_by_backbone(federation)
    if not found:
        return ""
    who = "; ".join(f"{kind} (clients {', '.join(map(str, ids))})" for kind, ids in found.items())
    own = federation.config.backbone
    return f"the clients' backbones differ: {who}; server: {own.model} in {own.weights}"


def accuracy_by_backbone(
    federation: Federation, line: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Accuracy after the last round, by kind of backbone.

    Args:
        federation: the server's side, with the final shared tensors.
        line: the last round's line of `metrics.jsonl`.

    Returns:
        By kind: its `clients`, the mean accuracy of their `personal` models on their own images,
        through their own backbones, and the `global` model's accuracy on the server's test images
        through such a backbone; None where there is none. Empty if no backbone differs.

    Raises:
        UserError: the server cannot open the backbone in one of the formats.
    """
    personal = line.get("personal") or {"clients": [], "accuracy": []}
    accuracy = dict(zip(personal["clients"], personal["accuracy"], strict=True))
    tests_global = "global" in federation.config.protocols
    parts = {}
    for kind, clients in clients_by_backbone(federation).items():
        tested = [accuracy[client] for client in clients if client in accuracy]
        like = federation.workspace_like(clients[0]) if tests_global else None
        score = None
        if like is not None and len(like.server_test()[1]):
            score = score_global(like.method, federation.shared, *like.server_test())
        parts[kind] = {
            "clients": clients,
            "personal": fmean(tested) if tested else None,
            "global": None if score is None else score.accuracy,
        }
    return parts
