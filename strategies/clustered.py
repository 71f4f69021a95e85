"""Clustered: after some common rounds, groups of similar clients train prompts of their own.

Source: Federated learning with hierarchical clustering of local updates to improve training on
non-IID data (Briggs, Fan and Andras, IJCNN 2020, arXiv 2004.11791), FL+HC: FedAvg for some rounds,
then one agglomerative clustering of the clients' changes, then FedAvg within each cluster.

How we differ: distances are between changes scaled to norm 1 (average linkage), and the number of
clusters is given instead of a distance threshold. A client that first replies later joins the
cluster whose mean direction is nearest to its change. Until then it is sent the mean of the
clusters, weighted by their numbers of clients, which is also the global model that is evaluated and
saved. The prompts of the clusters are in the checkpoint. A client that is alone in its cluster
shares with nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage

from fedprompt.config.fields import option
from fedprompt.federation.screening import Update
from fedprompt.federation.strategy import SharedPromptStrategy, StrategyConfig
from fedprompt.messages import Arrays

from .fedavg import weighted_mean
from .parts.vectors import Rows, changes, units

MEMBERS, CENTRES, CLUSTER = "members", "centres", "cluster."
"""Names in the state: (client, cluster) pairs, mean directions (G, P), each cluster's tensors."""


@dataclass(frozen=True)
class ClusteredConfig(StrategyConfig):
    """One cluster is FedAvg."""

    name: str = option("clustered", "strategy name")
    clusters: int = option(2, "number of clusters", ge=1)
    common_rounds: int = option(5, "rounds of FedAvg before clients are clustered", ge=0)


class Clustered(SharedPromptStrategy):
    """FedAvg within clusters of clients; every client is sent its own cluster's prompts."""

    name = "clustered"
    Config = ClusteredConfig
    config: ClusteredConfig
    remembers_clients = True

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        self.cluster_of: dict[int, int] = {}
        self.tensors: list[Arrays] = []
        self.centres_GP: Rows = np.zeros((0, 0))

    def client_shared(self, client: int) -> Arrays | None:
        """The prompts of the client's cluster, if it has one already."""
        cluster = self.cluster_of.get(client)
        return None if cluster is None else self.tensors[cluster]

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """FedAvg in every cluster; returns the mean of the clusters."""
        # After the common rounds, FL+HC clusters once; later calls only assign new clients.
        if server_round > self.config.common_rounds:
            self._assign(shared, updates)
        if not self.tensors:
            return _fedavg(shared, updates)
        for cluster, last in enumerate(self.tensors):
            members = [u for u in updates if self.cluster_of[u.client] == cluster]
            if members:
                self.tensors[cluster] = _fedavg(last, members)
        # The mean of the clusters is FedAvg of one pseudo-client per cluster.
        pairs = zip(self.tensors, self._sizes(), strict=True)
        return _fedavg(shared, [Update(g, tensors, n) for g, (tensors, n) in enumerate(pairs)])

    def metrics(self) -> dict[str, Any]:
        """How many clients each cluster has."""
        return {"clusters": self._sizes()} if self.tensors else {}

    def state(self) -> Arrays:
        """Each client's cluster, and each cluster's mean direction and prompts."""
        if not self.tensors:
            return {}
        pairs = np.array(sorted(self.cluster_of.items()), dtype=np.int64)
        tensors = {f"{CLUSTER}{g}.{n}": a for g, t in enumerate(self.tensors) for n, a in t.items()}
        return {MEMBERS: pairs, CENTRES: self.centres_GP, **tensors}

    def load_state(self, state: Arrays) -> None:
        """Restore what `state` has returned."""
        if not state:
            return
        self.cluster_of = {int(client): int(cluster) for client, cluster in state[MEMBERS]}
        self.centres_GP = state[CENTRES]
        prefixes = [f"{CLUSTER}{g}." for g in range(len(self.centres_GP))]
        self.tensors = [
            {n.removeprefix(prefix): state[n] for n in state if n.startswith(prefix)}
            for prefix in prefixes
        ]

    def _sizes(self) -> list[int]:
        """Number of clients in every cluster."""
        members = list(self.cluster_of.values())
        return [members.count(g) for g in range(len(self.tensors))]

    def _assign(self, shared: Arrays, updates: Sequence[Update]) -> None:
        """Cluster the clients; later, assign those that are new to the nearest cluster."""
        new = [u for u in updates if u.client not in self.cluster_of]
        if not new:
            return
        units_UP = units(changes(shared, new))
        if not self.tensors:
            labels_U = groups(units_UP, self.config.clusters)
            # Every cluster starts from the prompts that all clients have trained together.
            self.tensors = [dict(shared) for _ in range(labels_U.max() + 1)]
            means = [units_UP[labels_U == g].mean(axis=0) for g in range(len(self.tensors))]
            self.centres_GP = np.stack(means)
        else:
            labels_U = np.argmax(units_UP @ self.centres_GP.T, axis=1)
        self.cluster_of |= {u.client: int(g) for u, g in zip(new, labels_U, strict=True)}


def groups(units_UP: Rows, clusters: int) -> NDArray[np.int64]:
    """Group rows by their directions.

    Args:
        units_UP: rows of norm 1.
        clusters: largest number of groups.

    Returns:
        Each row's group, (U,), numbered by first appearance.
    """
    clients = len(units_UP)
    if clients < 2:
        return np.zeros(clients, dtype=np.int64)
    # Rounding can move a cosine slightly beyond 1, but a distance must not be negative.
    distance_UU = np.clip(1 - units_UP @ units_UP.T, 0, 2)
    tree = linkage(distance_UU[np.triu_indices(clients, 1)], method="average")
    # The numbers that SciPy gives depend on its version, those by first appearance do not.
    labels_U = fcluster(tree, clusters, criterion="maxclust")
    _, first, inverse_U = np.unique(labels_U, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first))[inverse_U], dtype=np.int64)


def _fedavg(shared: Arrays, updates: Sequence[Update]) -> Arrays:
    """The sample-weighted mean of the updates' tensors."""
    return weighted_mean(shared, updates, [u.num_examples for u in updates])
