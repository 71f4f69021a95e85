"""FedAvg, and each client is sent the last uploads of those clients that are nearest to it.

Source: the server of pFedMoAP (Mixture of Experts Made Personalized: Federated Prompt Learning for
Vision-Language Models, Luo, Chen, Wu, ICLR 2025, arXiv 2410.10114): K - 1 nearest in L2 distance
between prompts before aggregation.

A method says what it wants by what it receives: `peers.<name>` (E, ...) for the shared tensor
`<name>`, and `peers.known` (E,), 1 where a row is a peer. A client that has not replied yet has no
distance to anybody and is sent no peers; where fewer than E others have replied, all of them are
sent. Rows left over are zero and not known. Equal distances are settled by client id.

PRIVACY: what a client uploads is shown to other clients as it is, before any averaging, under no
name but with the knowledge that it is near to them. Secure aggregation is impossible with this
rule. Traffic to a client grows by E times the tensors asked for, also where rows are empty. The
server keeps one upload per client, and every message costs it a pass over all of them.

How we differ: the public code sends a client that has no prompt yet random peers, which it does not
use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.fields import option
from fedprompt.federation.screening import Update
from fedprompt.messages import Arrays

from .fedavg import FedAvg, FedAvgConfig

PEERS = "peers."
"""How the names of what is received begin."""
KNOWN = "peers.known"
CLIENTS = "peers.clients"
"""In the state: ids of the clients whose uploads are kept, ascending."""


@dataclass(frozen=True)
class NearestPeersConfig(FedAvgConfig):
    """FedAvg's; how many peers are sent is the method's to say."""

    name: str = option("nearest_peers", "strategy name")


class NearestPeers(FedAvg):
    """FedAvg that keeps every client's last upload and sends each client its nearest ones."""

    name = "nearest_peers"
    Config = NearestPeersConfig

    def __init__(self, config: Any, **others: Any) -> None:
        super().__init__(config, **others)
        self.wanted = [n.removeprefix(PEERS) for n in sorted(self.extras) if n != KNOWN]
        self.wanted = [n for n in self.wanted if n in self.shapes]
        self.places = len(self.extras[KNOWN]) if KNOWN in self.extras else 0
        self._keep({})

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """FedAvg; the updates are kept beside."""
        new = {u.client: {n: u.arrays[n].copy() for n in self.wanted} for u in updates}
        self._keep(self.uploads | new)
        return super().aggregate(server_round, shared, updates)

    def client_extras(self, server_round: int, client: int) -> Arrays:
        """The nearest other clients' last uploads, nearest first."""
        others = self.nearest(client)
        if not others:
            return self.extras
        sent = {n: np.zeros_like(t) for n, t in self.extras.items()}
        sent[KNOWN][: len(others)] = 1
        for row, other in enumerate(others):
            for name in self.wanted:
                sent[PEERS + name][row] = self.uploads[other][name]
        return sent

    def nearest(self, client: int) -> list[int]:
        """Ids of the clients that `client` is sent, nearest first."""
        if client not in self.uploads or not self.places:
            return []
        own = int(np.searchsorted(self._clients_kept, client))
        distance = np.linalg.norm(self._flat - self._flat[own], axis=1)
        order = [i for i in np.argsort(distance, kind="stable") if i != own]
        return [int(self._clients_kept[i]) for i in order[: self.places]]

    def state(self) -> Arrays:
        """The uploads kept."""
        if not self.uploads:
            return {}
        rows = {
            PEERS + n: np.stack([self.uploads[int(c)][n] for c in self._clients_kept])
            for n in self.wanted
        }
        return {CLIENTS: self._clients_kept, **rows}

    def load_state(self, state: Arrays) -> None:
        """Take back what `state` gave."""
        clients = [int(c) for c in state.get(CLIENTS, ())]
        self._keep(
            {c: {n: state[PEERS + n][row] for n in self.wanted} for row, c in enumerate(clients)}
        )

    def _keep(self, uploads: Mapping[int, Arrays]) -> None:
        """Replace the uploads, and their flat form for distances."""
        self.uploads = dict(sorted(uploads.items()))
        self._clients_kept = np.array(list(self.uploads), dtype=np.int64)
        rows = [
            np.concatenate([kept[n].ravel() for n in self.wanted]) if self.wanted else np.zeros(0)
            for kept in self.uploads.values()
        ]
        self._flat: NDArray[Any] = np.stack(rows) if rows else np.zeros((0, 0))
