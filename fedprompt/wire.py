"""Flower messages as bytes, the form in which they cross our grids."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import NamedTuple

from flwr.app import Error, Message, RecordDict
from flwr.common.serde import (
    message_from_proto,
    message_to_proto,
    recorddict_from_proto,
    recorddict_to_proto,
)
from flwr.common.serde_utils import metadata_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

FIRST_NODE = 1_000_000
CLIENT_FAILED = 2
"""Flower's error code for a ClientApp that raised."""


def node_of(client: int) -> int:
    """The node id of a client on our grids."""
    return FIRST_NODE + client


def client_of(node: int) -> int:
    """The client that a node id of our grids stands for."""
    return node - FIRST_NODE


def to_wire(message: Message) -> bytes:
    """A message as Flower's own protobuf bytes."""
    content: bytes = message_to_proto(message).SerializeToString()
    return content


def from_wire(content: bytes) -> Message:
    """The message that `to_wire` wrote; data only, nothing is executed."""
    return message_from_proto(ProtoMessage.FromString(content))


def records_to_wire(records: RecordDict) -> bytes:
    """Records alone, without a message around them, as protobuf bytes."""
    content: bytes = recorddict_to_proto(records).SerializeToString()
    return content


def records_from_wire(content: bytes) -> RecordDict:
    """The records that `records_to_wire` wrote."""
    return recorddict_from_proto(ProtoRecordDict.FromString(content))


class Parcel(NamedTuple):
    """One client's message in two parts; `head + body` is what `to_wire` gives.

    `body` is the serialised content. A round's messages carry the same one, which is then held,
    and sent to a worker, once for all clients of a cohort.
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
    """Give each message an id and write it as bytes; a content of many messages is written once."""
    bodies: dict[int, tuple[RecordDict, bytes]] = {}
    parcels = []
    for message in messages:
        metadata = message.metadata
        metadata.__dict__["_message_id"] = uuid.uuid4().hex
        client = client_of(metadata.dst_node_id)
        if not message.has_content():
            parcels.append(Parcel(client, to_wire(message), b""))
            continue
        content = message.content
        if id(content) not in bodies:
            proto = ProtoMessage(content=recorddict_to_proto(content))
            bodies[id(content)] = (content, proto.SerializeToString())
        # Protobuf writes fields in the order of their numbers: the metadata, then the content.
        head = ProtoMessage(metadata=metadata_to_proto(metadata)).SerializeToString()
        parcels.append(Parcel(client, head, bodies[id(content)][1]))
    return parcels


def failure(message: Message, reason: str) -> bytes:
    """The error reply of a client that could not answer."""
    return to_wire(Message(Error(CLIENT_FAILED, reason), reply_to=message))
