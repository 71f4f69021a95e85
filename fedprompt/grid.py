"""Where client messages run in a simulation: in this process, or on persistent Ray actors.

Both grids implement Flower's public `Grid`, so any Flower strategy runs on them, and keep one
message per client. `send_and_receive` sees a whole round at once, so it can hand the messages of
several clients (a cohort) to one call of `client_app.handle`. Messages cross the grid as bytes, as
they would cross a network: nothing is shared by reference, and traffic is counted on those bytes.

Private tensors stay on the client's side of the grid: in its `private` store, handed to a cohort's
call and taken back from it, never in a message.
"""

from __future__ import annotations

import logging
import math
import os
import time
import uuid
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedprompt.client_app import handle
from fedprompt.config import Config, to_dict, validate
from fedprompt.errors import UserError
from fedprompt.methods.base import Tensors
from fedprompt.private_store import MemoryStore
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.grid")

SERVER_NODE = 1
FIRST_NODE = 1_000_000
CLIENT_FAILED = 2
"""Flower's error code for a ClientApp that raised."""
CPU_TOKENS, GPU_TOKENS = 1024, 65536
"""Text tokens per call that fill the processor; measured on 2 CPU cores, assumed on a GPU."""


def node_of(client: int) -> int:
    """The node id of a client on our grids."""
    return FIRST_NODE + client


def client_of(node: int) -> int:
    """The client that a node id of our grids stands for."""
    return node - FIRST_NODE


def to_wire(message: Message) -> bytes:
    """A message as Flower's own protobuf bytes."""
    content: bytes = message_to_proto(message).SerializeToString()
    return content


def from_wire(content: bytes) -> Message:
    """The message that `to_wire` wrote; data only, nothing is executed."""
    return message_from_proto(ProtoMessage.FromString(content))


@dataclass
class Traffic:
    """Bytes of the last exchange: `down` from the server, `up` to it."""

    down: int = 0
    up: int = 0


class CohortGrid(Grid):
    """Common part of our grids: bytes, cohorts, private tensors."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.private = MemoryStore()
        self.traffic = Traffic()
        self._replies: dict[str, Message] = {}
        self._run = Run.create_empty(run_id=1)
        if workspace.config.grid.threads:
            # For the server's own scores as well: their last bits depend on it.
            torch.set_num_threads(workspace.config.grid.threads)
        # Flower's Message takes the sender's identity from here.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SERVER_NODE, 1

    def use(self, workspace: Workspace) -> None:
        """Go on with another method on the same data; all private tensors start anew."""
        self.workspace = workspace
        self.private = MemoryStore()

    def close(self) -> None:
        """Give back what the grid holds."""

    # Flower's Grid

    def set_run(self, run: Run) -> None:
        """Set the run; simulations have one."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

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
        """Run all messages in cohorts; the order of replies is that of the messages.

        `timeout` bounds the whole exchange in seconds; clients that have not started by then are
        left out, as on Flower's own grid.
        """
        sent = list(messages)
        wires = []
        for message in sent:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            wires.append((client_of(message.metadata.dst_node_id), to_wire(message)))
        self.traffic = Traffic(down=sum(len(w) for _, w in wires))
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        size = self.cohort_size(len(wires))
        cohorts = [wires[i : i + size] for i in range(0, len(wires), size)]
        replies = [r for cohort in self._run_cohorts(cohorts, deadline) for r in cohort]
        self.traffic.up = sum(len(r) for r in replies)
        return [from_wire(r) for r in replies]

    def cohort_size(self, clients: int) -> int:
        """Clients per call: as configured, else as many as fill the processor."""
        if self.workspace.config.grid.cohort_size:
            return self.workspace.config.grid.cohort_size
        return _auto_cohort(self.workspace, clients)

    @abstractmethod
    def _run_cohorts(
        self, cohorts: Sequence[Sequence[tuple[int, bytes]]], deadline: float
    ) -> list[list[bytes]]:
        """Replies of every cohort, in order; an unfinished cohort gives none."""


class InlineGrid(CohortGrid):
    """All clients in this process, one cohort after the other."""

    def _run_cohorts(
        self, cohorts: Sequence[Sequence[tuple[int, bytes]]], deadline: float
    ) -> list[list[bytes]]:
        done = []
        for cohort in cohorts:
            if time.monotonic() > deadline:
                break
            known = {c: p for c, _ in cohort if (p := self.private.get(c))}
            replies, changed = run_cohort(self.workspace, cohort, known)
            for client, tensors in changed.items():
                self.private.put(client, tensors)
            done.append(replies)
        return done


