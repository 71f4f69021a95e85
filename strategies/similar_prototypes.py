"""FedAvg, and each client is sent the most similar prototypes of other clients, class by class.

Source: the server of Latte (Collaborative Test-Time Adaptation of Vision-Language Models in
Federated Learning, Bao et al., ICCV 2025, arXiv 2507.21494): for each class, the E prototypes with
the largest product with the client's own.

A method declares in its extras `peers.prototypes` (E, C, D) for its shared `prototypes` (C, D), and
`peers.<name>` (E, C, ...) for further shared tensors that have a row per class. Row e of class c is
that of the e-th most similar client for that class, so the rows of one e come from several clients.
A client that has not replied yet is sent none; the rows of fewer than E others are followed by the
method's own starting values. Equal similarities, to nine decimal places, are ordered by client id;
they are equal for a class of which the client has no prototype.

PRIVACY: other clients see prototypes as they were uploaded, before any averaging. They do not learn
whose they are. Secure aggregation is impossible with this strategy.

Suffixes: U uploads, A clients that are sent messages, C classes, D features, E peers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.fields import option
from fedprompt.messages import Arrays

from .nearest_peers import KNOWN, PEERS, NearestPeers, NearestPeersConfig

BY = "prototypes"
"""The shared tensor (C, D) whose rows are compared."""


@dataclass(frozen=True)
class SimilarPrototypesConfig(NearestPeersConfig):
    """The options of FedAvg; the method determines how many peers are sent."""

    name: str = option("similar_prototypes", "strategy name")


class SimilarPrototypes(NearestPeers):
    """Stores every client's last upload, and sends each client the rows most similar to its own."""

    name = "similar_prototypes"
    Config = SimilarPrototypesConfig

    def _forget(self) -> None:
        super()._forget()
        self._similar: dict[int, NDArray[np.int64]] = {}

    def before_exchange(self, clients: Sequence[int]) -> None:
        """Find the peers of all clients that are about to be sent messages."""
        self._similar = {}
        self._find_rows([c for c in clients if c in self._row_of])

    def client_extras(self, server_round: int, client: int) -> Arrays:
        """The most similar rows of each class, most similar first."""
        if client not in self._row_of or BY not in self.names:
            return self.extras
        if client not in self._similar:
            self._find_rows([client])
        rows_CE = self._similar[client]
        found = rows_CE.shape[1]
        sent = {n: a.copy() for n, a in self.extras.items()}
        sent[KNOWN][:found] = 1
        stored = self._by_name(self._rows)
        classes_C1 = np.arange(len(rows_CE))[:, None]
        for name in self.names:
            chosen_CE = stored[name][rows_CE, classes_C1]
            sent[PEERS + name][:found] = np.moveaxis(chosen_CE, 1, 0)
        return sent

    def _find_rows(self, clients: Sequence[int]) -> None:
        """Remember the rows (C, E) of the peers of each of A clients."""
        if not clients or BY not in self.names:
            return
        uploads_UCD = self._by_name(self._rows[: len(self._client_U)])[BY]
        place_A = np.array([self._row_of[c] for c in clients])
        count = min(self.num_peers, len(uploads_UCD) - 1)
        by_id_U = np.argsort(self._client_U)
        rows_ACE = np.empty((len(clients), uploads_UCD.shape[1], count), np.int64)
        for c in range(uploads_UCD.shape[1]):
            of_class_UD = uploads_UCD[:, c].astype(np.float64)
            similar_AU = np.round(of_class_UD[place_A] @ of_class_UD.T, 9)
            similar_AU[np.arange(len(place_A)), place_A] = -np.inf
            # Sorted by client id first, so that the stable sort settles equal similarities by it.
            order_AU = np.argsort(-similar_AU[:, by_id_U], axis=1, kind="stable")
            rows_ACE[:, c] = by_id_U[order_AU[:, :count]]
        self._similar |= dict(zip(clients, rows_ACE, strict=True))

    def _store(self, uploads: Any) -> None:
        self._similar = {}
        super()._store(uploads)
