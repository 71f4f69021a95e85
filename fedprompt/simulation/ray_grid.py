"""Blocks on persistent Ray actors, on one machine or a cluster.

The grid owns its actors. A dead one is replaced and its block tried again: every draw is keyed
and private tensors are handed in, so the result does not depend on it. Starting actors never hold
up a round; the others take over. Nothing but configs, messages and private tensors goes through
Ray: each worker maps the weights and the feature cache of its own machine.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from fedprompt.config.schema import SimulationConfig
from fedprompt.errors import UserError
from fedprompt.federation.client_app import handle
from fedprompt.messages import Parcel, failure
from fedprompt.runtime import thread_count
from fedprompt.simulation.block_grid import BlockGrid, Handler, Opener, PrivateStore
from fedprompt.simulation.blocks import work
from fedprompt.simulation.placement import Costs, next_start, remaining
from fedprompt.simulation.ray_worker import Answer, Place, Worker, pack, unpack
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.grid")

PLACE_LIMIT_S = 60.0
"""How long Ray may take to find a place for a worker where no other worker is left."""
POLL_S = 1.0
"""Longest wait before plans are made anew while a worker idles or starts."""


@dataclass
class _Task:
    """A block on its way: its position, how often it was tried, and its times."""

    ref: Any
    index: int
    attempt: int
    expected_s: float
    started: float
    limit: float


@dataclass(eq=False)
class _Slot:
    """One worker: starting (`steps` are left), busy (`task`) or free (neither).

    `steps` resolve one after the other: the worker has a place, it has opened its workspace.
    """

    number: int
    actor: Any
    steps: list[Any]
    since: float
    failed_starts: int = 0
    placed: bool = False
    place: Place | None = None
    task: _Task | None = None

    @property
    def free(self) -> bool:
        """Whether it can take a block now."""
        return not self.steps and self.task is None

    @property
    def awaited(self) -> Any | None:
        """The reference that resolves next; None for a free worker."""
        return self.task.ref if self.task else self.steps[0] if self.steps else None


@dataclass
class _Exchange:
    """One `send_and_receive`: blocks with their work, those that wait and those answered.

    `waiting` holds (position, earlier tries), most work first.
    """

    kind: str
    blocks: Sequence[Sequence[Parcel]]
    units: list[int]
    deadline: float
    waiting: list[tuple[int, int]]
    done: dict[int, list[bytes]] = field(default_factory=dict)


class RayGrid(BlockGrid):
    """Blocks spread over Ray actors that each hold the frozen CLIP.

    A block that exceeds `simulation.block_timeout_s` is given up with its worker, and its clients
    are left out of the round.

    Raises:
        UserError: Ray or its workers do not start; later, no worker is left and none starts.
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
        self._opener = opener
        config = workspace.config.simulation
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            start_ray(config)
        self._new_actor = (
            ray.remote(Worker)
            .options(
                num_cpus=config.cpus_per_worker,
                num_gpus=config.gpus_per_worker,
                scheduling_strategy="SPREAD" if config.ray_address else "DEFAULT",
            )
            .remote
        )
        self._costs = Costs()
        self._slots: list[_Slot] = []
        try:
            self._slots = [self._spawn(number) for number in range(config.workers)]
            self._await_start()
        except BaseException:
            self.close()
            raise
        self._free_bytes = _free_per_worker([s.place for s in self._slots if s.place])

    @property
    def workers(self) -> int:
        """Workers that the config asks for, so that blocks do not depend on a fault."""
        return self.workspace.config.simulation.workers

    @property
    def threads(self) -> int:
        """CPU threads of a worker."""
        return thread_count(self.workspace.config.simulation, worker=True)

    def pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [s.place.pid for s in self._slots if s.place]

    def use(self, workspace: Workspace) -> None:
        """Go on with another method; workers keep their CLIP and features."""
        super().use(workspace)
        self._costs = Costs()
        for slot in self._slots:
            # Calls of an actor run in order: one that is still starting comes to this one later.
            slot.steps.append(slot.actor.use.remote(workspace.config.method))
            slot.since = time.monotonic()

    def close(self) -> None:
        """Stop the actors, and Ray where this grid has started it."""
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots = []
        if self._started_ray and ray.is_initialized():
            ray.shutdown()

    def _spawn(self, number: int, failed_starts: int = 0) -> _Slot:
        actor = self._new_actor(self.workspace.clip.needs_timm)
        steps = [
            actor.placed.remote(),
            actor.open.remote(self.workspace.config, self._opener),
        ]
        return _Slot(number, actor, steps, time.monotonic(), failed_starts)

    def _await_start(self) -> None:
        """Wait for all workers; the first reason why one does not start ends it."""
        while starting := [s for s in self._slots if s.steps]:
            late = [s for s in starting if self._late(s)]
            if late:
                raise UserError(
                    f"grid: {len(late)} of {len(self._slots)} Ray workers did not start within "
                    f"{self._start_limit(late[0]):g} s; is there room for {self._room()} each?"
                )
            for slot in self._resolved(POLL_S):
                try:
                    self._take_step(slot)
                except ray.exceptions.RayError as error:
                    raise UserError(f"grid: Ray workers did not start: {_brief(error)}") from None

    def _run_blocks(
        self, kind: str, blocks: Sequence[Sequence[Parcel]], deadline: float
    ) -> dict[int, list[bytes]]:
        units = [sum(work(self.workspace, kind, p.client) for p in c) for c in blocks]
        order = sorted(range(len(blocks)), key=lambda i: -units[i])
        exchange = _Exchange(kind, blocks, units, deadline, [(i, 0) for i in order])
        while True:
            self._dispatch(exchange)
            running = [s.task for s in self._slots if s.task]
            if not running and (not exchange.waiting or time.monotonic() >= deadline):
                return exchange.done
            self._check_workers()
            for slot in self._resolved(self._pause(exchange, running)):
                if slot.task:
                    self._collect(exchange, slot, slot.task)
                else:
                    self._start(slot)
            for slot in [s for s in self._slots if s.task and time.monotonic() >= s.task.limit]:
                assert slot.task is not None
                self._give_up(exchange, slot.task.index, "time limit exceeded")
                self._replace(slot)

    def _dispatch(self, exchange: _Exchange) -> None:
        """Start waiting blocks on free workers, as far as that is the best to do."""
        while exchange.waiting and (now := time.monotonic()) < exchange.deadline:
            plan = next_start(
                (exchange.units[index] for index, _ in exchange.waiting),
                [s.number for s in self._slots if s.free],
                {
                    s.number: remaining(s.task.expected_s, now - s.task.started)
                    for s in self._slots
                    if s.task
                },
                lambda worker, units: self._costs.seconds(exchange.kind, worker, units),
            )
            if plan is None:
                return
            index, attempt = exchange.waiting.pop(plan[0])
            slot = next(s for s in self._slots if s.number == plan[1])
            block = exchange.blocks[index]
            slot.task = _Task(
                ref=slot.actor.run.remote(block, pack(self.known(block)), self.answer),
                index=index,
                attempt=attempt,
                expected_s=self._costs.seconds(exchange.kind, slot.number, exchange.units[index]),
                started=now,
                limit=min(
                    exchange.deadline, now + self.workspace.config.simulation.block_timeout_s
                ),
            )

    def _collect(self, exchange: _Exchange, slot: _Slot, task: _Task) -> None:
        """Take a block's replies, or have it tried again where its worker died."""
        try:
            answer: Answer = ray.get(task.ref)
        except ray.exceptions.RayError as error:
            # An error raised in the worker leaves it alive, one about the worker does not.
            alive = isinstance(error, ray.exceptions.RayTaskError)
            what = "failed" if alive else "died"
            if task.attempt < self.workspace.config.simulation.retries:
                log.warning("a worker %s; its block is tried again: %s", what, _brief(error))
                exchange.waiting.append((task.index, task.attempt + 1))
                exchange.waiting.sort(key=lambda item: -exchange.units[item[0]])
            else:
                log.error("a block was lost %d times: %s", task.attempt + 1, _brief(error))
                self._give_up(exchange, task.index, f"its worker {what}")
            if alive:
                slot.task = None
            else:
                self._replace(slot)
            return
        slot.task, slot.failed_starts = None, 0
        self._costs.record(exchange.kind, slot.number, exchange.units[task.index], answer.seconds)
        self.keep(unpack(answer.changed))
        exchange.done[task.index] = answer.replies

    def _give_up(self, exchange: _Exchange, index: int, reason: str) -> None:
        """Answer for the clients of a block that cannot."""
        block = exchange.blocks[index]
        log.error("clients %s: %s", [p.client for p in block], reason)
        exchange.done[index] = [failure(parcel.open(), reason) for parcel in block]

    def _pause(self, exchange: _Exchange, running: Sequence[_Task]) -> float:
        """Seconds until something must be done even if no worker reports."""
        ends = [task.limit for task in running]
        ends += [exchange.deadline] if exchange.waiting else []
        steady = all(s.task for s in self._slots) or not exchange.waiting
        left = min(ends, default=math.inf) - time.monotonic()
        return max(0.0, min(left, 60.0 if steady else POLL_S))

    # Workers that start, fail and are replaced

    def _resolved(self, timeout: float) -> list[_Slot]:
        """Workers of which the awaited reference is there, after at most `timeout` seconds."""
        slots = {ref: s for s in self._slots if (ref := s.awaited) is not None}
        ready, _ = ray.wait(list(slots), num_returns=1, timeout=timeout)
        return [slots[ref] for ref in ready]

    @staticmethod
    def _take_step(slot: _Slot) -> None:
        """Note that a starting worker has come one step further."""
        result = ray.get(slot.steps[0])
        del slot.steps[0]
        slot.placed, slot.since = True, time.monotonic()
        if isinstance(result, Place):
            slot.place = result

    def _start(self, slot: _Slot) -> None:
        """A starting worker reports: it comes further, is started anew or, in the end, dropped."""
        try:
            self._take_step(slot)
        except ray.exceptions.RayError as error:
            slot.failed_starts += 1
            if slot.failed_starts <= self.workspace.config.simulation.retries:
                self._replace(slot)
                return
            log.error("a worker failed to start %d times: %s", slot.failed_starts, _brief(error))
            ray.kill(slot.actor)
            self._slots.remove(slot)

    def _replace(self, slot: _Slot) -> None:
        ray.kill(slot.actor)
        self._costs.forget(slot.number)
        self._slots[self._slots.index(slot)] = self._spawn(slot.number, slot.failed_starts)

    def _check_workers(self) -> None:
        """Raise where no worker is left and none starts."""
        if all(s.steps and self._late(s) for s in self._slots):
            raise UserError(
                f"grid: no Ray worker is left and none could be started within {PLACE_LIMIT_S:g} s;"
                f" add a node with {self._room()} and resume the run."
            )

    def _late(self, slot: _Slot) -> bool:
        return time.monotonic() - slot.since > self._start_limit(slot)

    def _start_limit(self, slot: _Slot) -> float:
        return self.workspace.config.simulation.block_timeout_s if slot.placed else PLACE_LIMIT_S

    def _room(self) -> str:
        config = self.workspace.config.simulation
        gpus = f" and {config.gpus_per_worker:g} GPUs" if config.gpus_per_worker else ""
        return f"{config.cpus_per_worker:g} free CPUs{gpus}"


def start_ray(config: SimulationConfig) -> None:
    """Start Ray on this machine, or join the cluster at `simulation.ray_address`.

    Raises:
        UserError: neither can be done.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # An actor without GPUs would otherwise be made to see none; this silences Ray's notice.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if config.ray_address:
        options["address"] = config.ray_address
    else:
        cpus = math.ceil(config.workers * config.cpus_per_worker)
        # "local": its own Ray, also where another one runs on this machine.
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        if config.gpus_per_worker > 0 and not torch.cuda.is_available():
            raise UserError("simulation.gpus_per_worker is set, but PyTorch sees no GPU.")
    try:
        ray.init(**options)
    except Exception as error:
        where = config.ray_address or "this machine"
        raise UserError(f"grid: cannot start or join Ray on {where}: {_brief(error)}") from None


def _free_per_worker(places: Sequence[Place]) -> float:
    """Free bytes of the worker that has the fewest, where workers share a memory evenly."""
    sharing = Counter(place.memory for place in places)
    return min(place.free_bytes / sharing[place.memory] for place in places)


def _brief(error: BaseException) -> str:
    """The end of a long error, which for Ray's is the reason, on one line."""
    return " ".join(str(error).replace("^", "").split())[-300:]
