"""Flower's grid of a deployment, with what our rounds need in addition. Runs in the server app.

This is the only module that fetches replies from nodes. A message that a node has not fetched when
its exchange is over expires, so a node that was slow or away continues with the current round and
not with a past one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from flwr.app import Message
from flwr.serverapp import Grid

from fedprompt.federation.grid import CountingGrid, Traffic
from fedprompt.messages import set_source, to_wire

POLL_S = 1.0
"""Seconds between two looks for replies."""
GRACE_S = 5.0
"""Seconds by which a message outlives its exchange, so that its expiry does not look like a reply.
"""


class Reply(NamedTuple):
    """A reply, with the id of the message that it answers."""

    message_id: str
    message: Message


def pull_replies(grid: Grid, node_of_message: Mapping[str, int]) -> list[Reply]:
    """The replies that have arrived; every reply is untrusted.

    Args:
        grid: how to reach the nodes.
        node_of_message: the node that each message was sent to, by the message's id.

    Returns:
        Replies in the order in which Flower gives them. The id is the one that the reply claims to
        answer. An error has the node that it is about as its source.
    """
    replies = []
    for message in grid.pull_messages(list(node_of_message)):
        message_id = message.metadata.reply_to_message_id
        # Flower reports a lost node under the server's own id.
        if message.has_error() and message_id in node_of_message:
            set_source(message, node_of_message[message_id])
        replies.append(Reply(message_id, message))
    return replies


class NodeGrid(CountingGrid):
    """The nodes of a deployment.

    Args:
        inner: the grid that Flower gives to the server app.
    """

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
        """Replies to messages that were sent earlier."""
        return self.inner.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send all messages and wait for the replies.

        Args:
            messages: one message per node.
            timeout: seconds to wait; None waits until every node has replied or is lost.

        Returns:
            The replies that have arrived, in the order of their arrival.
        """
        sent = list(messages)
        self.traffic = Traffic()
        if not sent:
            return []
        if timeout is not None:
            for message in sent:
                message.metadata.ttl = timeout + GRACE_S
        ids = list(self.push_messages(sent))
        # Flower gives no id to a message that it could not send; there is nothing to wait for.
        waiting = {
            message_id: message.metadata.dst_node_id
            for message_id, message in zip(ids, sent, strict=True)
            if message_id
        }
        replies: list[Message] = []
        deadline = None if timeout is None else time.monotonic() + timeout
        while waiting:
            for reply in pull_replies(self, waiting):
                # A reply may claim to answer any message, so an unknown id is not an error.
                waiting.pop(reply.message_id, None)
                replies.append(reply.message)
            # The deadline is checked after a look, so that replies that came in time always count.
            if not waiting or (deadline is not None and time.monotonic() > deadline):
                break
            time.sleep(POLL_S)
        self.traffic = Traffic(_size(sent), _size(replies))
        return replies


def _size(messages: Iterable[Message]) -> int:
    """Bytes on the wire."""
    return sum(len(to_wire(m)) for m in messages)