def run_cohort(
    workspace: Workspace, cohort: Sequence[tuple[int, bytes]], private: dict[int, Tensors]
) -> tuple[list[bytes], dict[int, Tensors]]:
    """`handle` on bytes; a client that raises gets an error reply and takes no other along."""
    messages = [from_wire(content) for _, content in cohort]
    clients = [client for client, _ in cohort]
    try:
        replies, changed = handle(workspace, clients, messages, private)
    except Exception as error:
        if len(cohort) > 1:
            parts = [run_cohort(workspace, [one], private) for one in cohort]
            merged = {c: t for _, changed in parts for c, t in changed.items()}
            return [r for replies, _ in parts for r in replies], merged
        log.debug("client %d failed", clients[0], exc_info=True)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return [to_wire(Message(Error(CLIENT_FAILED, reason), reply_to=messages[0]))], {}
    return [to_wire(r) for r in replies], changed


class RayGrid(CohortGrid):
    """Cohorts spread over persistent Ray actors that each hold the frozen CLIP.

    The grid owns its actors: a dead one is replaced and its cohort tried again (results do not
    depend on it: every draw is keyed, private tensors are handed in), and one that exceeds
    `grid.cohort_timeout_s` is killed and its clients are left out of the round.
    """

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # An actor without GPUs would otherwise be made to see none; this silences Ray's notice.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray = ray
        config = workspace.config.grid
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            self._init_ray(config)
        remote = ray.remote(_Worker).options(
            num_cpus=config.cpus_per_worker, num_gpus=config.gpus_per_worker
        )
        self._new_worker = remote.remote
        self._config = to_dict(workspace.config)
        self._workers: list[Any] = []
        try:
            self._workers = [self._spawn() for _ in range(config.workers)]
            ray.get([w.ready.remote() for w in self._workers], timeout=config.cohort_timeout_s)
        except Exception as error:
            self.close()
            reason = " ".join(str(error).split())[-300:]
            raise UserError(f"grid: Ray workers did not start: {reason}") from None

    def _init_ray(self, config: Any) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if config.ray_address:
            options["address"] = config.ray_address
        else:
            cpus = math.ceil(config.workers * config.cpus_per_worker)
            options |= {"num_cpus": cpus, "include_dashboard": False}
            if config.gpus_per_worker > 0 and not torch.cuda.is_available():
                raise UserError("grid.gpus_per_worker is set, but PyTorch sees no GPU.")
        try:
            self._ray.init(**options)
        except Exception as error:
            where = config.ray_address or "this machine"
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"grid: cannot start or join Ray on {where}: {reason}") from None

    def use(self, workspace: Workspace) -> None:
        """Go on with another method; workers keep their CLIP and features."""
        super().use(workspace)
        self._config = to_dict(workspace.config)
        self._ray.get([w.use.remote(self._config) for w in self._workers])

    def cohort_size(self, clients: int) -> int:
        """As configured, else small enough that no worker idles."""
        configured = self.workspace.config.grid.cohort_size
        if configured:
            return configured
        share = math.ceil(clients / self.workspace.config.grid.workers)
        return max(1, min(share, _auto_cohort(self.workspace, clients)))

    def close(self) -> None:
        """Stop the actors, and Ray where this grid has started it."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers = []
        if self._started_ray and self._ray.is_initialized():
            self._ray.shutdown()

    def _spawn(self) -> Any:
        return self._new_worker(self._config)

    def _run_cohorts(
        self, cohorts: Sequence[Sequence[tuple[int, bytes]]], deadline: float
    ) -> list[list[bytes]]:
        ray, config = self._ray, self.workspace.config.grid
        done: dict[int, list[bytes]] = {}
        waiting = deque((i, 0) for i in range(len(cohorts)))
        free = list(range(len(self._workers)))
        running: dict[Any, tuple[int, int, int, float]] = {}
        while waiting or running:
            while waiting and free and time.monotonic() < deadline:
                index, attempt = waiting.popleft()
                slot = free.pop()
                known = {c: p for c, _ in cohorts[index] if (p := self.private.get(c))}
                ref = self._workers[slot].run.remote(list(cohorts[index]), known)
                limit = min(deadline, time.monotonic() + config.cohort_timeout_s)
                running[ref] = (index, attempt, slot, limit)
            if not running:
                break
            next_limit = min(limit for *_, limit in running.values())
            pause = min(max(0.0, next_limit - time.monotonic()), 60.0)
            finished, _ = ray.wait(list(running), num_returns=1, timeout=pause)
            for ref in finished:
                index, attempt, slot, _ = running.pop(ref)
                try:
                    replies, changed = ray.get(ref)
                except ray.exceptions.RayError as error:
                    self._workers[slot] = self._replace(self._workers[slot])
                    if attempt < config.retries:
                        log.warning("a worker died; its cohort is tried again: %s", _brief(error))
                        waiting.append((index, attempt + 1))
                    else:
                        log.error("a cohort was lost %d times: %s", attempt + 1, _brief(error))
                        done[index] = self._failures(cohorts[index], "its worker died")
                    free.append(slot)
                    continue
                for client, tensors in changed.items():
                    self.private.put(client, tensors)
                done[index] = replies
                free.append(slot)
            now = time.monotonic()
            for ref, (index, _, slot, limit) in list(running.items()):
                if now >= limit:
                    del running[ref]
                    log.error("clients %s exceeded the time limit", [c for c, _ in cohorts[index]])
                    self._workers[slot] = self._replace(self._workers[slot])
                    done[index] = self._failures(cohorts[index], "time limit exceeded")
                    free.append(slot)
        return [done[i] for i in sorted(done)]

    def _replace(self, worker: Any) -> Any:
        self._ray.kill(worker)
        return self._spawn()

    @staticmethod
    def _failures(cohort: Sequence[tuple[int, bytes]], reason: str) -> list[bytes]:
        return [
            to_wire(Message(Error(CLIENT_FAILED, reason), reply_to=from_wire(content)))
            for _, content in cohort
        ]


class _Worker:
    """A Ray actor: one process, one CLIP, any number of cohorts."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._workspace = Workspace.open(validate(config), progress=False)
        grid = self._workspace.config.grid
        torch.set_num_threads(grid.threads or max(1, int(grid.cpus_per_worker)))
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SERVER_NODE, 1

    def ready(self) -> int:
        """The worker's process id, once everything is loaded."""
        return os.getpid()

    def use(self, config: dict[str, Any]) -> None:
        """Change the method."""
        self._workspace = self._workspace.with_method(validate(config).method)

    def run(
        self, cohort: list[tuple[int, bytes]], private: dict[int, Tensors]
    ) -> tuple[list[bytes], dict[int, Tensors]]:
        """Train or test one cohort."""
        return run_cohort(self._workspace, cohort, private)


