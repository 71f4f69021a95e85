"""The training exchange of a round, and its plain form, in which the server sees every update.

`Federation.train_round` works with any `Exchange`, on the server. There are two: `PlainExchange`,
and `fedprompt.privacy.secure_aggregation.exchange.SecureExchange`, which returns only the mean of
the updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from flwr.app import ConfigRecord, Message

from fedprompt.federation.strategy import SharedPromptStrategy
from fedprompt.messages import Arrays, Exchanged, Send


class Exchange(Protocol):
    """Sends the training messages of a round and returns what may be aggregated."""

    def settings(self) -> ConfigRecord:
        """Entries that the exchange adds to the settings in every training message."""

    def train(
        self, server_round: int, shared: Arrays, messages: Mapping[int, Message]
    ) -> Exchanged:
        """Have clients train.

        Args:
            server_round: the round, from 1.
            shared: shared tensors that `messages` carry, float32.
            messages: training message of every sampled client, by client id.

        Returns:
            The updates, and everything else that the round's line in `metrics.jsonl` names. A
            client that fails is listed in `dropped`; it never raises an error.
        """

    def close(self) -> None:
        """Log what went wrong again and again, see `Faults.close`."""


class PlainExchange:
    """Sends one message to every client, and checks every reply before it counts.

    Args:
        send: sends messages and returns the replies.
        strategy: checks the replies, see `SharedPromptStrategy.screen`.
    """

    def __init__(self, send: Send, strategy: SharedPromptStrategy) -> None:
        self._send = send
        self._strategy = strategy

    def settings(self) -> ConfigRecord:
        """An empty record: a plain exchange adds no settings."""
        return ConfigRecord()

    def train(
        self, server_round: int, shared: Arrays, messages: Mapping[int, Message]
    ) -> Exchanged:
        """Send the messages and screen the replies, see `Exchange.train`."""
        asked = list(messages.values())
        replies, traffic = self._send(asked)
        # The strategy sees the replies only; the bytes are counted by the grid.
        return replace(self._strategy.screen(server_round, asked, replies), traffic=traffic)

    def close(self) -> None:
        """Do nothing: the strategy logs what goes wrong."""
