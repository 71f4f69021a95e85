"""Passes a message to the node's worker and returns the reply, over a Unix socket of the node.

Runs in the process that Flower starts for every message, and therefore imports no PyTorch. In both
directions only data crosses the socket, in blocks that each follow their length:

to the worker    a JSON header; the message and the state of secure aggregation, as protobuf bytes
from the worker  the reply and the changed state, as protobuf bytes
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
"""Largest block that is read, so that a damaged length does not exhaust the memory."""
RETRY_S = 0.2
"""Seconds between two attempts to reach a worker that is starting."""


class WorkerUnavailable(Exception):
    """No process listens on the worker's socket."""


def ask_worker(
    path: str,
    message: Message,
    node_config: Mapping[str, Any],
    run_config: Mapping[str, Any],
    run_id: int,
    state: RecordDict | None = None,
    *,
    patience_s: float = 60.0,
) -> Message:
    """Have the worker answer a message.

    Args:
        path: the worker's socket.
        message: the server's message.
        node_config: the node's own settings.
        run_config: the run's settings, from the server.
        run_id: Flower's id of the run.
        state: what secure aggregation keeps from one message to the next; changed in place.
        patience_s: seconds to wait for a worker that is just starting.

    Returns:
        The worker's reply, or an error reply if the worker ended while it worked on the message.

    Raises:
        WorkerUnavailable: no worker listens, or the socket belongs to another user.
    """
    state = RecordDict() if state is None else state
    header = {"node_config": dict(node_config), "run_config": dict(run_config), "run_id": run_id}
    with _connect(path, time.monotonic() + patience_s) as connection:
        try:
            send_block(connection, json.dumps(header).encode())
            send_block(connection, to_wire(message))
            send_block(connection, records_to_wire(state))
            # No timeout: training may take arbitrarily long, and a dead worker closes the
            # connection.
            reply = from_wire(receive_block(connection))
            new_state = records_from_wire(receive_block(connection))
        except (OSError, EOFError) as error:
            reason = f"the node's worker ended while it answered ({type(error).__name__})"
            return Message(Error(CLIENT_FAILED, reason), reply_to=message)
    state.clear()
    state.update(new_state)
    # The worker's reply has the worker's metadata; this one has those of Flower's ClientApp.
    if reply.has_error():
        return Message(reply.error, reply_to=message)
    return Message(reply.content, reply_to=message)


def _connect(path: str, deadline: float) -> socket.socket:
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            # In the folder for temporary files, another user could have created this socket.
            if os.lstat(path).st_uid != os.geteuid():
                raise WorkerUnavailable("the socket belongs to another user")
            connection.connect(path)
            return connection
        except OSError as error:
            connection.close()
            if time.monotonic() > deadline:
                raise WorkerUnavailable(error.strerror or str(error)) from None
        time.sleep(RETRY_S)


def send_block(connection: socket.socket, content: bytes) -> None:
    """Write the length of some bytes, then the bytes."""
    connection.sendall(LENGTH.pack(len(content)) + content)


def receive_block(connection: socket.socket) -> bytes:
    """Read what `send_block` wrote on the other side.

    Raises:
        EOFError: the other side has closed the connection, or announces more than `MAX_BYTES`.
    """
    (size,) = LENGTH.unpack(_receive_exactly(connection, LENGTH.size))
    if size > MAX_BYTES:
        raise EOFError(f"a block of {size} bytes")
    return _receive_exactly(connection, size)


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    parts, remaining = [], size
    while remaining:
        part = connection.recv(min(remaining, 1 << 20))
        if not part:
            raise EOFError("closed")
        parts.append(part)
        remaining -= len(part)
    return b"".join(parts)