def open_grid(config: Config, workspace: Workspace) -> CohortGrid:
    """The grid that `config.grid.kind` names."""
    return RayGrid(workspace) if config.grid.kind == "ray" else InlineGrid(workspace)


def describe_nodes(grid: Grid, timeout: float) -> dict[int, int]:
    """Node id of every client, by asking all nodes which client they are.

    Raises:
        UserError: two nodes say they are the same client, or a node cannot answer.
    """
    queries = [
        Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY)
        for node in grid.get_node_ids()
    ]
    node_of_client: dict[int, int] = {}
    for reply in grid.send_and_receive(queries, timeout=timeout):
        node = reply.metadata.src_node_id
        if reply.has_error():
            reason = " ".join((reply.error.reason or "no reason given").split())
            raise UserError(f"node {node} cannot start: {reason}")
        client = int(reply.content["metrics"]["client-id"])  # type: ignore[arg-type]
        if client in node_of_client:
            raise UserError(
                f"nodes {node_of_client[client]} and {node} both say they are client {client}; "
                "give every node its own partition-id."
            )
        node_of_client[client] = node
    return node_of_client


def _auto_cohort(workspace: Workspace, clients: int) -> int:
    """As many clients as fill the processor with text tokens; results hardly depend on it."""
    names = workspace.task.class_names
    tokens_per_client = len(names) * 5 + 8
    budget = GPU_TOKENS if workspace.clip.device.type == "cuda" else CPU_TOKENS
    return max(1, min(clients, budget // tokens_per_client))


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
