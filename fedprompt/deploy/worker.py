"""A node's worker: it holds PyTorch, CLIP and the features, and answers one message at a time.

Runs on a node, in a process that `deploy node` starts. Its clients are the short-lived processes
that Flower starts for every message (worker_client.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from pathlib import Path

from flwr.app import Error, Message, RecordDict

from fedprompt.deploy.node import answer
from fedprompt.deploy.worker_client import receive_block, send_block
from fedprompt.errors import DeviceFault, UserError
from fedprompt.messages import (
    CLIENT_FAILED,
    become_server,
    from_wire,
    records_from_wire,
    records_to_wire,
    to_wire,
)
from fedprompt.runtime.device_memory import DEVICE_ERRORS

log = logging.getLogger("fedprompt.node")


def serve(path: Path) -> None:
    """Answer messages on the socket `path`; does not return.

    Raises:
        UserError: the socket cannot be created.
        DeviceFault: the GPU has failed. `deploy node` then starts another worker.
    """
    # Flower builds no Message without an identity; the ClientApp sets the right one on the reply.
    become_server()
    with listen(path) as listener:
        while True:
            connection, _ = listener.accept()
            # A ClientApp process that ends early must not end the worker.
            with connection, contextlib.suppress(OSError, EOFError):
                answer_one(connection)


def listen(path: Path) -> socket.socket:
    """Create a socket to which only this user can connect; an abandoned one is replaced.

    Raises:
        UserError: the socket cannot be created, or another worker listens on it.
    """
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(str(path))
        raise UserError(f"another worker listens on {path}; end it first.")
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
        # The mode must be right from the start: chmod after bind would leave a moment for others.
        previous = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(previous)
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen on {path}: {error.strerror}.") from None
    return listener


def answer_one(connection: socket.socket) -> None:
    """Answer one message; a failure becomes an error reply, so that the worker keeps running.

    Raises:
        DeviceFault: the GPU has failed. The message has its error reply, but this process cannot
            answer another one.
    """
    fault: DeviceFault | None = None
    header = json.loads(receive_block(connection))
    message = from_wire(receive_block(connection))
    stored, state = receive_block(connection), RecordDict()
    try:
        state = records_from_wire(stored)
        settings = header["node_config"], header["run_config"], header["run_id"]
        reply = answer(message, *settings, state)
    except Exception as error:
        log.exception("a message could not be answered")
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        # The text stays here: it can quote paths and values of this node.
        reply = Message(Error(CLIENT_FAILED, type(error).__name__), reply_to=message)
        if isinstance(error, DEVICE_ERRORS):
            fault = DeviceFault(f"the device has failed ({reason}), and this worker ends.")
    try:
        send_block(connection, to_wire(reply))
        send_block(connection, records_to_wire(state))
    finally:
        # Also if nobody waits for the reply any more.
        if fault is not None:
            raise fault
