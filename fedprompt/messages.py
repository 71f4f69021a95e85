"""Flower messages as bytes, the form in which they cross our grids."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.common.serde import (
    message_from_proto,
    message_to_proto,
    recorddict_from_proto,
    recorddict_to_proto,
)
from flwr.common.serde_utils import metadata_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

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
    and sent to a worker, once for all clients of a block.
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


def set_source(message: Message, node: int) -> None:
    """Set the node that a message is attributed to; Flower's metadata has no setter for it."""
    message.metadata.__dict__["_src_node_id"] = node


SERVER_NODE = 1


def become_server() -> None:
    """Give this process the identity that Flower's Message takes its sender from."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SERVER_NODE, 1


Arrays = dict[str, NDArray[Any]]


ARRAYS, METRICS, CONFIG, EXTRAS = "arrays", "metrics", "config", "received"
"""Names of the records in our messages; `received` is what one client alone is sent."""


LONGEST_REASON = 300
"""Characters of a reason that are shown: some of them are a peer's."""


NUMPY = "numpy.ndarray"
"""Flower's name for an array in NumPy's own file format."""


def to_arrays(record: ArrayRecord) -> Arrays:
    """NumPy arrays of a record, by name; each a copy of its own."""
    return {name: values_of(array) for name, array in record.items()}


def to_record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """A record of NumPy arrays, by name."""
    return ArrayRecord({name: to_array(values) for name, values in arrays.items()})


def to_array(values: NDArray[Any]) -> Array:
    """Flower's `Array(values)`, byte for byte; for float32 without NumPy's slow header writer."""
    if values.dtype != np.float32:
        return Array(np.ascontiguousarray(values))
    shape = tuple(values.shape)
    data = _float32_header(shape) + values.tobytes()
    return Array(dtype="float32", shape=shape, stype=NUMPY, data=data)


def values_of(array: Array) -> NDArray[Any]:
    """Flower's `array.numpy()`: a new array, read without pickle.

    Parsing the header takes most of its time. Here it is compared with the one that NumPy writes
    for the labelled shape; anything else goes to NumPy's own reader.

    Raises:
        Exception: of many types, for foreign bytes.
    """
    if array.dtype == "float32" and array.stype == NUMPY:
        shape, data = tuple(array.shape), array.data
        header = _float32_header(shape)
        if data.startswith(header) and len(data) == len(header) + 4 * math.prod(shape):
            return np.frombuffer(data, np.float32, offset=len(header)).reshape(shape).copy()
    return array.numpy()


@lru_cache(maxsize=256)
def _float32_header(shape: tuple[int, ...]) -> bytes:
    """What `np.save` writes in front of the numbers of a float32 array in C order."""
    buffer = BytesIO()
    layout = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, layout)
    return buffer.getvalue()


def sanitised(reason: str) -> str:
    """A reason on one line, without control characters, cut where it is long."""
    clean = "".join(c if c.isprintable() else "?" for c in reason)
    return clean if len(clean) <= LONGEST_REASON else clean[: LONGEST_REASON - 3] + "..."


def error_reason(reply: Message) -> str:
    """One line about a reply that is an error, or that nobody asked for."""
    if not reply.has_error():
        return f"unexpected reply from node {reply.metadata.src_node_id}"
    return " ".join((reply.error.reason or f"error {reply.error.code}").split())
