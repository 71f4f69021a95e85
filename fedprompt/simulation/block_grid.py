"""What the grids of a simulation have in common: blocks of clients, bytes and private tensors.

A grid carries messages between the server and its clients. Ours implement Flower's public `Grid`,
so any Flower strategy runs on them, with one message per client. `send_and_receive` sees all
messages of a round together. It can therefore pass those of several clients, a block, to one call
of `client_app.handle`, which trains them in the same batched tensor operations.

Messages cross the grid as bytes, as they would cross a network: no object is shared by reference,
so neither side can change what the other holds, and traffic is counted on these bytes.

Private tensors stay on the clients' side of the grid, in its `private` store. They are passed to
the call that answers a block, and taken back from it; they are never part of a message.
"""

from __future__ import annotations

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

from flwr.app import Message, MessageType, RecordDict

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
from fedprompt.privacy.secure_aggregation import (
    COLLECT,
    CONFIRM,
    SETUP,
    SHARE_KEYS,
    UNMASK,
    stage_of,
)
from fedprompt.privacy.secure_aggregation.client import answer as masked_answer
from fedprompt.runtime import thread_count, use_threads
from fedprompt.runtime.device_memory import free_memory
from fedprompt.simulation.answer_block import Handler
from fedprompt.simulation.blocks import choose_size, group, refuse_large
from fedprompt.simulation.memory_store import MemoryStore
from fedprompt.simulation.step_memory import StepMemory, step_memory
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.grid")

KEY_STAGES = (SETUP, SHARE_KEYS, CONFIRM, UNMASK)
"""Stages of secure aggregation that only exchange keys; no client trains in them."""

Opener = Callable[[Config], Workspace]
"""A function that opens the workspace of a config. Another process must be able to import it."""


class PrivateStore(Protocol):
    """Where a grid stores its clients' private tensors: `MemoryStore` or `PrivateLog`."""

    def get(self, client: int) -> Tensors | None:
        """A client's tensors, without a client axis, or None before its first training."""

    def put(self, client: int, tensors: Tensors) -> None:
        """Store a client's tensors in place of those from its previous training."""


