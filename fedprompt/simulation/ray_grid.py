"""Blocks on persistent Ray actors, on one machine or a cluster.

The grid owns its actors (`ray_pool.py`). A dead actor is replaced and its block tried again. Every
random draw is keyed and private tensors are handed in, so the result does not depend on who
answers. A round never waits for an actor that is starting; the others take its blocks. Only
configs, messages and private tensors go through Ray: every worker maps the weights and the feature
cache of its own machine.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import ray

from fedprompt.federation.client_app import handle
from fedprompt.messages import Parcel, failure
from fedprompt.runtime import thread_count
from fedprompt.simulation.block_grid import BlockGrid, Handler, Opener, PrivateStore
from fedprompt.simulation.blocks import work
from fedprompt.simulation.placement import Costs, next_start, remaining
from fedprompt.simulation.ray_cluster import brief, free_bytes_per_worker, start_ray
from fedprompt.simulation.ray_pool import POLL_S, Slot, Task, WorkerPool
from fedprompt.simulation.ray_worker import Answer, pack, unpack
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.grid")

LONGEST_WAIT_S = 60.0
"""Longest wait for a report while all workers are busy, in seconds."""


@dataclass
class _Exchange:
    """One `send_and_receive`.

    Attributes:
        kind: type of its messages.
        blocks: the messages, in blocks.
        units: work of every block.
        deadline: when no further block is started, on the monotonic clock.
        waiting: (position, earlier tries) of blocks that wait, most work first.
        done: replies by position of their block.
    """

    kind: str
    blocks: Sequence[Sequence[Parcel]]
    units: list[int]
    deadline: float
    waiting: list[tuple[int, int]]
    done: dict[int, list[bytes]] = field(default_factory=dict)


class RayGrid(BlockGrid):
    """Blocks spread over Ray actors that each hold the frozen CLIP.

    A block that exceeds `simulation.block_timeout_s` is given up together with its worker, and its
    clients are left out of the round.

    Args:
        workspace: what this process holds.
        private: keeps the clients' private tensors; memory, where it is None.
        opener: opens the workspace of a config in a worker. Ray pickles it by reference, so it
            must be importable there.
        answer: answers a block's messages in a worker; pickled likewise.

    Raises:
        UserError: Ray or its workers do not start. `send_and_receive` raises it too, when no
            worker is left and none starts.
    """

    def __init__(
        self,
        workspace: Workspace,
        private: PrivateStore | None = None,
        *,
        opener: Opener,
        answer: Handler = handle,
    ) -> None:
        super().__init__(workspace, private, answer=answer)
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            start_ray(workspace.config.simulation)
        self._costs = Costs()
        try:
            self.pool = WorkerPool(workspace.config, opener, needs_timm=workspace.clip.needs_timm)
        except BaseException:
            self._stop_ray()
            raise
        self._free_bytes = free_bytes_per_worker([s.place for s in self.pool.slots if s.place])

    @property
    def workers(self) -> int:
        """Workers that the config asks for: blocks must not depend on how many are alive."""
        return self.workspace.config.simulation.workers

    @property
    def threads(self) -> int:
        """CPU threads of a worker."""
        return thread_count(self.workspace.config.simulation, worker=True)

    def pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [s.place.pid for s in self.pool.slots if s.place]

    def use(self, workspace: Workspace) -> None:
        """Change to another method; workers keep their CLIP and features."""
        super().use(workspace)
        self._costs = Costs()
        self.pool.use(workspace.config)

    def close(self) -> None:
        """Stop the actors, and Ray if this grid has started it."""
        self.pool.close()
        self._stop_ray()

    def _stop_ray(self) -> None:
        if self._started_ray and ray.is_initialized():
            ray.shutdown()

    def _run_blocks(
        self, kind: str, blocks: Sequence[Sequence[Parcel]], deadline: float
    ) -> dict[int, list[bytes]]:
        units = [sum(work(self.workspace, kind, p.client) for p in block) for block in blocks]
        order = sorted(range(len(blocks)), key=lambda i: -units[i])
        exchange = _Exchange(kind, blocks, units, deadline, [(i, 0) for i in order])
        while True:
            self._dispatch(exchange)
            running = [s.task for s in self.pool.slots if s.task]
            if not running and (not exchange.waiting or time.monotonic() >= deadline):
                return exchange.done
            self.pool.check()
            for slot in self.pool.resolved(self._pause(exchange, running)):
                if slot.task:
                    self._collect(exchange, slot, slot.task)
                else:
                    self.pool.advance(slot)
            self._end_overdue(exchange)

    def _dispatch(self, exchange: _Exchange) -> None:
        """Start waiting blocks on free workers, unless it is better to wait for a busy one."""
        while exchange.waiting and (now := time.monotonic()) < exchange.deadline:
            plan = next_start(
                (exchange.units[index] for index, _ in exchange.waiting),
                [s.number for s in self.pool.slots if s.free],
                {
                    s.number: remaining(s.task.expected_s, now - s.task.started)
                    for s in self.pool.slots
                    if s.task
                },
                lambda worker, units: self._costs.seconds(exchange.kind, worker, units),
            )
            if plan is None:
                return
            index, attempt = exchange.waiting.pop(plan[0])
            slot = next(s for s in self.pool.slots if s.number == plan[1])
            block = exchange.blocks[index]
            slot.task = Task(
                ref=slot.actor.run.remote(block, pack(self.known(block)), self.answer),
                index=index,
                attempt=attempt,
                expected_s=self._costs.seconds(exchange.kind, slot.number, exchange.units[index]),
                started=now,
                limit=min(
                    exchange.deadline, now + self.workspace.config.simulation.block_timeout_s
                ),
            )

    def _collect(self, exchange: _Exchange, slot: Slot, task: Task) -> None:
        """Take a block's replies, or have it tried again if its worker died."""
        try:
            answer: Answer = ray.get(task.ref)
        except ray.exceptions.RayError as error:
            # A RayTaskError was raised by our code in the worker, which is still alive.
            alive = isinstance(error, ray.exceptions.RayTaskError)
            self._retry(exchange, task, "failed" if alive else "died", error)
            if alive:
                slot.task = None
            else:
                self._replace(slot)
            return
        slot.task, slot.failed_starts = None, 0
        self._costs.record(exchange.kind, slot.number, exchange.units[task.index], answer.seconds)
        self.keep(unpack(answer.changed))
        exchange.done[task.index] = answer.replies

    def _retry(self, exchange: _Exchange, task: Task, what: str, error: Exception) -> None:
        """Put a lost block back into the queue, or give it up after `simulation.retries`."""
        if task.attempt < self.workspace.config.simulation.retries:
            log.warning("a worker %s; its block is tried again: %s", what, brief(error))
            exchange.waiting.append((task.index, task.attempt + 1))
            exchange.waiting.sort(key=lambda item: -exchange.units[item[0]])
        else:
            log.error("a block was lost %d times: %s", task.attempt + 1, brief(error))
            self._give_up(exchange, task.index, f"its worker {what}")

    def _end_overdue(self, exchange: _Exchange) -> None:
        """Give up blocks that are over their time limit, and the workers that run them."""
        for slot in list(self.pool.slots):
            if slot.task and time.monotonic() >= slot.task.limit:
                self._give_up(exchange, slot.task.index, "time limit exceeded")
                self._replace(slot)

    def _give_up(self, exchange: _Exchange, index: int, reason: str) -> None:
        """Answer with an error in the place of all clients of a block."""
        block = exchange.blocks[index]
        log.error("clients %s: %s", [p.client for p in block], reason)
        exchange.done[index] = [failure(parcel.open(), reason) for parcel in block]

    def _replace(self, slot: Slot) -> None:
        # Another process may run on another machine, at another speed.
        self._costs.forget(slot.number)
        self.pool.replace(slot)

    def _pause(self, exchange: _Exchange, running: Sequence[Task]) -> float:
        """Seconds until something must be done even if no worker reports."""
        ends = [task.limit for task in running]
        ends += [exchange.deadline] if exchange.waiting else []
        steady = all(s.task for s in self.pool.slots) or not exchange.waiting
        left = min(ends, default=math.inf) - time.monotonic()
        return max(0.0, min(left, LONGEST_WAIT_S if steady else POLL_S))
