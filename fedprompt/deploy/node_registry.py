"""Which node holds which client: who has joined, left, come late, or cannot take part.

Nodes are known to Flower by random ids; what client they are they say themselves. Where the
server's operator has registered the nodes' keys by client, `keyed` says which id may be which.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedprompt.data.partition import sparse
from fedprompt.deploy.backbone_check import differs
from fedprompt.deploy.node_report import Description, from_reply

log = logging.getLogger("fedprompt.server")
RETRY_S = 60.0
"""Before a node with a fault is asked again: its folder may have been mended."""


class Roster:
    """The nodes of one run.

    Args:
        grid: how to reach them.
        clients: number of clients K.
        class_names: the experiment's classes.
        keyed: client of every node id that the operator has registered; empty = not known.
        sample_2D: what the server's backbone makes of the sample.
    """

    def __init__(
        self,
        grid: Grid,
        clients: int,
        class_names: Sequence[str],
        keyed: Mapping[int, int],
        sample_2D: NDArray[np.float32],
    ) -> None:
        self.grid = grid
        self.clients = clients
        self.class_names = tuple(class_names)
        self.keyed = dict(keyed)
        self.sample_2D = sample_2D
        self.node_of_client: dict[int, int] = {}
        self.descriptions: dict[int, Description] = {}
        self.faults: dict[int, str] = {}
        self._asked: set[int] = set()
        self._pending: dict[str, int] = {}
        self._refused: dict[int, float] = {}

    @property
    def missing(self) -> list[int]:
        """Clients without a node."""
        return sorted(set(range(self.clients)) - set(self.node_of_client))

    @property
    def trainable(self) -> list[int]:
        """Clients that are there and have labelled training images."""
        return sorted(c for c in self.node_of_client if self.descriptions[c].trains)

    def update(self) -> bool:
        """Look who is there now; whether clients have joined or left since the last look.

        Nodes that are new are asked who they are, those with a fault again after a while. Nobody
        is waited for: an answer counts whenever it comes, so a node that first has to encode its
        images joins when it is ready.
        """
        before = dict(self.node_of_client)
        present = set(self.grid.get_node_ids())
        self._forget(present)
        self._asked -= {n for n, since in self._refused.items() if _now() - since > RETRY_S}
        new = sorted(present - self._asked)
        if new:
            queries = [
                Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY)
                for node in new
            ]
            self._asked |= set(new)
            for node in new:
                self._refused.pop(node, None)
            ids = self.grid.push_messages(queries)
            self._pending |= {i: node for i, node in zip(ids, new, strict=True) if i}
        if self._pending:
            replies = list(self.grid.pull_messages(list(self._pending)))
            found = {self._pending.pop(r.metadata.reply_to_message_id): r for r in replies}
            for node, reply in sorted(found.items()):
                self._enter(node, from_reply(reply, len(self.class_names), self.clients))
        return self.node_of_client != before

    def described(self, recorded: Mapping[str, Any] | None) -> dict[str, list[list[int]]]:
        """Rows of `partition.json`: of clients that have never been there, as `recorded`."""
        rows: dict[str, list[list[int]]] = {}
        for name in ("train_counts", "test_counts", "domain_counts"):
            old = (recorded or {}).get(name) or [[] for _ in range(self.clients)]
            rows[name] = [list(row) for row in old]
        for client, found in self.descriptions.items():
            rows["train_counts"][client] = _sparse(found.train_C)
            rows["test_counts"][client] = _sparse(found.test_C)
            rows["domain_counts"][client] = [client, sum(found.train_C) + sum(found.test_C)]
        return rows

    def _forget(self, present: set[int]) -> None:
        """Drop nodes that are no longer connected; they are asked again when they come back."""
        gone = {c: n for c, n in self.node_of_client.items() if n not in present}
        for client, node in sorted(gone.items()):
            log.warning("client %d has left (node %d)", client, node)
            del self.node_of_client[client]
        self.faults = {n: f for n, f in self.faults.items() if n in present}
        self._refused = {n: since for n, since in self._refused.items() if n in present}
        self._pending = {i: n for i, n in self._pending.items() if n in present}
        self._asked &= present

    def _enter(self, node: int, found: Description | str) -> None:
        if isinstance(found, str):
            self._refuse(node, found)
            return
        client, known = found.client, self.keyed.get(node)
        if self.keyed and known != client:
            whose = "no client's" if known is None else f"client {known}'s"
            self._refuse(node, f"it says that it is client {client}, but its key is {whose}")
        elif client in self.node_of_client:
            self._refuse(node, f"it says that it is client {client}, as another node does")
        elif differs(found.sample, self.sample_2D):
            self._refuse(
                node,
                "its backbone has other weights than the server's; give both the same "
                "(--checkpoint on the node, backbone.checkpoint in the experiment)",
            )
        else:
            self.node_of_client[client] = node
            self.faults.pop(node, None)
            self.descriptions[client] = found
            trained, tested = sum(found.train_C), sum(found.test_C)
            log.info(
                "client %d has joined (node %d): %d training and %d test images",
                client, node, trained, tested,
            )  # fmt: skip
            for note in found.notes(self.class_names):
                log.warning("client %d: %s", client, note)

    def _refuse(self, node: int, fault: str) -> None:
        self._refused[node] = _now()
        if self.faults.get(node) == fault:
            return  # said already
        self.faults[node] = fault
        client = self.keyed.get(node)
        who = f"node {node}" if client is None else f"client {client} (node {node})"
        log.warning("%s does not take part: %s", who, fault)


def _now() -> float:
    return time.monotonic()


def _sparse(counts_C: Sequence[int]) -> list[int]:
    return sparse(np.array([counts_C], dtype=np.int64))[0]
