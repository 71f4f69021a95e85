"""FedAvg, and each client is sent the last uploads of the clients that are nearest to it.

Source: the server of pFedMoAP (Mixture of Experts Made Personalized: Federated Prompt Learning for
Vision-Language Models, Luo, Chen, Wu, ICLR 2025, arXiv 2410.10114): K - 1 nearest in L2 distance
between prompts before aggregation.

A method declares in its extras what it needs: `peers.<name>` (E, ...) for the shared tensor
`<name>`, and `peers.known` (E,), which is 1 if a row is a peer. A client that has not replied yet
has no distance to anybody and is sent no peers; if fewer than E others have replied, all of them
are sent. Remaining rows are zero and not known. Equal distances are ordered by client id.

PRIVACY: a client's upload is sent to other clients unchanged, before any averaging. They do not
learn whose it is, but that it is near to their own. Secure aggregation is impossible with this
strategy. The traffic to a client grows by E times the tensors that the method asks for, even if
rows are empty. The server keeps one upload per client, and passes over all of them for every
message.

How we differ: the public code sends random peers to a client that has no prompt yet, which does not
use them.
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
"""Prefix of the names of peers' tensors."""
KNOWN = "peers.known"
CLIENTS = "peers.clients"
"""Name in the state: ids of the clients whose uploads are stored, ascending."""


@dataclass(frozen=True)
class NearestPeersConfig(FedAvgConfig):
    """The options of FedAvg; the method determines how many peers are sent."""

    name: str = option("nearest_peers", "strategy name")


class NearestPeers(FedAvg):
    """FedAvg that stores every client's last upload and sends each client its nearest ones."""

    name = "nearest_peers"
    Config = NearestPeersConfig

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        self.names = [n.removeprefix(PEERS) for n in sorted(self.extras) if n != KNOWN]
        self.names = [n for n in self.names if n in self.shapes]
        self.num_peers = len(self.extras[KNOWN]) if KNOWN in self.extras else 0
        self._keep({})

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """FedAvg; also stores the updates as the clients' last uploads."""
        # Copied, because uploads outlive the round that they belong to.
        new = {u.client: {n: u.arrays[n].copy() for n in self.names} for u in updates}
        self._keep(self.uploads | new)
        return super().aggregate(server_round, shared, updates)

    def client_extras(self, server_round: int, client: int) -> Arrays:
        """The nearest other clients' last uploads, nearest first."""
        peers = self.nearest(client)
        if not peers:
            return self.extras
        sent = {n: np.zeros_like(t) for n, t in self.extras.items()}
        sent[KNOWN][: len(peers)] = 1
        for row, peer in enumerate(peers):
            for name in self.names:
                sent[PEERS + name][row] = self.uploads[peer][name]
        return sent

    def nearest(self, client: int) -> list[int]:
        """Ids of the clients whose uploads `client` is sent, nearest first."""
        if client not in self.uploads or not self.num_peers:
            return []
        place = int(np.searchsorted(self._uploaders, client))
        # L2 distances between the prompts before aggregation, as in the paper.
        distance = np.linalg.norm(self._flat - self._flat[place], axis=1)
        # A stable sort, so that equal distances are ordered by client id.
        order = [i for i in np.argsort(distance, kind="stable") if i != place]
        return [int(self._uploaders[i]) for i in order[: self.num_peers]]

    def state(self) -> Arrays:
        """The last upload of every client, by tensor."""
        if not self.uploads:
            return {}
        rows = {
            PEERS + n: np.stack([self.uploads[int(c)][n] for c in self._uploaders])
            for n in self.names
        }
        return {CLIENTS: self._uploaders, **rows}

    def load_state(self, state: Arrays) -> None:
        """Restore what `state` has returned."""
        clients = [int(c) for c in state.get(CLIENTS, ())]
        self._keep(
            {c: {n: state[PEERS + n][row] for n in self.names} for row, c in enumerate(clients)}
        )

    def _keep(self, uploads: Mapping[int, Arrays]) -> None:
        """Replace the uploads, and their flat form from which distances are computed."""
        self.uploads = dict(sorted(uploads.items()))
        self._uploaders = np.array(list(self.uploads), dtype=np.int64)
        rows = [
            np.concatenate([upload[n].ravel() for n in self.names]) if self.names else np.zeros(0)
            for upload in self.uploads.values()
        ]
        self._flat: NDArray[Any] = np.stack(rows) if rows else np.zeros((0, 0))
