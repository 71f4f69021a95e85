"""The training exchange of a round in which the server learns only the mean of the updates.

Runs on the server; `Federation` uses it instead of `PlainExchange` if
`secure_aggregation.enabled` is set.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message

from fedprompt.config.schema import Config
from fedprompt.errors import UserError
from fedprompt.messages import Arrays, Exchanged, Send, Traffic, Update
from fedprompt.privacy.secure_aggregation import ALIKE, require_flower
from fedprompt.privacy.secure_aggregation.server import Outcome, secure_sum
from fedprompt.privacy.secure_aggregation.vector import (
    DIVERGED,
    Implausible,
    check_sum,
    decode,
    size,
)
from fedprompt.runtime.faults import Faults

log = logging.getLogger("fedprompt.server")


class SecureExchange:
    """Sends five messages to every client, after which the sum of their updates is known.

    It has the interface of `fedprompt.federation.exchange.Exchange`, and returns the weighted mean
    of the updates as a single one.

    Args:
        send: sends messages and returns the replies; called five times in a round.
        config: the experiment.
        weights_by_examples: whether clients are weighted by their training images, or equally.
        images: number of training images of the clients, as far as the server knows it.
        clients: number of clients that train in a round in which all can be reached.

    Raises:
        UserError: the installed Flower lacks SecAgg+, or a client has more images than a masked
            weight can express.
    """

    def __init__(
        self,
        send: Send,
        config: Config,
        *,
        weights_by_examples: bool,
        images: Sequence[int],
        clients: int,
    ) -> None:
        require_flower()
        self._send = send
        self._config = config
        self._clients = clients
        self._weights_by_examples = weights_by_examples
        self._faults = Faults(log, "did not help to unmask")
        largest, limit = max(images, default=0), config.secure_aggregation.max_weight
        # Clients that add noise count equally, whatever the strategy asks for.
        if weights_by_examples and not config.privacy.noise and largest > limit:
            raise UserError(
                f"a client has {largest} training images, more than secure_aggregation.max_weight="
                f"{limit}; raise it."
            )

    def settings(self) -> ConfigRecord:
        """Tells the clients whether all of them have the same weight."""
        return ConfigRecord() if self._weights_by_examples else ConfigRecord({ALIKE: True})

    def train(
        self, server_round: int, shared: Arrays, messages: Mapping[int, Message]
    ) -> Exchanged:
        """Run all five stages, see `Exchange.train`.

        If too few clients are left at one of the stages, the round is void: there is no update, and
        the remark `secure` gives the reason.
        """
        traffic = Traffic()

        def send(stage: Sequence[Message]) -> list[Message]:
            replies, of_stage = self._send(stage)
            traffic.down += of_stage.down
            traffic.up += of_stage.up
            return replies

        outcome = secure_sum(
            list(messages.values()),
            send,
            self._config.secure_aggregation,
            numbers=size(shared),
            clients=self._clients,
            min_clients=self._config.federation.min_replies,
        )
        client_of_node = {m.metadata.dst_node_id: client for client, m in messages.items()}
        dropped = {client_of_node[n]: why for n, why in outcome.dropped.items()}
        dropped = dict(sorted(dropped.items()))
        silent = {client_of_node[n]: why for n, why in outcome.silent.items()}
        self._faults.add(dict(sorted(silent.items())))
        # A client that has diverged sends an error; its own words mark nobody else.
        diverged = {client: why for client, why in dropped.items() if DIVERGED in why}
        # None where the round ended before anybody had trained.
        accepted = len(outcome.counted)
        trained = sorted(client_of_node[node] for node in outcome.trained)
        self._check(outcome)
        if outcome.total is None:
            remarks = {"secure": {"void": outcome.void}}
            void = f"nothing aggregated: {outcome.void}"
            return Exchanged([], accepted, dropped, {}, trained, traffic, remarks, diverged, void)
        update, losses, remark = self._read(server_round, shared, outcome)
        remarks = {"secure": remark}
        return Exchanged([update], accepted, dropped, losses, trained, traffic, remarks, diverged)

    def close(self) -> None:
        """Log what went wrong again and again, see `Faults.close`."""
        self._faults.close()

    def _check(self, outcome: Outcome) -> None:
        """Make a round void whose sum cannot be that of honest clients."""
        if outcome.total is None:
            return
        alike = not self._weights_by_examples or bool(self._config.privacy.noise)
        lightest = 1.0 if alike else 1 / self._config.secure_aggregation.max_weight
        try:
            check_sum(
                outcome.total,
                clients=len(outcome.counted),
                levels=outcome.levels,
                lightest=lightest,
            )
        except Implausible as reason:
            outcome.total, outcome.void = None, f"a client has sent something wrong: {reason}"

    def _read(
        self, server_round: int, shared: Arrays, outcome: Outcome
    ) -> tuple[Update, dict[str, float], dict[str, Any]]:
        """The mean update, the mean losses, and the remark about clipped updates."""
        assert outcome.total is not None
        clip = self._config.secure_aggregation.clip
        decoded = decode(outcome.total, shared, clip)
        if decoded.cut:
            self._faults.add_round(
                server_round,
                f"the changes of {decoded.cut} of {len(outcome.counted)} clients were larger than "
                f"secure_aggregation.clip={clip:g} and were cut off; raise it",
            )
        # In float64, as `Update` allows for a mean of several clients; float32 would round it.
        mean = {n: last.astype(np.float64) + decoded.change[n] for n, last in shared.items()}
        # With noise on the clients, losses are not sent, and the sum holds zeros in their place.
        losses = {} if self._config.privacy.noise else {"loss": decoded.loss}
        # The mean stands for all clients, so its weight is 1 whatever theirs were.
        return Update(-1, mean, 1), losses, {"clipped": decoded.cut}
