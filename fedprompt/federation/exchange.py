"""The training exchange of a round, and its plain form, in which the server sees every update.

A round works on any `Exchange`. Secure aggregation is the other one that we have, see
`fedprompt.privacy.secure_aggregation.exchange`; it returns the mean of the updates only.
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


class PlainExchange:
    """One message to every client and one reply from it, which is checked before it counts.

    Args:
        send: sends messages and returns the replies.
        strategy: knows which replies are valid.
    """

    def __init__(self, send: Send, strategy: SharedPromptStrategy) -> None:
        self._send = send
        self._strategy = strategy

    def settings(self) -> ConfigRecord:
        """Nothing is added."""
        return ConfigRecord()

    def train(
        self, server_round: int, shared: Arrays, messages: Mapping[int, Message]
    ) -> Exchanged:
        """See `Exchange.train`."""
        replies, traffic = self._send(list(messages.values()))
        return replace(self._strategy.screen(server_round, replies), traffic=traffic)
