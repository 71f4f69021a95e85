"""The Ray actors of a grid: how they are started, checked and replaced.

The pool runs in the server's process and belongs to a `RayGrid`, which decides what the workers do.
"""

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
"""How long Ray may take to find room for a worker, in seconds. Once the grid is up, it only matters
if no other worker is left."""
POLL_S = 1.0
"""Longest wait for a report while a worker is idle or starting, in seconds."""


@dataclass
class Task:
    """A block that is running on a worker.

    Attributes:
        ref: Ray's reference to the answer.
        index: the block's position in its exchange.
        attempt: how many times the block was tried before.
        expected_s: the planner's estimate of its duration in seconds.
        started: the time at which it was started, on the monotonic clock.
        limit: the time at which it is given up, on the monotonic clock.
    """

    ref: Any
    index: int
    attempt: int
    expected_s: float
    started: float
    limit: float


@dataclass(eq=False)
class Slot:
    """One worker of the pool. Its number stays the same if a new actor replaces a dead one.

    A worker is starting (`steps` is not empty), busy (`task` is set) or free (neither).

    Attributes:
        number: the worker's number.
        actor: the Ray actor.
        steps: references that resolve one after the other while the worker starts: first Ray has
            placed the actor, then its workspace is open.
        since: the time at which the actor was created or finished its last step, on the monotonic
            clock.
        failed_starts: how many actors of this slot have failed to start in a row.
        placed: whether Ray has found room for the actor.
        place: where the worker runs; None until its workspace is open.
        task: the block that it is running.
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
        """Whether the worker can take a block now."""
        return not self.steps and self.task is None

    @property
    def awaited(self) -> Any | None:
        """The reference that resolves next; None if the worker is free."""
        return self.task.ref if self.task else self.steps[0] if self.steps else None


class WorkerPool:
    """The workers of one grid.

    Args:
        config: the experiment that the workers open.
        opener: the function that opens the workspace of a config in a worker. Ray pickles it by
            reference, so it must be importable there.
        libraries: what the backbone needs of `runtime.OPTIONAL_LIBRARIES`; timm costs a worker
            about 25 MB, transformers about 20 MB.
        gpus: the GPUs that each worker reserves, at most 1.

    Raises:
        UserError: a worker does not start.
    """

    def __init__(
        self, config: Config, opener: Opener, *, libraries: frozenset[str], gpus: float = 0.0
    ) -> None:
        self.config = config
        self._gpus = gpus
        self.slots: list[Slot] = []
        self._opener = opener
        self._libraries = libraries
        settings = self._settings
        # On a cluster, SPREAD distributes the workers over the nodes; Ray's default packs them.
        self._new_actor = (
            ray.remote(Worker)
            .options(
                num_cpus=settings.cpus_per_worker,
                num_gpus=gpus,
                scheduling_strategy="SPREAD" if settings.ray_address else "DEFAULT",
            )
            .remote
        )
        try:
            self.slots = [self._spawn(number) for number in range(settings.workers)]
            self._await_start()
        except BaseException:  # also KeyboardInterrupt: actors must not outlive a failed start
            self.close()
            raise

    @property
    def _settings(self) -> SimulationConfig:
        return self.config.simulation

    def use(self, config: Config) -> None:
        """Change all workers to the method and training of `config`; they keep everything else."""
        self.config = config
        for slot in self.slots:
            # An actor runs its calls in order, so this also works for one that is still starting.
            slot.steps.append(slot.actor.use.remote(config.method, config.training))
            slot.since = time.monotonic()

    def close(self) -> None:
        """Stop all workers."""
        for slot in self.slots:
            ray.kill(slot.actor)
        self.slots = []

    def resolved(self, timeout: float) -> list[Slot]:
        """Wait until a worker reports.

        Args:
            timeout: longest wait in seconds.

        Returns:
            The workers whose awaited reference has resolved; none after a timeout.
        """
        slots = {ref: s for s in self.slots if (ref := s.awaited) is not None}
        ready, _ = ray.wait(list(slots), num_returns=1, timeout=timeout)
        return [slots[ref] for ref in ready]

    def advance(self, slot: Slot) -> None:
        """Process the report of a starting worker.

        A worker whose start failed is replaced, and after `simulation.retries` failures in a row
        its slot is removed. The run continues with the other workers.

        Args:
            slot: a worker whose next step has resolved.
        """
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
        """Stop the actor of a slot and start a new one in its place.

        Args:
            slot: the slot, which must not be used afterwards; the new one has its number.
        """
        ray.kill(slot.actor)
        self.slots[self.slots.index(slot)] = self._spawn(slot.number, slot.failed_starts)

    def check(self) -> None:
        """Check that there is a worker to wait for.

        Raises:
            UserError: no worker is left, and none has started in time.
        """
        # True for an empty list of slots as well, when all of them have been removed.
        if all(s.steps and self._late(s) for s in self.slots):
            raise UserError(
                f"grid: no Ray worker is left and none could be started within {PLACE_LIMIT_S:g} s;"
                f" add a node with {self._room()} and resume the run."
            )

    def _spawn(self, number: int, failed_starts: int = 0) -> Slot:
        # `placed` returns at once, so it tells when Ray has created the process. `open` may take
        # minutes, because it encodes images that no cache holds.
        actor = self._new_actor(self._libraries)
        steps = [actor.placed.remote(), actor.open.remote(self.config, self._opener)]
        return Slot(number, actor, steps, time.monotonic(), failed_starts)

    def _await_start(self) -> None:
        """Wait until all workers have started; unlike later, no failed start is retried.

        Raises:
            UserError: a worker failed, with its reason, or did not start in time.
        """
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
        """Record that a starting worker has finished a step; raises what the step raised."""
        result = ray.get(slot.steps[0])
        del slot.steps[0]
        slot.placed, slot.since = True, time.monotonic()
        if isinstance(result, Place):
            slot.place = result

    def _late(self, slot: Slot) -> bool:
        return time.monotonic() - slot.since > self._start_limit(slot)

    def _start_limit(self, slot: Slot) -> float:
        # Ray lets an actor wait for room without limit. Once placed, it may have images to encode.
        return self._settings.block_timeout_s if slot.placed else PLACE_LIMIT_S

    def _room(self) -> str:
        extra = f" and {self._gpus:g} GPUs" if self._gpus else ""
        return f"{self._settings.cpus_per_worker:g} free CPUs{extra}"
