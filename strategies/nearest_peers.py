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
rows are empty. The server keeps one upload per client, and passes over all of them once per
exchange: a matrix product in float32 says which clients can be among the nearest of each, and these
few are measured as the paper does. A checkpoint writes the uploads that are new.

How we differ: the public code sends random peers to a client that has no prompt yet, which does not
use them.

Suffixes: U uploads, A clients that are sent messages, P numbers of an upload.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
CLIENTS_AT_ONCE, ROWS_AT_ONCE = 1000, 1000
"""Clients whose peers are searched together, and uploads that are centred together."""


@dataclass(frozen=True)
class NearestPeersConfig(FedAvgConfig):
    """The options of FedAvg; the method determines how many peers are sent."""

    name: str = option("nearest_peers", "strategy name")


class NearestPeers(FedAvg):
    """FedAvg that stores every client's last upload and sends each client its nearest ones."""

    name = "nearest_peers"
    Config = NearestPeersConfig
    remembers_clients = True

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        self.names = [n.removeprefix(PEERS) for n in sorted(self.extras) if n != KNOWN]
        self.names = [n for n in self.names if n in self.shapes]
        self.num_peers = len(self.extras[KNOWN]) if KNOWN in self.extras else 0
        self._forget()

    def _forget(self) -> None:
        # Row r of the first U is the last upload of client `_client_U[r]`; there is room for more.
        width = sum(math.prod(self.shapes[n]) for n in self.names)
        self._rows: NDArray[np.float32] = np.zeros((0, width), np.float32)
        self._client_U: NDArray[np.int64] = np.zeros(0, np.int64)
        self._row_of: dict[int, int] = {}
        self._changed: set[int] = set()
        self._nearest: dict[int, list[int]] = {}

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """FedAvg; also stores the updates as the clients' last uploads."""
        self._store({u.client: u.arrays for u in updates})
        return super().aggregate(server_round, shared, updates)

    def before_exchange(self, clients: Sequence[int]) -> None:
        """Find the peers of all clients that are about to be sent messages."""
        self._nearest = {}
        known = [c for c in clients if c in self._row_of] if self.num_peers else []
        for first in range(0, len(known), CLIENTS_AT_ONCE):
            self._nearest |= self._find(known[first : first + CLIENTS_AT_ONCE])

    def client_extras(self, server_round: int, client: int) -> Arrays:
        """The nearest other clients' last uploads, nearest first."""
        peers = self.nearest(client)
        if not peers:
            return self.extras
        sent = {n: np.zeros_like(t) for n, t in self.extras.items()}
        sent[KNOWN][: len(peers)] = 1
        for row, peer in enumerate(peers):
            for name, array in self._upload(peer).items():
                sent[PEERS + name][row] = array
        return sent

    def nearest(self, client: int) -> list[int]:
        """Ids of the clients whose uploads `client` is sent, nearest first."""
        if client not in self._row_of or not self.num_peers:
            return []
        if client not in self._nearest:
            self._nearest |= self._find([client])
        return self._nearest[client]

    def _find(self, clients: Sequence[int]) -> dict[int, list[int]]:
        """The nearest others of each of A clients that have uploaded.

        |a - b|^2 = |a|^2 + |b|^2 - 2 a.b is one product for all of them. Its rounding errors are
        bounded, and everyone who may be among the nearest in spite of them is measured again, so
        the result is that of the differences, bit for bit.
        """
        rows = self._rows[: len(self._client_U)]
        place_A = np.array([self._row_of[c] for c in clients])
        # Prompts lie close together and far from zero, where the product would cancel.
        centre = rows.mean(axis=0)
        own_AP = rows[place_A] - centre
        product_AU = np.empty((len(clients), len(rows)), np.float32)
        square_U = np.empty(len(rows), np.float32)
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(first, first + ROWS_AT_ONCE)
            some_UP = rows[part] - centre
            product_AU[:, part] = own_AP @ some_UP.T
            square_U[part] = np.einsum("up,up->u", some_UP, some_UP)
        # The dot products of P numbers, all sums of squares and the subtraction of the centre err
        # by less than this share of |a|^2 + |b|^2, in units of half the spacing at 1.
        share = (rows.shape[1] + 200) * np.finfo(np.float32).eps / 2
        count = min(self.num_peers, len(rows) - 1)
        found = {}
        for a, (client, place) in enumerate(zip(clients, place_A.tolist(), strict=True)):
            scale_U = square_U + square_U[place]
            about_U, error_U = scale_U - 2 * product_AU[a], share * scale_U
            about_U[place] = np.inf
            within = np.partition(about_U + error_U, count - 1)[count - 1] if count else -np.inf
            near = np.flatnonzero(about_U - error_U <= within)
            # By client id, so that the stable sort settles equal distances by it.
            near = near[np.argsort(self._client_U[near])]
            # L2 distances between the prompts before aggregation, as in the paper.
            distance = np.linalg.norm(rows[near] - rows[place], axis=1)
            order = near[np.argsort(distance, kind="stable")][: self.num_peers]
            found[client] = self._client_U[order].tolist()
        return found

    def state(self) -> Arrays:
        """The last upload of every client, by tensor."""
        clients = sorted(self._row_of)
        uploads = [self._upload(c) for c in clients]
        rows = {PEERS + n: np.stack([u[n] for u in uploads]) for n in self.names if clients}
        return {CLIENTS: np.array(clients, np.int64), **rows} if clients else {}

    def load_state(self, state: Arrays) -> None:
        """Restore what `state` has returned."""
        self._forget()
        self._store(
            {
                int(client): {n: state[PEERS + n][row] for n in self.names}
                for row, client in enumerate(state.get(CLIENTS, ()))
            }
        )

    def common_state(self) -> Arrays:
        """Nothing: all of the state belongs to single clients."""
        return {}

    def changed_client_states(self) -> Iterator[tuple[int, Arrays]]:
        """The uploads since the last call."""
        changed, self._changed = sorted(self._changed), set()
        # Copied, because an upload is replaced in place.
        yield from ((c, {n: a.copy() for n, a in self._upload(c).items()}) for c in changed)

    def load_client_state(self, client: int, arrays: Arrays) -> None:
        """Restore an upload."""
        self._store({client: arrays})
        self._changed.discard(client)

    def _store(self, uploads: Mapping[int, Arrays]) -> None:
        """Replace the last uploads of some clients."""
        self._nearest = {}
        if not self.names:
            return
        new = [c for c in uploads if c not in self._row_of]
        self._row_of |= {c: len(self._row_of) + i for i, c in enumerate(new)}
        self._client_U = np.concatenate([self._client_U, np.array(new, np.int64)])
        if len(self._row_of) > len(self._rows):
            # Twice the room, so that every upload is moved once on average.
            room = max(len(self._row_of), 2 * len(self._rows)) - len(self._rows)
            self._rows = np.pad(self._rows, ((0, room), (0, 0)))
        for client, arrays in uploads.items():
            row = self._rows[self._row_of[client]]
            np.concatenate([arrays[n].ravel() for n in self.names], out=row, casting="same_kind")
        self._changed.update(uploads)

    def _upload(self, client: int) -> Arrays:
        """A client's last upload, as views by name."""
        return self._by_name(self._rows[self._row_of[client]])

    def _by_name(self, rows: NDArray[np.float32]) -> Arrays:
        """Rows (..., P) as views (..., *shape) by name."""
        arrays, first = {}, 0
        for name in self.names:
            size = math.prod(self.shapes[name])
            part = rows[..., first : first + size]
            arrays[name] = part.reshape(*rows.shape[:-1], *self.shapes[name])
            first += size
        return arrays
