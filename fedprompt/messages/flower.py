"""Everything that messages need of Flower's private modules; it is used on both sides.

Flower's public packages are `flwr.app`, `flwr.serverapp`, `flwr.clientapp` and `flwr.simulation`.
They offer neither the bytes of a message nor a way to create one outside an app, and our grids need
both. `tests/test_flower_private.py` states what stops working when an upgrade removes one of the
names below.
"""

from __future__ import annotations

import uuid

from flwr.app import Message, RecordDict
from flwr.common.serde import (
    message_from_proto,
    message_to_proto,
    recorddict_from_proto,
    recorddict_to_proto,
)
from flwr.common.serde_utils import metadata_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "SERVER_NODE",
    "Run",
    "become_server",
    "content_to_wire",
    "empty_run",
    "from_wire",
    "metadata_to_wire",
    "records_from_wire",
    "records_to_wire",
    "set_new_id",
    "to_wire",
]

SERVER_NODE = 1
"""Flower's node id of the server."""


def to_wire(message: Message) -> bytes:
    """A message as Flower's own protobuf bytes."""
    content: bytes = message_to_proto(message).SerializeToString()
    return content


def from_wire(content: bytes) -> Message:
    """The message that `to_wire` wrote; it is read as data, and nothing in it is executed."""
    return message_from_proto(ProtoMessage.FromString(content))


def records_to_wire(records: RecordDict) -> bytes:
    """Records alone, without a message around them, as protobuf bytes."""
    content: bytes = recorddict_to_proto(records).SerializeToString()
    return content


def records_from_wire(content: bytes) -> RecordDict:
    """The records that `records_to_wire` wrote."""
    return recorddict_from_proto(ProtoRecordDict.FromString(content))


def metadata_to_wire(message: Message) -> bytes:
    """The first part of what `to_wire` writes: a message without its content."""
    head: bytes = ProtoMessage(metadata=metadata_to_proto(message.metadata)).SerializeToString()
    return head


def content_to_wire(content: RecordDict) -> bytes:
    """The second part of what `to_wire` writes: the content of a message.

    Protobuf writes fields in the order of their numbers, and the content's number follows the
    metadata's. Both parts, one after the other, are therefore the bytes of the whole message.
    """
    body: bytes = ProtoMessage(content=recorddict_to_proto(content)).SerializeToString()
    return body


def set_new_id(message: Message) -> None:
    """Give a message a random id, which its reply refers to."""
    # Flower sets the id on its own server only, and offers no setter.
    message.metadata.__dict__["_message_id"] = uuid.uuid4().hex


def become_server() -> None:
    """Give this process the identity that Flower's `Message` takes its sender from."""
    # Flower sets these in the processes that it starts; `Message(...)` raises without them.
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SERVER_NODE, 1


def empty_run(run_id: int = 1) -> Run:
    """The description of a run that no Flower server knows of, as `Grid.run` returns it."""
    return Run.create_empty(run_id=run_id)
