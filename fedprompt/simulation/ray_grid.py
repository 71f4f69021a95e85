"""Blocks on persistent Ray actors, on one machine or a cluster; `simulation.kind: ray`.

The grid runs in the server's process and owns its actors (`ray_pool.py`). Flower's own Ray backend
never replaces a dead actor; this grid does, and runs the actor's block again. Every random draw is
keyed and private tensors are passed with the block, so the result does not depend on which worker
answers. A round does not wait for an actor that is starting while others can take its blocks.

Only configs, messages and private tensors go through Ray: every worker maps the weights and the
feature cache from files on its own machine.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import ray

from fedprompt.errors import DamagedFile, DeviceFault
from fedprompt.federation.client_app import handle
from fedprompt.messages import Parcel, failure
from fedprompt.runtime import cards, thread_count
from fedprompt.simulation.answer_block import Handler
from fedprompt.simulation.block_grid import BlockGrid, Opener, PrivateStore
from fedprompt.simulation.blocks import work
from fedprompt.simulation.placement import Costs, next_start, remaining
from fedprompt.simulation.ray_cluster import brief, free_bytes_per_worker, start_ray
from fedprompt.simulation.ray_gpus import gpus_per_worker
from fedprompt.simulation.ray_pool import POLL_S, Slot, Task, WorkerPool
from fedprompt.simulation.ray_worker import Answer, pack, unpack
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.grid")

LONGEST_WAIT_S = 60.0
"""Longest wait for a worker's report while all workers are busy, in seconds."""


@dataclass
class _Exchange:
    """The state of one call of `send_and_receive`.

    Attributes:
        kind: type of the messages.
        blocks: the messages, in blocks.
        units: the work of every block; see `blocks.work`.
        deadline: the time after which no block is started, on the monotonic clock.
        waiting: (position, earlier attempts) of the blocks that wait, most work first.
        done: the replies of every finished block by its position.
    """

    kind: str
    blocks: Sequence[Sequence[Parcel]]
    units: list[int]
    deadline: float
    waiting: list[tuple[int, int]]
    done: dict[int, list[bytes]] = field(default_factory=dict)


