"""One node of four is an attacker, which can put any bytes into Flower's database of messages.

The grid below stands for Flower's SuperLink. It checks what Flower checks, and it fails where
Flower fails. Whatever the attacker does, the round must be that of the three others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedprompt.deploy.node_grid import NodeGrid
from fedprompt.federation.client_app import handle
from fedprompt.federation.server_app import Federation
from fedprompt.messages import (
    become_server,
    empty_run,
    from_wire,
    records_from_wire,
    records_to_wire,
    to_array,
    to_wire,
)
from fedprompt.runtime.peer_text import LONGEST_REASON
from fedprompt.workspace import Workspace

NODE = 10**18
"""The node of client 0; client c is node NODE + c."""
ATTACKER = 1
VICTIM = 2
HONEST: dict[tuple[int, bytes], bytes] = {}
"""Replies of honest clients, so that each is computed once for all attacks."""


def digest(message: Message) -> str:
    """The id of a message, which Flower derives from everything in it."""
    return hashlib.sha256(to_wire(message)).hexdigest()


class SuperLink(Grid):
    """Holds messages and replies. All nodes are honest but one, if there is an `attack`.

    Args:
        workspace: that of all clients.
        attack: called with this object and the attacker's message, instead of an honest answer.
    """

    def __init__(
        self, workspace: Workspace, attack: Callable[[SuperLink, Message], None] | None = None
    ) -> None:
        become_server()
        self.workspace, self.attack = workspace, attack
        self.sent: dict[str, Message] = {}
        self.stored: dict[str, bytes | Exception] = {}

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return empty_run()

    def create_message(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def send_and_receive(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [NODE + client for client in range(self.workspace.num_clients)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = {digest(message): message for message in messages}
        for message_id, message in pushed.items():
            message.metadata.__dict__["_message_id"] = message_id
        self.sent |= pushed
        # The attacker is the fastest of all.
        for message in sorted(pushed.values(), key=lambda m: client_of(m) != ATTACKER):
            if self.attack and client_of(message) == ATTACKER:
                self.attack(self, message)
            else:
                self.store(message.metadata.message_id, to_wire(self.honest(message)))
        return list(pushed)

    def honest(self, message: Message) -> Message:
        """The reply of an honest client; it depends on the message's content alone."""
        received = from_wire(to_wire(message))
        key = client_of(message), records_to_wire(received.content)
        if key not in HONEST:
            reply = handle(self.workspace, [client_of(message)], [received], {})[0][0]
            HONEST[key] = records_to_wire(reply.content)
        return Message(records_from_wire(HONEST[key]), reply_to=message)

    def store(self, message_id: str, reply: bytes | Exception) -> None:
        """Flower stores the first reply to a message that it knows, and never looks into it."""
        if message_id in self.sent:
            self.stored.setdefault(message_id, reply)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = [self.stored.pop(i) for i in list(message_ids) if i in self.stored]
        # Flower parses here, and one reply that cannot be parsed costs all replies of the call.
        for reply in found:
            if isinstance(reply, Exception):
                raise reply
        return [from_wire(reply) for reply in found if isinstance(reply, bytes)]


def client_of(message: Message) -> int:
    return message.metadata.dst_node_id - NODE


def neighbour(link: SuperLink, message: Message) -> Message:
    """The message of the same exchange to the victim."""
    (found,) = [m for m in link.sent.values() if client_of(m) == VICTIM
                and m.metadata.group_id.split()[0] == message.metadata.group_id.split()[0]
                and m.metadata.message_type == message.metadata.message_type]  # fmt: skip
    return found


def harmful(link: SuperLink, message: Message) -> Message:
    """A reply that would count, and does harm."""
    reply = link.honest(message)
    if "arrays" in reply.content:
        shapes = link.workspace.shared_shapes
        arrays = {n: to_array(np.full(shape, 9, np.float32)) for n, shape in shapes.items()}
        reply.content["arrays"] = ArrayRecord(arrays)
    else:
        reply.content["metrics"] = MetricRecord({"num-examples": 10**6, "correct": 0})
    return reply


def metadata(**changes: Any) -> Callable[[SuperLink, Message], None]:
    """A harmful reply with other metadata."""

    def attack(link: SuperLink, message: Message) -> None:
        reply = harmful(link, message)
        for name, value in changes.items():
            reply.metadata.__dict__[f"_{name}"] = value
        link.store(message.metadata.message_id, to_wire(reply))

    return attack


def as_neighbour(link: SuperLink, message: Message) -> None:
    """It even knows the id of the victim's message, but has to name its own when it is stored."""
    changes = {"src_node_id": NODE + VICTIM,
               "reply_to_message_id": neighbour(link, message).metadata.message_id}  # fmt: skip
    metadata(**changes)(link, message)


def to_neighbours_message(link: SuperLink, message: Message) -> None:
    changes = {"reply_to_message_id": neighbour(link, message).metadata.message_id}
    metadata(**changes)(link, message)


