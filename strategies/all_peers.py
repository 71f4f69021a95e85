"""FedAvg, and each client is sent the last uploads of all clients, its own among them.

Source: the server of PLAN (Federated Domain Generalization via Prompt Learning and Aggregation,
Gong et al., IEEE TIFS 2025, arXiv 2411.10063), on which all clients exchange their prompts.

A method declares in its extras what is exchanged: `peers.<name>` (E, ...) for the shared tensor
`<name>`, and `peers.known` (E,), which is 1 if a row is an upload. Rows are ordered by client id;
the rest are zero and not known. In place of the average, a client is sent its own last upload of
these tensors, from which it trains on; a client that has not replied yet is sent the average. All
other tensors are averaged as usual. The rows belong to the global model, which is evaluated and
saved with them.

PRIVACY: every client sees every other client's upload as it was trained, before any averaging.
Secure aggregation is impossible with this strategy. The traffic to a client grows by E times the
tensors that are exchanged, even if rows are empty.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.messages import Arrays

from .nearest_peers import KNOWN, NearestPeers, NearestPeersConfig
from .parts.required import require_extra


@dataclass(frozen=True)
class AllPeersConfig(NearestPeersConfig):
    """The options of FedAvg; the method determines for how many clients there is room."""

    name: str = option("all_peers", "strategy name")


class AllPeers(NearestPeers):
    """FedAvg that shows every client's last upload to all clients.

    Raises:
        UserError: the method declares nothing to exchange.
    """

    name = "all_peers"
    Config = AllPeersConfig

    def __init__(
        self,
        config: Any,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        extras: Arrays | None = None,
        **rest: Any,
    ) -> None:
        needed = "in which clients exchange prompts, e.g. plan"
        require_extra(self.name, KNOWN, extras, shapes, method=needed)
        super().__init__(config, shapes=shapes, extras=extras, **rest)

    def set_nodes(
        self, node_of_client: Mapping[int, int], trainable: Collection[int] | None = None
    ) -> None:
        """Set the clients that can be reached; see `SharedPromptStrategy.set_nodes`.

        Raises:
            UserError: there are more clients than the method has room for.
        """
        super().set_nodes(node_of_client, trainable)
        count = len(self.known.trainable)
        if self.shapes and count > self.num_peers:
            raise UserError(
                f"strategy all_peers: {count} clients exchange prompts, and the method has room "
                f"for {self.num_peers}; set method.peers={count}."
            )

    def before_exchange(self, clients: Sequence[int]) -> None:
        """Nothing: all clients are sent the same rows."""

    def nearest(self, client: int) -> list[int]:
        """Ids of all clients that have uploaded, ascending, whoever asks."""
        del client
        return sorted(self._row_of)[: self.num_peers]

    def client_shared(self, client: int) -> Arrays | None:
        """The common tensors, with the client's own last upload of what is exchanged."""
        if client not in self._row_of or not self.shared:
            return None
        own = {name: np.array(array) for name, array in self._upload(client).items()}
        return {**self.shared, **own}

    def eval_extras(self) -> Arrays:
        """All rows."""
        return self.client_extras(0, 0) if self._row_of else {}
