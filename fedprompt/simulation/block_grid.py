"""What the grids of a simulation have in common: blocks of clients, bytes and private tensors.

The grids implement Flower's public `Grid`, so any Flower strategy runs on them, with one message
per client. `send_and_receive` sees all messages of a round together and can therefore give those of
several clients, a block, to one call of `client_app.handle`. Messages cross the grid as bytes, as
they would cross a network: nothing is shared by reference, and traffic is counted on these bytes.

Private tensors stay on the client's side of the grid. They are in its `private` store, are handed
to the call that answers a block and are taken back from it, and are never part of a message.
"""

from __future__ import annotations

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from flwr.app import Message, RecordDict

from fedprompt.config.schema import Config
from fedprompt.errors import UserError
from fedprompt.federation.client_app import handle
from fedprompt.federation.grid import CountingGrid, Traffic
from fedprompt.messages import (
    Parcel,
    become_server,
    empty_run,
    failure,
    from_wire,
    node_of,
    to_parcels,
    to_wire,
)
from fedprompt.methods.base import Tensors
from fedprompt.privacy.secure_aggregation import COLLECT, SETUP, SHARE_KEYS, UNMASK, stage_of
from fedprompt.privacy.secure_aggregation.client import answer as masked_answer
from fedprompt.runtime import thread_count, use_threads
from fedprompt.simulation.blocks import choose_size, free_memory, group
from fedprompt.simulation.memory_store import MemoryStore
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.grid")

KEY_STAGES = (SETUP, SHARE_KEYS, UNMASK)
"""Stages of secure aggregation that only exchange keys; nobody trains in them."""

Handler = Callable[
    [Workspace, Sequence[int], Sequence[Message], Mapping[int, Tensors]],
    tuple[list[Message], dict[int, Tensors]],
]
"""What answers a block's messages, with the signature and contract of `client_app.handle`."""


Opener = Callable[[Config], Workspace]
"""What opens the workspace of a config in another process: an importable function."""


class PrivateStore(Protocol):
    """Where a grid keeps its clients' private tensors."""

    def get(self, client: int) -> Tensors | None:
        """A client's tensors, without a client axis, or None before its first training."""

    def put(self, client: int, tensors: Tensors) -> None:
        """Store a client's tensors; they replace those of its last training."""


