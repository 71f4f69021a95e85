"""Flower's grid of a deployment, with what our rounds need in addition. Runs in the server app.

This is the only module that fetches replies from nodes. A message that a node has not fetched when
its exchange is over expires, so a node that was slow or away continues with the current round and
not with a past one.

A node can put any bytes into its reply, its metadata included, and Flower checks only that a reply
is for a message to the node that it claims to come from. So nobody but the node that was asked must
be able to name a message: `push_messages` makes the ids of messages unguessable. And whose reply it
is must not be read in the reply: `pull_replies` asks for one message at a time.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Mapping

from flwr.app import ConfigRecord, Error, Message
from flwr.serverapp import Grid

from fedprompt.federation.grid import CountingGrid, Traffic
from fedprompt.messages import CLIENT_FAILED, SITE, error_reason, to_wire
from fedprompt.runtime.peer_text import sanitised

log = logging.getLogger("fedprompt.server")

POLL_S = 1.0
"""Seconds between two looks for replies."""
GRACE_S = 5.0
"""Seconds by which a message outlives its exchange, so that its expiry does not look like a reply.
"""


Sites = dict[int, dict[str, str]]
"""What nodes have last said about themselves, by node id: the SHA-256 of their `policy` and the
hash of their last `audit` entry."""


def pull_replies(
    grid: Grid, asked: Mapping[str, Message], sites: Sites | None = None
) -> dict[str, Message]:
    """The replies that have arrived.

    Args:
        grid: how to reach the nodes.
        asked: the messages that were sent, by their ids.
        sites: updated by what the replies say about their nodes' policies; None ignores it.

    Returns:
        The reply to each message that was answered, by the id of the message. Its metadata are
        those of a reply to this message from the node that was asked, but every byte of its content
        is untrusted. A reply that is not one is replaced by an error with the reason.
    """
    pulled = {message_id: _pull(grid, message) for message_id, message in asked.items()}
    replies = {message_id: reply for message_id, reply in pulled.items() if reply is not None}
    for message_id, reply in replies.items():
        if not reply.has_error() and (site := reply.content.pop(SITE, None)) is not None:
            if sites is not None:
                sites[asked[message_id].metadata.dst_node_id] = _site(site)
    return replies


def _site(record: object) -> dict[str, str]:
    """Policy and audit hash of a node, as short texts; every byte of them is untrusted."""
    values = record if isinstance(record, ConfigRecord) else {}
    return {key: sanitised(str(values.get(key, "none")))[:64] for key in ("policy", "audit")}


def _pull(grid: Grid, asked: Message) -> Message | None:
    """The reply to one message, or None if there is none yet."""
    message_id, node = asked.metadata.message_id, asked.metadata.dst_node_id
    try:
        # Flower stores a reply under the id that its sender named when it was authenticated. With a
        # single id per call, nothing in the reply itself has to be believed.
        arrived = list(grid.pull_messages([message_id]))
        if not arrived:
            return None
        (reply,) = arrived
        if reply.has_error():
            # Flower itself answers for a lost node, and under the server's id.
            return Message(Error(reply.error.code, error_reason(reply)), reply_to=asked)
        claimed = reply.metadata.reply_to_message_id, reply.metadata.src_node_id
        # Flower fails on content that is no record, if a node has stored it in the place of one.
        to_wire(reply)
    except Exception as error:
        # Flower parses a reply when it is pulled, and malformed bytes raise errors of many types.
        # If the SuperLink itself fails, so does the next call that sends messages.
        log.debug("a reply of node %d cannot be read", node, exc_info=True)
        reason = f"its reply cannot be read: {type(error).__name__}: {error}"
        return Message(Error(CLIENT_FAILED, sanitised(reason)), reply_to=asked)
    if claimed != (message_id, node):
        reason = "its reply claims to answer another message or to come from another node"
        return Message(Error(CLIENT_FAILED, reason), reply_to=asked)
    return reply


class NodeGrid(CountingGrid):
    """The nodes of a deployment.

    Args:
        inner: the grid that Flower gives to the server app.
    """

    def __init__(self, inner: Grid) -> None:
        super().__init__(inner.run)
        self.inner = inner
        self.sites: Sites = {}

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that are connected."""
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, each with a secret in its id; returns the ids."""
        sent = list(messages)
        for message in sent:
            # Flower derives the id from the content and the metadata. Without the secret, a node
            # could compute the ids of its neighbours' messages and reply in their place.
            message.metadata.group_id = f"{message.metadata.group_id} {secrets.token_hex(16)}"
        return self.inner.push_messages(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to messages that were sent earlier."""
        return self.inner.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send all messages and wait for the replies.

        What a node says about its policy is kept in `sites`; it is in no reply and not counted.

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
        waiting = {i: message for i, message in zip(ids, sent, strict=True) if i}
        replies: list[Message] = []
        deadline = None if timeout is None else time.monotonic() + timeout
        while waiting:
            for message_id, reply in pull_replies(self, waiting, self.sites).items():
                del waiting[message_id]
                replies.append(reply)
            # The deadline is checked after a look, so that replies that came in time always count.
            if not waiting or (deadline is not None and time.monotonic() > deadline):
                break
            time.sleep(POLL_S)
        self.traffic = Traffic(_size(sent), _size(replies))
        return replies


def _size(messages: Iterable[Message]) -> int:
    """Bytes on the wire."""
    return sum(len(to_wire(m)) for m in messages)
