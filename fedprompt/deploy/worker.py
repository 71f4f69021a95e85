"""A node's warm process: it holds PyTorch, CLIP and features, and answers one message at a time."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from pathlib import Path

from flwr.app import Error, Message, RecordDict

from fedprompt.deploy.node import answer
from fedprompt.deploy.worker_client import receive, send
from fedprompt.errors import UserError
from fedprompt.messages import (
    CLIENT_FAILED,
    become_server,
    from_wire,
    records_from_wire,
    records_to_wire,
    to_wire,
)

log = logging.getLogger("fedprompt.node")


def serve(path: Path) -> None:
    """Listen on the socket `path`, which only this user may connect to; does not return.

    Raises:
        UserError: it cannot be made.
    """
    become_server()  # Flower's Message wants some identity; the ClientApp puts its own on the reply
    with listen(path) as listener:
        while True:
            line, _ = listener.accept()
            with line, contextlib.suppress(OSError, EOFError):
                serve_one(line)


def listen(path: Path) -> socket.socket:
    """A socket with mode 0600 at `path`, in place of one that nobody listens on."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
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


def serve_one(line: socket.socket) -> None:
    """One message; whatever goes wrong with it is an error reply, and the next one is answered."""
    header = json.loads(receive(line))
    message = from_wire(receive(line))
    kept, state = receive(line), RecordDict()
    try:
        state = records_from_wire(kept)
        settings = header["node_config"], header["run_config"], header["run_id"]
        reply = answer(message, *settings, state)
    except Exception as error:
        log.exception("a message could not be answered")
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        reply = Message(Error(CLIENT_FAILED, reason), reply_to=message)
    send(line, to_wire(reply))
    send(line, records_to_wire(state))