class BlockGrid(CountingGrid):
    """A grid that answers messages in blocks of clients; subclasses say where a block runs.

    Args:
        workspace: what this process holds.
        private: keeps the clients' private tensors; a new `MemoryStore` if it is None.
        answer: answers a block's messages. Grids with several processes pickle it by reference, so
            it must be importable.
    """

    def __init__(
        self,
        workspace: Workspace,
        private: PrivateStore | None = None,
        *,
        answer: Handler = handle,
    ) -> None:
        super().__init__(empty_run())
        self.workspace = workspace
        self.private: PrivateStore = MemoryStore() if private is None else private
        self.answer = answer
        self._replies: dict[str, Message] = {}
        self._secrets: dict[int, RecordDict] = {}
        self._free_bytes = free_memory(workspace.clip.device)
        self._told: set[int] = set()
        # The server's own scores depend on the number of threads too, in their last bits.
        use_threads(workspace.config.simulation)
        become_server()

    def use(self, workspace: Workspace) -> None:
        """Change to another method on the same data, with no private tensors yet.

        Args:
            workspace: the same data and backbone with the other method.
        """
        self.workspace = workspace
        self.private = MemoryStore()
        self._secrets = {}

    def close(self) -> None:
        """Release processes and memory; the grid is not used afterwards."""

    # Flower's Grid

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of all clients, in the order of client ids."""
        return [node_of(c) for c in range(self.workspace.num_clients)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer the messages now and store the replies; returns the messages' ids."""
        sent = list(messages)
        replies = list(self.send_and_receive(sent))
        ids = [m.metadata.message_id for m in sent]
        self._replies.update({r.metadata.reply_to_message_id: r for r in replies})
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to messages that were pushed earlier."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Answer all messages, in blocks.

        Args:
            messages: one message per client, all of one type and round.
            timeout: seconds for the whole exchange; None waits for all clients.

        Returns:
            Replies in the order of the messages. Clients whose block had not started in time have
            none, as on Flower's own grid. The bytes sent and received are in `traffic`.
        """
        sent = list(messages)
        self.traffic = Traffic()
        if not sent:
            return []
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        kind, stage = sent[0].metadata.message_type, stage_of(sent[0])
        parcels = to_parcels(sent)
        replies = {} if stage in KEY_STAGES else self._in_blocks(kind, parcels, deadline)
        if stage is not None:
            asked = replies if stage == COLLECT else range(len(parcels))
            replies = {k: self._secured(parcels[k], replies.get(k)) for k in asked}
        self.traffic = Traffic(sum(p.size for p in parcels), sum(map(len, replies.values())))
        return [from_wire(replies[place]) for place in sorted(replies)]

    def _in_blocks(self, kind: str, parcels: Sequence[Parcel], deadline: float) -> dict[int, bytes]:
        """Replies by position of their message; one that has not started by then has none."""
        clients = [p.client for p in parcels]
        places = group(self.workspace, clients, self.clients_per_block(len(parcels)))
        blocks = [[parcels[i] for i in block] for block in places]
        answered = self._run_blocks(kind, blocks, deadline)
        return {
            place: reply
            for index, block in answered.items()
            for place, reply in zip(places[index], block, strict=True)
        }

    def _secured(self, parcel: Parcel, trained: bytes | None) -> bytes:
        """A client's reply in one stage of secure aggregation; `trained` is the reply it masks.

        The clients' keys are kept here, on the clients' side of the grid. They are not part of a
        checkpoint, so a round that is repeated uses new keys.
        """
        message, state = parcel.open(), self._secrets.setdefault(parcel.client, RecordDict())

        def train() -> Message:
            assert trained is not None
            return from_wire(trained)

        try:
            return to_wire(masked_answer(self.workspace.config, message, state, train))
        except UserError as error:
            return failure(message, str(error))

    @property
    def workers(self) -> int:
        """Processes that share the clients of an exchange."""
        return 1

    @property
    def threads(self) -> int:
        """CPU threads of each of these processes."""
        return thread_count(self.workspace.config.simulation)

    def clients_per_block(self, clients: int) -> int:
        """Clients per block in an exchange with `clients` clients, see `blocks.choose_size`."""
        size, wanted = (
            choose_size(self.workspace, clients, self.workers, free, self.threads)
            for free in (self._free_bytes, math.inf)
        )
        if size < wanted and size not in self._told:
            self._told.add(size)
            log.warning(
                "blocks of %d clients instead of %d, to fit %.1f GB of free memory per process; "
                "simulation.clients_per_block=%d gives the same last bits on other machines",
                size,
                wanted,
                self._free_bytes / 1e9,
                size,
            )
        return size

    def known(self, block: Sequence[Parcel]) -> dict[int, Tensors]:
        """Stored private tensors of a block's clients, by client id."""
        return {p.client: t for p in block if (t := self.private.get(p.client))}

    def keep(self, changed: Mapping[int, Tensors]) -> None:
        """Take back private tensors that training has changed."""
        for client, tensors in changed.items():
            self.private.put(client, tensors)

    @abstractmethod
    def _run_blocks(
        self, kind: str, blocks: Sequence[Sequence[Parcel]], deadline: float
    ) -> dict[int, list[bytes]]:
        """Replies of every block by its position; one that has not started by then has none."""


def run_block(
    workspace: Workspace,
    block: Sequence[Parcel],
    private: Mapping[int, Tensors],
    answer: Handler = handle,
) -> tuple[list[bytes], dict[int, Tensors]]:
    """Answer a block's messages as bytes.

    If `answer` raises, every client of the block is tried alone, so that one failing client does
    not cost the others their round.

    Args:
        workspace: what this process holds.
        block: the block's messages.
        private: private tensors of clients that have trained before, by client id.
        answer: answers the messages.

    Returns:
        Replies as bytes in the order of the block, with an error in the place of a client that
        raised, and the private tensors that training has changed.
    """
    messages = [parcel.open() for parcel in block]
    clients = [parcel.client for parcel in block]
    try:
        replies, changed = answer(workspace, clients, messages, private)
    except Exception as error:
        if len(block) > 1:
            parts = [run_block(workspace, [one], private, answer) for one in block]
            merged = {c: t for _, changed in parts for c, t in changed.items()}
            return [r for replies, _ in parts for r in replies], merged
        log.debug("client %d failed", clients[0], exc_info=True)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return [failure(messages[0], reason)], {}
    return [to_wire(r) for r in replies], changed
