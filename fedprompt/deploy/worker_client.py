"""A message to a node's worker and the reply back, over a Unix socket of the node's own.

Both directions are data, each part after its length: a JSON header on the way there, then Flower's
protobuf bytes of the message and of what secure aggregation keeps between messages. Loads no
PyTorch.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import Error, Message, RecordDict

from fedprompt.messages import CLIENT_FAILED, from_wire, records_from_wire, records_to_wire, to_wire

LENGTH = struct.Struct(">Q")
MAX_BYTES = 1 << 32


class WorkerAway(Exception):
    """Nobody listens on the worker's socket."""


def carry(
    path: str,
    message: Message,
    node_config: Mapping[str, Any],
    run_config: Mapping[str, Any],
    run_id: int,
    state: RecordDict | None = None,
    *,
    patience: float = 60.0,
) -> Message:
    """The worker's reply; an error reply where it dies over the message.

    A worker that is just starting is waited for, `patience` seconds at most. It is given `state`,
    which is what secure aggregation keeps from one message to the next, and changes it.

    Raises:
        WorkerAway: it is not there.
    """
    state = RecordDict() if state is None else state
    header = {"node_config": dict(node_config), "run_config": dict(run_config), "run_id": run_id}
    with _connected(path, time.monotonic() + patience) as line:
        try:
            send(line, json.dumps(header).encode())
            send(line, to_wire(message))
            send(line, records_to_wire(state))
            reply = from_wire(receive(line))
            kept = records_from_wire(receive(line))
        except (OSError, EOFError) as error:
            reason = f"the node's worker ended over this message ({type(error).__name__})"
            return Message(Error(CLIENT_FAILED, reason), reply_to=message)
    state.clear()
    state.update(kept)
    if reply.has_error():
        return Message(reply.error, reply_to=message)
    return Message(reply.content, reply_to=message)


def _connected(path: str, deadline: float) -> socket.socket:
    while True:
        line = socket.socket(socket.AF_UNIX)
        try:
            if os.lstat(path).st_uid != os.geteuid():
                raise WorkerAway("it is another user's")
            line.connect(path)
            return line
        except OSError as error:
            line.close()
            if time.monotonic() > deadline:
                raise WorkerAway(error.strerror or str(error)) from None
        time.sleep(0.2)


def send(line: socket.socket, content: bytes) -> None:
    """Write one block."""
    line.sendall(LENGTH.pack(len(content)) + content)


def receive(line: socket.socket) -> bytes:
    """Read one block.

    Raises:
        EOFError: the other side has ended.
    """
    (size,) = LENGTH.unpack(_exactly(line, LENGTH.size))
    if size > MAX_BYTES:
        raise EOFError(f"a block of {size} bytes")
    return _exactly(line, size)


def _exactly(line: socket.socket, size: int) -> bytes:
    parts, left = [], size
    while left:
        part = line.recv(min(left, 1 << 20))
        if not part:
            raise EOFError("closed")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