def guessed_id(link: SuperLink, message: Message) -> None:
    """It computes the id of the victim's message from its own, and is the first to answer it."""
    theirs = neighbour(link, message)
    guess = from_wire(to_wire(message))
    guess.metadata.__dict__["_message_id"] = ""
    guess.metadata.__dict__["_dst_node_id"] = NODE + VICTIM
    guess.metadata.__dict__["created_at"] = theirs.metadata.created_at
    reply = harmful(link, message)
    reply.metadata.__dict__["_src_node_id"] = NODE + VICTIM
    reply.metadata.__dict__["_reply_to_message_id"] = digest(guess)
    link.store(digest(guess), to_wire(reply))
    link.store(message.metadata.message_id, to_wire(Message(Error(2, "guessed"), reply_to=message)))


def raw(reply: bytes | Exception) -> Callable[[SuperLink, Message], None]:
    return lambda link, message: link.store(message.metadata.message_id, reply)


def replying(content: RecordDict | Error) -> Callable[[SuperLink, Message], None]:
    return lambda link, m: link.store(m.metadata.message_id, to_wire(Message(content, reply_to=m)))


EVIL = "\x1b[2J\x1b]0;owned\x07\u202e\r\n" + "x" * 10**6
ATTACKS: dict[str, Callable[[SuperLink, Message], None]] = {
    "as neighbour": metadata(src_node_id=NODE + VICTIM),
    "as server": metadata(src_node_id=1),
    "as nobody": metadata(src_node_id=5),
    "to neighbour's message": to_neighbours_message,
    "to no message": metadata(reply_to_message_id="unknown"),
    "to an empty id": metadata(reply_to_message_id=""),
    "as neighbour to its message": as_neighbour,
    "guessed id": guessed_id,
    "garbage": raw(b"garbage"),
    "nothing at all": raw(b""),
    "no content": raw(b"\x0a\x00"),
    "recursion": raw(RecursionError("maximum depth")),
    "unknown object": raw(KeyError("0f")),
    "no message object": raw(AttributeError("'ConfigRecord' object has no attribute 'metadata'")),
    "out of memory": raw(MemoryError()),
    "error": replying(Error(7, EVIL)),
    "error without reason": replying(Error(0, "")),
    "no records": replying(RecordDict()),
    "other records": replying(RecordDict({EVIL: ConfigRecord({EVIL: EVIL})})),
    "metrics are a config": replying(RecordDict({"metrics": ConfigRecord({"num-examples": 1})})),
    "metrics are arrays": replying(RecordDict({"metrics": ArrayRecord(), "arrays": ArrayRecord()})),
    "empty metrics": replying(RecordDict({"metrics": MetricRecord(), "arrays": ArrayRecord()})),
    "evil names": replying(RecordDict({"metrics": MetricRecord({EVIL: 1, "client-ids": [3]})})),
    "text for a number": replying(RecordDict({"metrics": ConfigRecord({"correct": EVIL})})),
}


@pytest.fixture
def round_of(
    make_workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Any], tuple[dict[str, Any], bytes]]:
    """The line of a round, with its evaluation, and the bytes of the shared tensors after it."""
    monkeypatch.setattr("fedprompt.deploy.node_grid.POLL_S", 0.0)
    workspace = make_workspace(
        method={"name": "promptfl", "context_tokens": 2}, federation={"timeout_s": 0.05}
    )

    def run(attack: Any) -> tuple[dict[str, Any], bytes]:
        link = SuperLink(workspace, attack)
        federation = Federation(workspace, NodeGrid(link))
        federation.strategy.set_nodes({c: NODE + c for c in range(workspace.num_clients)})
        line = federation.train_round(1) | federation.evaluate(1)
        return line, b"".join(t.numpy().tobytes() for t in federation.shared.values())

    return run


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attacker_costs_nobody_else_the_round(
    name: str,
    round_of: Callable[[Any], tuple[dict[str, Any], bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    without, shared_without = round_of(lambda link, message: None)
    assert without["dropped"] == {str(ATTACKER): "no reply"}
    caplog.clear()
    line, shared = round_of(ATTACKS[name])
    assert shared == shared_without
    assert list(line["dropped"]) == [str(ATTACKER)]
    assert line["clients"] == without["clients"]
    assert line["train"] == without["train"]
    assert line["personal"] == without["personal"]
    assert line["personal"]["clients"] == [0, 2, 3]
    # Both refusals are logged and name the client, in lines that a terminal can show.
    named = [r for r in caplog.records if f"client {ATTACKER}:" in r.getMessage()]
    assert len(named) == 2
    for record in caplog.records:
        assert record.getMessage().isprintable()
        assert len(record.getMessage()) < 2 * LONGEST_REASON


def test_without_an_attacker_all_count(
    round_of: Callable[[Any], tuple[dict[str, Any], bytes]],
) -> None:
    line, _ = round_of(None)
    assert "dropped" not in line
    assert line["personal"]["clients"] == [0, 1, 2, 3]
    assert line["bytes_up"] > 0
