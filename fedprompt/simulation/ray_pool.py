"""The Ray actors of a grid: how they start, fail and are replaced."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import ray

from fedprompt.config.schema import Config, SimulationConfig
from fedprompt.errors import UserError
from fedprompt.simulation.block_grid import Opener
from fedprompt.simulation.ray_cluster import brief
from fedprompt.simulation.ray_worker import Place, Worker

log = logging.getLogger("fedprompt.grid")

PLACE_LIMIT_S = 60.0
"""How long Ray may take to find room for a worker when no other worker is left."""
POLL_S = 1.0
"""Longest wait for a report while a worker idles or starts, in seconds."""


@dataclass
class Task:
    """A block that runs on a worker.

    Attributes:
        ref: Ray's reference to the answer.
        index: the block's position in its exchange.
        attempt: how often the block was tried before.
        expected_s: the planner's estimate of its seconds.
        started: when it was started, on the monotonic clock.
        limit: when it is given up, on the monotonic clock.
    """

    ref: Any
    index: int
    attempt: int
    expected_s: float
    started: float
    limit: float


@dataclass(eq=False)
class Slot:
    """The place of one worker, which keeps its number when another actor replaces a dead one.

    A worker is starting (`steps` are left), busy (`task` is set) or free (neither).

    Attributes:
        number: the worker's number.
        actor: the Ray actor.
        steps: references that resolve in turn: Ray has placed the actor; its workspace is open.
        since: when the actor was created or came one step further, on the monotonic clock.
        failed_starts: actors of this slot that failed to start, one after the other.
        placed: whether Ray has found room for the actor.
        place: where the worker runs; None until its workspace is open.
        task: the block that it runs.
    """

    number: int
    actor: Any
    steps: list[Any]
    since: float
    failed_starts: int = 0
    placed: bool = False
    place: Place | None = None
    task: Task | None = None

    @property
    def free(self) -> bool:
        """Whether it can take a block now."""
        return not self.steps and self.task is None

    @property
    def awaited(self) -> Any | None:
        """The reference that resolves next; None for a free worker."""
        return self.task.ref if self.task else self.steps[0] if self.steps else None


class WorkerPool:
    """The workers of one grid.

    Args:
        config: the experiment that workers open.
        opener: opens the workspace of a config in a worker; pickled by reference.
        needs_timm: whether the backbone needs timm, which costs a worker about 25 MB.

    Raises:
        UserError: a worker does not start.
    """

    def __init__(self, config: Config, opener: Opener, *, needs_timm: bool) -> None:
        self.config = config
        self.slots: list[Slot] = []
        self._opener = opener
        self._needs_timm = needs_timm
        settings = self._settings
        self._new_actor = (
            ray.remote(Worker)
            .options(
                num_cpus=settings.cpus_per_worker,
                num_gpus=settings.gpus_per_worker,
                scheduling_strategy="SPREAD" if settings.ray_address else "DEFAULT",
            )
            .remote
        )
        try:
            self.slots = [self._spawn(number) for number in range(settings.workers)]
            self._await_start()
        except BaseException:
            self.close()
            raise

    @property
    def _settings(self) -> SimulationConfig:
        return self.config.simulation

    def use(self, config: Config) -> None:
        """Change the method of all workers to that of `config`; CLIP and features stay."""
        self.config = config
        for slot in self.slots:
            # An actor runs its calls in order, so a worker that is still starting gets there too.
            slot.steps.append(slot.actor.use.remote(config.method))
            slot.since = time.monotonic()

    def close(self) -> None:
        """Stop all actors."""
        for slot in self.slots:
            ray.kill(slot.actor)
        self.slots = []

    def resolved(self, timeout: float) -> list[Slot]:
        """Workers whose awaited reference has resolved, after at most `timeout` seconds."""
        slots = {ref: s for s in self.slots if (ref := s.awaited) is not None}
        ready, _ = ray.wait(list(slots), num_returns=1, timeout=timeout)
        return [slots[ref] for ref in ready]

    def advance(self, slot: Slot) -> None:
        """Take the report of a starting worker; replace one that failed, or drop it in the end."""
        try:
            self._take_step(slot)
        except ray.exceptions.RayError as error:
            slot.failed_starts += 1
            if slot.failed_starts <= self._settings.retries:
                self.replace(slot)
                return
            log.error("a worker failed to start %d times: %s", slot.failed_starts, brief(error))
            ray.kill(slot.actor)
            self.slots.remove(slot)

    def replace(self, slot: Slot) -> None:
        """Stop the actor of a slot and start another one in its place."""
        ray.kill(slot.actor)
        self.slots[self.slots.index(slot)] = self._spawn(slot.number, slot.failed_starts)

    def check(self) -> None:
        """Refuse to wait any longer for workers.

        Raises:
            UserError: no worker is left, and none has started in time.
        """
        if all(s.steps and self._late(s) for s in self.slots):
            raise UserError(
                f"grid: no Ray worker is left and none could be started within {PLACE_LIMIT_S:g} s;"
                f" add a node with {self._room()} and resume the run."
            )

    def _spawn(self, number: int, failed_starts: int = 0) -> Slot:
        actor = self._new_actor(self._needs_timm)
        steps = [actor.placed.remote(), actor.open.remote(self.config, self._opener)]
        return Slot(number, actor, steps, time.monotonic(), failed_starts)

    def _await_start(self) -> None:
        """Wait for all workers. The first that fails ends the start with its reason."""
        while starting := [s for s in self.slots if s.steps]:
            late = [s for s in starting if self._late(s)]
            if late:
                raise UserError(
                    f"grid: {len(late)} of {len(self.slots)} Ray workers did not start within "
                    f"{self._start_limit(late[0]):g} s; is there room for {self._room()} each?"
                )
            for slot in self.resolved(POLL_S):
                try:
                    self._take_step(slot)
                except ray.exceptions.RayError as error:
                    raise UserError(f"grid: Ray workers did not start: {brief(error)}") from None

    @staticmethod
    def _take_step(slot: Slot) -> None:
        """Note that a starting worker has come one step further."""
        result = ray.get(slot.steps[0])
        del slot.steps[0]
        slot.placed, slot.since = True, time.monotonic()
        if isinstance(result, Place):
            slot.place = result

    def _late(self, slot: Slot) -> bool:
        return time.monotonic() - slot.since > self._start_limit(slot)

    def _start_limit(self, slot: Slot) -> float:
        # An actor without room may wait for ever. Once placed, it may have images to encode.
        return self._settings.block_timeout_s if slot.placed else PLACE_LIMIT_S

    def _room(self) -> str:
        gpus = self._settings.gpus_per_worker
        extra = f" and {gpus:g} GPUs" if gpus else ""
        return f"{self._settings.cpus_per_worker:g} free CPUs{extra}"
