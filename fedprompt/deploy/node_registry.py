"""Keeps track of which node is which client: who has joined, left, or cannot take part.

Runs in the server app. Flower knows nodes by random ids; which client a node is, it reports itself.
If the server's administrator has registered the nodes' keys, each id can be one client only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedprompt.config.schema import WeightFormat
from fedprompt.data.partition import sparse
from fedprompt.deploy.backbone_check import has_other_image_tower, has_other_weights
from fedprompt.deploy.node_grid import pull_replies
from fedprompt.deploy.node_report import NodeReport, read_report
from fedprompt.errors import UserError
from fedprompt.messages import read_answers

log = logging.getLogger("fedprompt.server")
RETRY_S = 60.0
"""Seconds until a node that could not take part is asked again, in case its fault is repaired."""


class NodeRegistry:
    """The nodes of one run.

    Args:
        grid: how to reach the nodes.
        clients: number of clients K.
        class_names: the experiment's classes.
        registered: the client of every node id whose key is registered; empty if none is, and then
            any node may be any client.
        sample_2D: features (2, D) of the sample by the server's backbone.
        weights: the format in which the server keeps the backbone's weights.
        sample_in: computes `sample_2D` with the weights in another format; None if nodes have to
            keep them as the server does.
        other_image_towers: whether nodes may have another image tower beside the same text tower.
    """

    def __init__(
        self,
        grid: Grid,
        clients: int,
        class_names: Sequence[str],
        registered: Mapping[int, int],
        sample_2D: NDArray[np.float32],
        weights: WeightFormat = "float32",
        sample_in: Callable[[WeightFormat], NDArray[np.float32]] | None = None,
        *,
        other_image_towers: bool = False,
    ) -> None:
        self.grid = grid
        self.clients = clients
        self.class_names = tuple(class_names)
        self.registered = dict(registered)
        self.samples = {weights: sample_2D}
        self.weights, self.sample_in = weights, sample_in
        self.other_image_towers = other_image_towers
        self.node_of_client: dict[int, int] = {}
        self.reports: dict[int, NodeReport] = {}
        self.faults: dict[int, str] = {}
        self._asked: set[int] = set()
        self._pending: dict[str, Message] = {}
        self._refused_at: dict[int, float] = {}

    @property
    def missing(self) -> list[int]:
        """Clients without a node."""
        return sorted(set(range(self.clients)) - set(self.node_of_client))

    def able_to_train(self, without_labels: bool) -> list[int]:
        """Clients that have a node and can train, ascending.

        Args:
            without_labels: whether the method learns from training images without labels.
        """
        reports = {c: self.reports[c] for c in self.node_of_client}
        return sorted(
            c for c, r in reports.items() if r.num_train and (r.labelled or without_labels)
        )

    def update(self) -> bool:
        """Update to the nodes that are connected now; returns whether clients have joined or left.

        New nodes are asked which client they are, and nodes with a fault are asked again after
        `RETRY_S`. The method waits for no answer. An answer counts whenever it arrives, so a node
        that has to encode its images first joins when it is ready.
        """
        before = dict(self.node_of_client)
        # Departures come first: a client that returns under another node id can then join.
        connected = set(self.grid.get_node_ids())
        self._forget_disconnected(connected)
        now = _now()
        self._asked -= {n for n, since in self._refused_at.items() if now - since > RETRY_S}
        self._ask(sorted(connected - self._asked))
        arrived = pull_replies(self.grid, self._pending)
        queries = [self._pending.pop(message_id) for message_id in arrived]
        answers = read_answers(queries, arrived.values(), self._read_report)
        # Sorted by node, so that of two nodes that claim one client the same one wins every time.
        reports: dict[int, NodeReport | str] = {**answers.usable, **answers.faults}
        for node, report in sorted(reports.items()):
            self._admit(node, report)
        return self.node_of_client != before

    def partition_rows(self, recorded: Mapping[str, Any] | None) -> dict[str, list[list[int]]]:
        """The rows of `partition.json`; those of clients that never had a node are as `recorded`.

        Args:
            recorded: the content of `partition.json` so far; None if there is none.

        Returns:
            Training and test images per class and images per domain of every client, as lists of
            alternating index and count.
        """
        rows: dict[str, list[list[int]]] = {}
        for name in ("train_counts", "test_counts", "domain_counts"):
            old = (recorded or {}).get(name) or [[] for _ in range(self.clients)]
            rows[name] = [list(row) for row in old]
        for client, report in self.reports.items():
            rows["train_counts"][client] = _sparse(report.train_C)
            rows["test_counts"][client] = _sparse(report.test_C)
            # Every node's folder counts as a separate domain.
            rows["domain_counts"][client] = [client, report.num_train + report.num_test]
        return rows

    def _forget_disconnected(self, connected: set[int]) -> None:
        """Forget nodes that are no longer connected; they are asked again when they return."""
        gone = {c: n for c, n in self.node_of_client.items() if n not in connected}
        for client, node in sorted(gone.items()):
            log.warning("client %d has left (node %d)", client, node)
            del self.node_of_client[client]
        self.faults = {n: fault for n, fault in self.faults.items() if n in connected}
        self._refused_at = {n: since for n, since in self._refused_at.items() if n in connected}
        self._pending = {
            i: m for i, m in self._pending.items() if m.metadata.dst_node_id in connected
        }
        self._asked &= connected

    def _ask(self, nodes: Sequence[int]) -> None:
        """Ask nodes which client they are."""
        if not nodes:
            return
        queries = [
            Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY)
            for node in nodes
        ]
        self._asked |= set(nodes)
        for node in nodes:
            self._refused_at.pop(node, None)
        ids = self.grid.push_messages(queries)
        # Flower gives no id to a message that it could not send.
        self._pending |= {i: query for i, query in zip(ids, queries, strict=True) if i}

    def _read_report(self, node: int, content: RecordDict) -> NodeReport:
        return read_report(content, len(self.class_names), self.clients)

    def _admit(self, node: int, report: NodeReport | str) -> None:
        """Let a node take part, or refuse it and say why."""
        if isinstance(report, str):
            self._refuse(node, report)
            return
        client, registered = report.client, self.registered.get(node)
        # Without registered keys, for example on Flower's simulation engine, a node's claim is
        # believed.
        if self.registered and registered != client:
            whose = "is no client's" if registered is None else f"is client {registered}'s"
            self._refuse(node, f"it claims to be client {client}, but its key {whose}")
        elif client in self.node_of_client:
            self._refuse(node, f"it claims to be client {client}, but another node is that client")
        elif fault := self._fault_of_backbone(report):
            self._refuse(node, fault)
        else:
            self.node_of_client[client] = node
            self.faults.pop(node, None)
            self.reports[client] = report
            log.info(
                "client %d has joined (node %d): %d training and %d test images",
                client, node, report.num_train, report.num_test,
            )  # fmt: skip
            if self.has_other_image_tower(report):
                log.warning(
                    "client %d has another image tower than the server, beside the same text "
                    "tower; the method allows it, since it shares prompts of the text tower only",
                    client,
                )
            if report.weights != self.weights:
                log.warning(
                    "client %d keeps the backbone's weights in %s and the server in %s: the same "
                    "model, as features of the sample in %s show",
                    client, report.weights, self.weights, report.weights,
                )  # fmt: skip
            for warning in report.warnings(self.class_names):
                log.warning("client %d: %s", client, warning)

    def has_other_image_tower(self, report: NodeReport) -> bool:
        """Whether a node has another image tower than the server, beside the same text tower."""
        return has_other_image_tower(report.sample, self.samples[report.weights])

    def _fault_of_backbone(self, report: NodeReport) -> str:
        """Why a node's backbone is not the server's; empty if it is, in whatever format.

        The server opens the model in the node's format and compares features of that, because few
        bits change features more than the check of one format allows.
        """
        if report.weights not in self.samples:
            if self.sample_in is None:
                return f"it keeps its backbone's weights in {report.weights}, not {self.weights}"
            try:
                self.samples[report.weights] = self.sample_in(report.weights)
            except UserError as error:
                return (
                    f"it keeps its backbone's weights in {report.weights}, which the server cannot "
                    f"check ({error})"
                )
        if not has_other_weights(report.sample, self.samples[report.weights]):
            return ""
        if self.has_other_image_tower(report):
            if self.other_image_towers:
                return ""
            return (
                "its backbone has another image tower than the server's, which the experiment's "
                "method does not allow; give both the same weights (--checkpoint on the node, "
                "backbone.checkpoint in the experiment)"
            )
        return (
            "its backbone has other weights than the server's; give both the same weights "
            "(--checkpoint on the node, backbone.checkpoint in the experiment)"
        )

    def _refuse(self, node: int, fault: str) -> None:
        self._refused_at[node] = _now()
        if self.faults.get(node) == fault:
            return  # already logged when the node was asked before
        self.faults[node] = fault
        client = self.registered.get(node)
        who = f"node {node}" if client is None else f"client {client} (node {node})"
        log.warning("%s does not take part: %s", who, fault)


def _now() -> float:
    return time.monotonic()


def _sparse(counts_C: Sequence[int]) -> list[int]:
    return sparse(np.array([counts_C], dtype=np.int64))[0]
