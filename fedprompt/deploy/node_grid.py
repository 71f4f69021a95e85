"""Flower's grid of a deployment, with what our rounds need besides.

A message that nobody has fetched when its exchange is over is not delivered any more: a node that
was slow or away goes on with the current round, not with the past. Flower reports a lost node under
the server's own id; here each error has the node that it is about.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fedprompt.federation.grid import CountingGrid, Traffic
from fedprompt.messages import to_wire

log = logging.getLogger("fedprompt.server")

POLL_S = 1.0
GRACE_S = 5.0
"""By which a message outlives its exchange, so that its expiry is not taken for an answer."""


class NodeGrid(CountingGrid):
    """The nodes that Flower's `inner` grid reaches."""

    def __init__(self, inner: Grid) -> None:
        super().__init__(inner.run)
        self.inner = inner

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that are connected."""
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; returns their ids."""
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to earlier messages."""
        return self.inner.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send all messages and wait for the replies, at most `timeout` seconds."""
        sent = list(messages)
        self.traffic = Traffic()
        if not sent:
            return []
        if timeout is not None:
            for message in sent:
                message.metadata.ttl = timeout + GRACE_S
        ids = list(self.push_messages(sent))
        node_of = {
            message_id: message.metadata.dst_node_id
            for message_id, message in zip(ids, sent, strict=True)
            if message_id
        }
        waiting, replies = set(node_of), []
        deadline = None if timeout is None else time.monotonic() + timeout
        while waiting:
            found = list(self.pull_messages(waiting))
            for reply in found:
                asked = reply.metadata.reply_to_message_id
                waiting.discard(asked)
                if reply.has_error() and asked in node_of:
                    reply.metadata.__dict__["_src_node_id"] = node_of[asked]
                replies.append(reply)
            if not waiting or (deadline is not None and time.monotonic() > deadline):
                break
            time.sleep(POLL_S)
        self.traffic = Traffic(_size(sent), _size(replies))
        return replies


def _size(messages: Iterable[Message]) -> int:
    return sum(len(to_wire(m)) for m in messages)