class RayGrid(BlockGrid):
    """A grid that spreads its blocks over Ray actors, each of which holds the frozen CLIP.

    If a block exceeds `simulation.block_timeout_s`, its worker is stopped, and its clients are left
    out of the round.

    Args:
        workspace: the workspace of this process.
        private: the store of the clients' private tensors; they stay in memory if it is None.
        opener: the function that opens the workspace of a config in a worker. Ray pickles it by
            reference, so it must be importable there.
        answer: the function that answers a block's messages in a worker, pickled by reference too.

    Raises:
        UserError: Ray or its workers do not start. `send_and_receive` also raises it, if no worker
            is left and no new one starts.
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
            start_ray(workspace.config.simulation, gpus=cards.count())
        self._costs = Costs()
        try:
            self.pool = WorkerPool(
                workspace.config,
                opener,
                libraries=workspace.clip.libraries,
                gpus=gpus_per_worker(
                    workspace.config.simulation, workspace.config.backbone.device, _cluster_cards()
                ),
            )
        except BaseException:
            self._stop_ray()
            raise
        self._free_bytes = free_bytes_per_worker([s.place for s in self.pool.slots if s.place])

    @property
    def workers(self) -> int:
        """The number of workers in the config: blocks must not depend on how many are alive."""
        return self.workspace.config.simulation.workers

    @property
    def threads(self) -> int:
        """The number of CPU threads of each worker."""
        return thread_count(self.workspace.config.simulation, worker=True)

    def pids(self) -> list[int]:
        """Process ids of the workers that have opened their workspace."""
        return [s.place.pid for s in self.pool.slots if s.place]

    def use(self, workspace: Workspace) -> None:
        """Change to another method; see `BlockGrid.use`. Workers keep their CLIP and features."""
        super().use(workspace)
        # Methods differ in cost per image, so the measured rates no longer apply.
        self._costs = Costs()
        self.pool.use(workspace.config)

    def close(self) -> None:
        """Stop the actors, and also Ray if this grid started it."""
        super().close()
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
        # An event loop in one thread: start what can be started, wait until a worker reports or a
        # limit passes, and react to it.
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
        """Start waiting blocks on free workers, unless waiting for a busy worker is faster."""
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
                ref=slot.actor.run.remote(
                    block, pack(self.known(block)), self.answer, self.at_once(exchange.kind)
                ),
                index=index,
                attempt=attempt,
                expected_s=self._costs.seconds(exchange.kind, slot.number, exchange.units[index]),
                started=now,
                limit=min(
                    exchange.deadline, now + self.workspace.config.simulation.block_timeout_s
                ),
            )

    def _collect(self, exchange: _Exchange, slot: Slot, task: Task) -> None:
        """Take a block's replies, or queue the block again if its worker failed or died."""
        try:
            answer: Answer = ray.get(task.ref)
        except ray.exceptions.RayError as error:
            # A RayTaskError means that our code in the worker raised; the actor is still alive.
            # Any other RayError is treated as the loss of the actor. So is a device that the
            # actor's process can no longer use: every later block would fail there as well.
            cause = getattr(error, "cause", None)
            alive = isinstance(error, ray.exceptions.RayTaskError)
            alive = alive and not isinstance(cause, DeviceFault)
            if isinstance(cause, DamagedFile):
                raise DamagedFile(str(cause)) from None
            self._retry(exchange, task, "failed" if alive else "died", error)
            if alive:
                slot.task = None
            else:
                self._replace(slot)
            return
        # Only now the private tensors are stored. An attempt that was lost has changed nothing, so
        # its block can be repeated on any worker.
        slot.task, slot.failed_starts = None, 0
        self._costs.record(exchange.kind, slot.number, exchange.units[task.index], answer.seconds)
        self.keep(unpack(answer.changed))
        self.learn(exchange.kind, answer.fitted)
        exchange.done[task.index] = answer.replies

    def _retry(self, exchange: _Exchange, task: Task, what: str, error: Exception) -> None:
        """Queue a lost block again, or give it up after `simulation.retries` further attempts."""
        if task.attempt < self.workspace.config.simulation.retries:
            log.warning("a worker %s; its block is tried again: %s", what, brief(error))
            exchange.waiting.append((task.index, task.attempt + 1))
            exchange.waiting.sort(key=lambda item: -exchange.units[item[0]])
        else:
            log.error("a block was lost %d times: %s", task.attempt + 1, brief(error))
            self._give_up(exchange, task.index, f"its worker {what}")

    def _end_overdue(self, exchange: _Exchange) -> None:
        """Give up blocks that exceed their time limit, and replace the workers that run them."""
        for slot in list(self.pool.slots):
            if slot.task and time.monotonic() >= slot.task.limit:
                self._give_up(exchange, slot.task.index, "time limit exceeded")
                self._replace(slot)

    def _give_up(self, exchange: _Exchange, index: int, reason: str) -> None:
        """Give every client of a block an error reply with this reason."""
        block = exchange.blocks[index]
        log.error("clients %s: %s", [p.client for p in block], reason)
        exchange.done[index] = [failure(parcel.open(), reason) for parcel in block]

    def _replace(self, slot: Slot) -> None:
        # The new process may run on another machine, at another speed.
        self._costs.forget(slot.number)
        self.pool.replace(slot)

    def _pause(self, exchange: _Exchange, running: Sequence[Task]) -> float:
        """Seconds until something must be done even if no worker reports.

        The wait is short while a worker is idle or starting and blocks are waiting: the planner's
        estimates change as time passes, so an idle worker may get a block after all.
        """
        ends = [task.limit for task in running]
        ends += [exchange.deadline] if exchange.waiting else []
        steady = all(s.task for s in self.pool.slots) or not exchange.waiting
        left = min(ends, default=math.inf) - time.monotonic()
        return max(0.0, min(left, LONGEST_WAIT_S if steady else POLL_S))


def _cluster_cards() -> list[int]:
    """The number of GPUs of every living machine of the cluster."""
    return [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
