"""What an exchange of training messages returns, whether plain or with secure aggregation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Message

from fedprompt.messages.records import Arrays


@dataclass
class Traffic:
    """Bytes of an exchange: `down` from the server to clients, `up` from clients to the server."""

    down: int = 0
    up: int = 0


@dataclass(frozen=True)
class Update:
    """Trained shared tensors that an aggregation works on.

    Attributes:
        client: id of the client that trained; -1 for the mean of several clients, which is all that
            secure aggregation reveals.
        arrays: shared tensors by name, in the shapes that the method declares.
        num_examples: number of images they were trained on, at least 1.
    """

    client: int
    arrays: Arrays
    num_examples: int


@dataclass(frozen=True)
class Exchanged:
    """Result of the training messages of one round.

    A plain exchange and secure aggregation both return it, so that the rest of a round does not
    depend on which of the two was used.

    Attributes:
        updates: what the strategy aggregates, sorted by client id; empty when the round must leave
            the shared tensors unchanged.
        accepted: number of clients whose training counts.
        dropped: why the training of a client does not count, by client id in ascending order.
        losses: mean losses of the accepted clients by name, weighted by their images.
        trained: ids of the clients that have trained, in ascending order, whether their training
            counts or not. A client that sent nothing or an error is not one of them.
        traffic: bytes of all messages that the exchange took.
        remarks: additional entries of the round's line in `metrics.jsonl`, as plain JSON.
        diverged: what is not finite in a client's training, by client id in ascending order,
            whether it counts or not.
        void: why nothing may be aggregated although clients have replied; empty if something may.
        statistics: of every statistic of the method by name, over the accepted clients, the `mean`
            weighted by their images, the `std` and the `max`.
        absent: why a client has not replied, by client id in ascending order, where the experiment
            simulates it (`conditions`). Such clients are not in `dropped`.
    """

    updates: list[Update]
    accepted: int
    dropped: dict[int, str]
    losses: dict[str, float]
    trained: list[int]
    traffic: Traffic = field(default_factory=Traffic)
    remarks: Mapping[str, Any] = field(default_factory=dict)
    diverged: dict[int, str] = field(default_factory=dict)
    void: str = ""
    statistics: dict[str, dict[str, float]] = field(default_factory=dict)
    absent: dict[int, str] = field(default_factory=dict)

    def without(self, absent: Mapping[int, str]) -> Exchanged:
        """The same result with some clients' silence explained.

        Args:
            absent: why clients have not replied, by client id in ascending order.
        """
        dropped = {client: why for client, why in self.dropped.items() if client not in absent}
        return replace(self, dropped=dropped, absent=dict(absent))


Send = Callable[[Sequence[Message]], tuple[list[Message], Traffic]]
"""Sends messages and returns the replies that came in time, in any order, with the bytes of both.

Clients that fail are represented by error messages or by nothing at all.
"""
