"""Messages of a simulation as bytes, one parcel per client.

The grids of `fedprompt.simulation` serialise messages even within one process, so that clients
never share memory with the server and the counted bytes are those of a deployment.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from flwr.app import Error, Message, RecordDict

from fedprompt.messages.flower import (
    content_to_wire,
    from_wire,
    metadata_to_wire,
    set_new_id,
    to_wire,
)

FIRST_NODE = 1_000_000
"""Node id of client 0 in a simulation."""
CLIENT_FAILED = 2
"""Flower's error code for a ClientApp that raised an exception."""


def node_of(client: int) -> int:
    """The node id of a client in a simulation."""
    return FIRST_NODE + client


def client_of(node: int) -> int:
    """The client of a node id in a simulation."""
    return node - FIRST_NODE


class Parcel(NamedTuple):
    """One client's message in two parts; `head + body` equals `to_wire(message)`.

    `body` is the serialised content. All messages of a round share it, so that it is held, and sent
    to a worker, once for all clients of a block.
    """

    client: int
    head: bytes
    body: bytes

    @property
    def size(self) -> int:
        """Bytes on the wire."""
        return len(self.head) + len(self.body)

    def open(self) -> Message:
        """This client's own copy of the message."""
        return from_wire(self.head + self.body)


def to_parcels(messages: Iterable[Message]) -> list[Parcel]:
    """Give each message an id and serialise it; content that messages share is serialised once."""
    # The content is kept beside its bytes, so that no other object can get the same `id`.
    bodies: dict[int, tuple[RecordDict, bytes]] = {}
    parcels = []
    for message in messages:
        set_new_id(message)
        client = client_of(message.metadata.dst_node_id)
        if not message.has_content():
            parcels.append(Parcel(client, to_wire(message), b""))
            continue
        content = message.content
        if id(content) not in bodies:
            bodies[id(content)] = (content, content_to_wire(content))
        parcels.append(Parcel(client, metadata_to_wire(message), bodies[id(content)][1]))
    return parcels


def failure(message: Message, reason: str) -> bytes:
    """The error reply of a client that could not answer, as bytes; `reason` is one line."""
    return to_wire(Message(Error(CLIENT_FAILED, reason), reply_to=message))
