"""Reads replies: whose they are, and what may be used of them. Runs on the server.

A reply belongs to the node whose message it answers, never to the node that it claims to come from:
the metadata in a reply are written by its sender. And every reply is read on its own inside a
guard, so that one that cannot be read costs its sender the round and nobody else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from flwr.app import Message, RecordDict

from fedprompt.messages.records import error_reason
from fedprompt.runtime.peer_text import sanitised

Read = TypeVar("Read")
Ranges = Mapping[str, tuple[float, float | str]]
"""Names of the numbers that are read from a reply, with the smallest and the largest value of each.
A largest value that is a name stands for the reply's own number of that name: what counts a part is
at most what counts the whole."""
MAX_EXAMPLES = 10**9
"""The largest number of images that a client may report."""
log = logging.getLogger("fedprompt.server")


class Refused(Exception):
    """A reply that must not count; the message gives the reason."""


class Absent(Refused):
    """There is no reply, or an error in its place."""


@dataclass(frozen=True)
class Answers(Generic[Read]):
    """What the nodes of an exchange have answered; every node that was asked is in one of the two.

    Attributes:
        usable: what was read of the replies that count, by node id in ascending order.
        faults: why there is nothing to use, by node id in ascending order; each is one short line
            without control characters.
        absent: those of the nodes in `faults` that sent nothing, or an error.
    """

    usable: dict[int, Read]
    faults: dict[int, str]
    absent: set[int]


def read_answers(
    asked: Sequence[Message],
    replies: Iterable[Message],
    read: Callable[[int, RecordDict], Read],
) -> Answers[Read]:
    """Attribute replies to the nodes that were asked, and read each of them.

    Args:
        asked: the messages that were sent, at most one per node; they have their ids.
        replies: what came in time, in any order. Replies to other messages are ignored.
        read: returns what is used of a node's reply. It raises `Refused` if the reply must not
            count; any other exception also refuses the reply.

    Returns:
        What was read, and why nothing was.
    """
    node_of_message = {m.metadata.message_id: m.metadata.dst_node_id for m in asked}
    # A message that a grid could not send has no id, and nothing can answer it.
    node_of_message.pop("", None)
    received: dict[int, list[Message]] = {m.metadata.dst_node_id: [] for m in asked}
    strangers = 0
    for reply in replies:
        node = node_of_message.get(reply.metadata.reply_to_message_id)
        if node is None:
            strangers += 1
        else:
            received[node].append(reply)
    if strangers:
        log.warning("%d replies to no message of this exchange were ignored", strangers)
    answers: Answers[Read] = Answers({}, {}, set())
    for node, from_node in sorted(received.items()):
        try:
            answers.usable[node] = read(node, _content(node, from_node))
        except Refused as error:
            answers.faults[node] = sanitised(str(error))
            if isinstance(error, Absent):
                answers.absent.add(node)
        except Exception as error:  # a peer's bytes can raise errors of any type
            answers.faults[node] = sanitised(f"cannot be read: {type(error).__name__}: {error}")
    return answers


def _content(node: int, replies: Sequence[Message]) -> RecordDict:
    """The content of a node's only reply; raises `Refused` if there is none."""
    if not replies:
        raise Absent("no reply")
    if len(replies) > 1:
        # Which of them counts would depend on the order in which they came.
        raise Refused(f"replied {len(replies)} times")
    reply = replies[0]
    # Flower itself reports a lost node, under the server's id, so errors may have any source.
    if reply.has_error():
        raise Absent(error_reason(reply))
    if reply.metadata.src_node_id != node:
        raise Refused("claims to come from another node than the one that was asked")
    # Flower does not check what a node puts in the place of the content.
    if not isinstance(reply.content, RecordDict):
        raise Refused(f"holds a {type(reply.content).__name__} in place of records")
    return reply.content