class BlockGrid(CountingGrid):
    """A grid that answers messages in blocks of clients; subclasses decide where a block runs.

    Args:
        workspace: the workspace of this process.
        private: the store of the clients' private tensors; a new `MemoryStore` if it is None.
        answer: the function that answers a block's messages. Grids with several processes pickle
            it by reference, so it must be importable.
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
        # Measured once: if it changed between rounds, so would the blocks and the last bits.
        self._free_bytes = free_memory(workspace.clip.device)
        self._told: set[int] = set()
        # By type of message: how many clients fitted after a block had been too large.
        self._fitted: dict[str, int] = {}
        # The server scores the global model in this process, and the last bits of its scores
        # depend on the number of threads as well.
        use_threads(workspace.config.simulation)
        become_server()

    def use(self, workspace: Workspace) -> None:
        """Change to another method on the same data; no client has private tensors afterwards.

        Args:
            workspace: the workspace of the other method, as `Workspace.with_method` makes it.
        """
        self._drop_graphs()
        self.workspace = workspace
        self.private = MemoryStore()
        self._secrets = {}
        # What the last method needed says nothing about this one.
        self._fitted = {}
        self.__dict__.pop("_need", None)

    def close(self) -> None:
        """Release processes and memory. The grid cannot be used afterwards."""
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        if self.workspace.graphs is not None:
            self.workspace.graphs.clear()

    # Flower's Grid

    def get_node_ids(self) -> Iterable[int]:
        """The node ids of all clients, in the order of client ids."""
        return [node_of(c) for c in range(self.workspace.num_clients)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer the messages immediately, store the replies, and return the messages' ids."""
        sent = list(messages)
        replies = list(self.send_and_receive(sent))
        ids = [m.metadata.message_id for m in sent]
        self._replies.update({r.metadata.reply_to_message_id: r for r in replies})
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to messages that were pushed earlier; each reply can be pulled once."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Answer all messages, in blocks.

        Args:
            messages: one message per client, all of one type and round.
            timeout: time limit of the whole exchange in seconds; None waits for all clients.

        Returns:
            Replies in the order of the messages. Clients whose block did not start in time are
            missing, as on Flower's own grid. `traffic` holds the bytes sent and received.
        """
        sent = list(messages)
        self.traffic = Traffic()
        if not sent:
            return []
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        kind, stage = sent[0].metadata.message_type, stage_of(sent[0])
        parcels = to_parcels(sent)
        reached = [k for k, p in enumerate(parcels) if not self._is_silent(p.client, kind, stage)]
        replies: dict[int, bytes] = {}
        if reached and stage not in KEY_STAGES:
            trained = self._in_blocks(kind, [parcels[k] for k in reached], deadline)
            replies = {reached[place]: reply for place, reply in trained.items()}
        # In the stage COLLECT the clients train in blocks as usual, and each then masks its reply.
        if stage is not None:
            asked = replies if stage == COLLECT else reached
            replies = {k: self._secured(parcels[k], replies.get(k)) for k in asked}
        # Replies are ordered by message and not by arrival, since the server's sums depend on it.
        self.traffic = Traffic(sum(p.size for p in parcels), sum(map(len, replies.values())))
        return [from_wire(replies[place]) for place in sorted(replies)]

    def _is_silent(self, client: int, kind: str, stage: str | None) -> bool:
        """Whether a client has left the round: it is `silent`, and was sent the prompts."""
        # Keys are exchanged before that.
        before = stage in (SETUP, SHARE_KEYS)
        return kind == MessageType.TRAIN and not before and client in self.silent

    def _in_blocks(self, kind: str, parcels: Sequence[Parcel], deadline: float) -> dict[int, bytes]:
        """Replies by position of their message; those of blocks not started in time are missing."""
        clients = [p.client for p in parcels]
        places = group(self.workspace, clients, self.clients_per_block(len(parcels), kind))
        blocks = [[parcels[i] for i in block] for block in places]
        answered = self._run_blocks(kind, blocks, deadline)
        return {
            place: reply
            for index, block in answered.items()
            for place, reply in zip(places[index], block, strict=True)
        }

    def _secured(self, parcel: Parcel, trained: bytes | None) -> bytes:
        """A client's reply in one stage of secure aggregation.

        The clients' keys are stored here, on the clients' side of the grid. They are not part of a
        checkpoint, so a round that is repeated after a resume uses new keys.

        Args:
            parcel: the client's message.
            trained: the client's reply after training, which it masks; None in other stages.
        """
        message, state = parcel.open(), self._secrets.setdefault(parcel.client, RecordDict())

        def train() -> Message:
            assert trained is not None
            return from_wire(trained)

        try:
            reply = masked_answer(
                self.workspace.config, message, state, train, clients=self.workspace.round_size
            )
            return to_wire(reply)
        except UserError as error:
            return failure(message, str(error))

    @property
    def workers(self) -> int:
        """The number of processes that share the clients of an exchange."""
        return 1

    @property
    def threads(self) -> int:
        """The number of CPU threads of each of these processes."""
        return thread_count(self.workspace.config.simulation)

    def clients_per_block(self, clients: int, kind: str = MessageType.TRAIN) -> int:
        """Clients per block in an exchange with `clients` clients; see `blocks.choose_size`.

        It logs a warning, once per size, if memory is the limit: a machine with more memory would
        then form other blocks, and results would differ in their last bits.

        Args:
            clients: number of clients of the exchange.
            kind: type of the messages.
        """
        size, wanted = (
            choose_size(
                self.workspace,
                clients,
                self.workers,
                free,
                self.threads,
                kind=kind,
                client_bytes=self._client_bytes(kind),
            )
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

    @cached_property
    def _need(self) -> StepMemory | None:
        """The estimate for one client. Kept, because it looks at the images of every client."""
        return step_memory(self.workspace)

    def _client_bytes(self, kind: str) -> float:
        """Estimated bytes that one client needs; 0 where blocks have a fixed size."""
        if self.workspace.config.simulation.clients_per_block:
            return 0.0
        need = self._need
        if need is None:
            return 0.0
        return need.evaluation if kind == MessageType.EVALUATE else need.training

    def check_memory(self) -> None:
        """Refuse an experiment of which not even one client fits into the free memory.

        It is not checked if `simulation.clients_per_block` is set.

        Raises:
            UserError: it names the method, what it needs, what is free and what needs less.
        """
        if self.workspace.config.simulation.clients_per_block:
            return
        if self._need is not None:
            refuse_large(self.workspace, self._need, self._free_bytes, self.workers)

    def at_once(self, kind: str) -> int | None:
        """How many clients fitted together after a block had been too large; None if none was.

        Args:
            kind: type of the messages. An evaluation needs less memory than a training.
        """
        return self._fitted.get(kind)

    def learn(self, kind: str, fitted: int | None) -> None:
        """Remember how many clients of a block fitted, for the blocks that follow.

        Args:
            kind: type of the messages.
            fitted: as in `Answered`.
        """
        if fitted is None or fitted >= self._fitted.get(kind, math.inf):
            return
        self._fitted[kind] = fitted
        log.warning(
            "a block did not fit into the memory; clients are now answered in blocks of %d "
            "(messages of type '%s'). simulation.clients_per_block=%d gives the same last bits "
            "from the first round on",
            fitted,
            kind,
            fitted,
        )

    def known(self, block: Sequence[Parcel]) -> dict[int, Tensors]:
        """The stored private tensors of a block's clients, by client id.

        Clients that have not trained before are missing; they start from `start_private`.
        """
        return {p.client: t for p in block if (t := self.private.get(p.client))}

    def keep(self, changed: Mapping[int, Tensors]) -> None:
        """Store the private tensors that training has changed."""
        for client, tensors in changed.items():
            self.private.put(client, tensors)

    @abstractmethod
    def _run_blocks(
        self, kind: str, blocks: Sequence[Sequence[Parcel]], deadline: float
    ) -> dict[int, list[bytes]]:
        """Answer all blocks.

        Args:
            kind: type of the messages.
            blocks: the messages of every block.
            deadline: no block is started after this time on the monotonic clock.

        Returns:
            The replies of every block by its position, in the order of its messages. Blocks that
            were not started in time are missing.
        """
