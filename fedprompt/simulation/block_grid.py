"""Where client messages run in a simulation: in this process, or on persistent Ray actors.

Both grids implement Flower's public `Grid`, so any Flower strategy runs on them, and keep one
message per client. `send_and_receive` sees a whole round at once, so it can hand the messages of
several clients (a block) to one call of `client_app.handle`. Messages cross the grid as bytes, as
they would cross a network: nothing is shared by reference, and traffic is counted on those bytes.

Private tensors stay on the client's side of the grid: in its `private` store, handed to a block's
call and taken back from it, never in a message.
"""

from __future__ import annotations

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from flwr.app import Message, RecordDict
from flwr.supercore.run import Run

from fedprompt.config.schema import Config
from fedprompt.errors import UserError
from fedprompt.federation.client_app import handle
from fedprompt.federation.grid import CountingGrid, Traffic
from fedprompt.messages import (
    Parcel,
    become_server,
    failure,
    from_wire,
    node_of,
    to_parcels,
    to_wire,
)
from fedprompt.methods.base import Tensors
from fedprompt.privacy.secure_aggregation import COLLECT, SETUP, SHARE_KEYS, UNMASK, stage_of
from fedprompt.runtime import thread_count, use_threads
from fedprompt.simulation.blocks import choose_size, free_memory, group
from fedprompt.simulation.memory_store import MemoryStore
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.grid")

KEY_STAGES = (SETUP, SHARE_KEYS, UNMASK)
"""Stages of secure aggregation in which nobody trains."""

Handler = Callable[
    [Workspace, Sequence[int], Sequence[Message], Mapping[int, Tensors]],
    tuple[list[Message], dict[int, Tensors]],
]
"""What answers a block's messages; `client_app.handle` does."""


Opener = Callable[[Config], Workspace]
"""What opens the workspace of a config in another process: an importable function."""


class PrivateStore(Protocol):
    """Where a grid keeps its clients' private tensors."""

    def get(self, client: int) -> Tensors | None:
        """A client's tensors, or None before it has trained."""

    def put(self, client: int, tensors: Tensors) -> None:
        """Keep a client's tensors."""


class BlockGrid(CountingGrid):
    """Common part of a simulation's grids: bytes, blocks, private tensors.

    Args:
        workspace: what this process holds.
        private: the clients' private tensors; a new `MemoryStore` without one.
        answer: what a client does with a message; an importable function.
    """

    def __init__(
        self,
        workspace: Workspace,
        private: PrivateStore | None = None,
        *,
        answer: Handler = handle,
    ) -> None:
        super().__init__(Run.create_empty(run_id=1))
        self.workspace = workspace
        self.private: PrivateStore = MemoryStore() if private is None else private
        self.answer = answer
        self._replies: dict[str, Message] = {}
        self._secrets: dict[int, RecordDict] = {}
        self._free_bytes = free_memory(workspace.clip.device)
        self._told: set[int] = set()
        # For the server's own scores as well: their last bits depend on it.
        use_threads(workspace.config.simulation)
        become_server()

    def use(self, workspace: Workspace) -> None:
        """Go on with another method on the same data; all private tensors start anew."""
        self.workspace = workspace
        self.private = MemoryStore()
        self._secrets = {}

    def close(self) -> None:
        """Give back what the grid holds."""

    # Flower's Grid

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of all clients, in the order of client ids."""
        return [node_of(c) for c in range(self.workspace.num_clients)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the messages at once and keep the replies; returns message ids."""
        sent = list(messages)
        replies = list(self.send_and_receive(sent))
        ids = [m.metadata.message_id for m in sent]
        self._replies.update({r.metadata.reply_to_message_id: r for r in replies})
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to earlier pushed messages."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run all messages in blocks; the order of replies is that of the messages.

        `timeout` bounds the whole exchange in seconds; clients that have not started by then are
        left out, as on Flower's own grid.
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
        """Replies by the place of their message; one that has not started by then has none."""
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
        """A client's reply in one stage of secure aggregation; `trained` is what it masks.

        The clients' keys live here, on their side of the grid, and in no checkpoint: a round that
        is repeated begins with new ones.
        """
        from fedprompt.privacy.secure_aggregation.client import answer

        message, state = parcel.open(), self._secrets.setdefault(parcel.client, RecordDict())

        def train() -> Message:
            assert trained is not None
            return from_wire(trained)

        try:
            return to_wire(answer(self.workspace.config, message, state, train))
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
        """Clients per call: as configured, else as many as fill the processor and fit in memory."""
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
        """Private tensors of those clients of a block that have trained before."""
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
    """`answer` on bytes; a client that raises gets an error reply and takes no other along."""
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
