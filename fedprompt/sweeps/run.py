"""Executes the unfinished runs of a sweep, in this process or on Ray workers.

Every worker is a process that executes one run at a time and keeps backbone and data sets open.
Runs that use the same ones go to the same worker where possible. A worker whose process dies is
replaced, and its run continues from its checkpoint. Each run gives the same numbers, bit for bit,
as `fedprompt run` with the same config.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprompt.config.schema import SimulationConfig, to_dict
from fedprompt.errors import UserError
from fedprompt.experiment.workspaces import ResourceCache
from fedprompt.runtime.device_memory import free_memory
from fedprompt.runtime.machine import cpu_count
from fedprompt.simulation.ray_cluster import brief, start_ray
from fedprompt.sweeps.gpus import only_cards, roomy_cards, use_roomiest_card, with_gpus
from fedprompt.sweeps.live import Board
from fedprompt.sweeps.plan import PlannedRun, Resources
from fedprompt.sweeps.queue import take
from fedprompt.sweeps.worker import Outcome, SweepWorker, complete

RETRIES = 2
"""How many times a run is tried again after its process has died."""
POLL_S = 1.0
"""How many seconds to wait for a worker before free workers are served again."""


def places_here(resources: Resources, runs: int, most: int | None = None) -> int:
    """Return how many runs this machine can execute at the same time.

    Args:
        resources: What one run needs, its GPUs decided by `gpus.with_gpus`.
        runs: How many runs there are to execute.
        most: An upper limit given by the user; None means no limit.

    Returns:
        At least 1, even if one run alone needs more than the machine has.
    """
    import torch

    room = [max(1, runs), _fits(cpu_count(), resources.cpus)]
    if most is not None:
        room.append(most)
    if resources.gpus:
        room.append(_fits(len(roomy_cards()), resources.gpus))
    if resources.memory_gb:
        room.append(_fits(free_memory(torch.device("cpu")), resources.memory_gb * 1e9))
    return max(1, min(room))


def run_serial(todo: Sequence[PlannedRun], board: Board) -> None:
    """Execute the runs one after the other in this process, recording the outcomes on the board."""
    import torch

    # Read before the first run changes it: every run starts with the same number of threads.
    resources, threads = ResourceCache(), torch.get_num_threads()
    use_roomiest_card()
    left = list(todo)
    while left:
        run = take(left, board)
        if run is None:
            # The other process may end without completing them.
            time.sleep(POLL_S if left else 0)
            continue
        board.start(run)
        outcome = complete(run.config, resources, threads)
        if outcome.busy:
            board.defer(run)
            left.append(run)
        else:
            board.finish(run, outcome.failure)


def check_inline(todo: Sequence[PlannedRun]) -> None:
    """Refuse runs that would start their own Ray actors while the sweep's workers occupy the cores.

    Raises:
        UserError: One of the runs has `simulation.kind=ray`.
    """
    for run in todo:
        if run.config.simulation.kind == "ray":
            raise UserError(
                f"sweep: {run.name} has simulation.kind=ray; runs of a sweep share the cores among "
                "them. Set simulation.kind=inline, or do one run after the other with --serial."
            )


@dataclass(eq=False)
class _Slot:
    """One worker and what it is doing.

    `ref` is the pending Ray call, None if the worker is free. `run` is the run that it executes,
    None while the worker starts. `last` names the backbone and data of its latest run.
    """

    actor: Any
    ref: Any = None
    run: PlannedRun | None = None
    last: str = ""


class RaySweep:
    """Executes runs on Ray workers, on this machine or on a cluster.

    Args:
        todo: The runs, each with its own folder.
        board: Receives the start and the outcome of every run.
        resources: What one run needs.
        places: The number of workers on this machine; on a cluster, their maximum, or None.
        address: The address of a Ray cluster to join, whose nodes must share the sweep's folder;
            None starts Ray on this machine.
        plan: The file that holds the plan; every node must see it.
    """

    def __init__(
        self,
        todo: Sequence[PlannedRun],
        board: Board,
        resources: Resources,
        *,
        places: int | None,
        address: str | None,
        plan: Path,
    ) -> None:
        self._todo = list(todo)
        self._board = board
        self._resources = resources
        self._places = places
        self._address = address
        self._marker = str(plan.absolute())
        self._deaths: Counter[str] = Counter()
        self._slots: list[_Slot] = []

    def run(self) -> None:
        """Execute all runs and record every outcome on the board.

        Raises:
            UserError: Ray or its workers do not start.
        """
        import ray

        started = not ray.is_initialized()
        if started:
            self._start_ray()
        try:
            if self._address:
                total = sum(n["Resources"].get("GPU", 0) for n in ray.nodes() if n["Alive"])
                self._resources = with_gpus(self._resources, self._todo, int(total))
            wanted = self._places if not self._address else _room(ray.nodes(), self._resources)
            count = min(len(self._todo), wanted or 1, self._places or len(self._todo))
            self._slots = [self._spawn() for _ in range(max(1, count))]
            while self._todo or any(slot.run for slot in self._slots):
                self._dispatch()
                self._collect()
        finally:
            for slot in self._slots:
                ray.kill(slot.actor)
            if started:
                ray.shutdown()

    def _start_ray(self) -> None:
        config = SimulationConfig(
            kind="ray",
            workers=self._places or 1,
            cpus_per_worker=self._resources.cpus,
            ray_address=self._address,
        )
        if self._address or not self._resources.gpus:
            start_ray(config)
            return
        chosen = roomy_cards()
        # Ray reads the variable when it starts, and deals these cards out to its actors.
        with only_cards(chosen):
            start_ray(config, gpus=len(chosen))

    def _spawn(self) -> _Slot:
        import ray

        options: dict[str, Any] = {
            "num_cpus": self._resources.cpus,
            "num_gpus": self._resources.gpus or 0,
            # Ray's default policy prefers nodes that are in use; on a cluster every node should get
            # runs.
            "scheduling_strategy": "SPREAD" if self._address else "DEFAULT",
        }
        if self._resources.memory_gb:
            options["memory"] = int(self._resources.memory_gb * 1e9)
        # No `max_restarts`: a dead worker is replaced in `_replace`, which counts deaths and
        # requeues its run.
        actor = ray.remote(SweepWorker).options(**options).remote()
        return _Slot(actor, actor.placed.remote(os.getcwd(), self._marker))

    def _dispatch(self) -> None:
        """Give every free worker a run, preferably one whose backbone and data it has open."""
        import torch

        for slot in self._slots:
            if slot.ref is not None or not self._todo:
                continue
            # Second choice: a run whose backbone and data no other worker has open either.
            elsewhere = {s.last for s in self._slots if s is not slot}
            last = slot.last
            run = take(
                self._todo,
                self._board,
                lambda r: (r.parts != last, r.parts in elsewhere),  # noqa: B023  # used at once
            )
            if run is None:
                return
            slot.run, slot.last = run, run.parts
            # The config travels as plain values and is validated by the worker, like one read from
            # a file.
            slot.ref = slot.actor.run.remote(to_dict(run.config), torch.get_num_threads())
            self._board.start(run)

    def _collect(self) -> None:
        """Wait up to `POLL_S` seconds for a worker to report, and process its answer."""
        import ray

        slots = {slot.ref: slot for slot in self._slots if slot.ref is not None}
        if not slots:  # all runs that are left are busy
            time.sleep(POLL_S)
            return
        ready, _ = ray.wait(list(slots), num_returns=1, timeout=POLL_S)
        for ref in ready:
            slot = slots[ref]
            run, slot.run, slot.ref = slot.run, None, None
            try:
                answer = ray.get(ref)
            # A RayTaskError wraps what our code raised inside the actor, which survives it. Any
            # other RayError means that the actor's process or its node is gone.
            except ray.exceptions.RayTaskError as error:
                if run is None:
                    self._drop(slot, error)
                else:
                    self._board.finish(run, brief(error))
            except ray.exceptions.RayError as error:
                self._replace(slot, run, error)
            else:
                if run is not None and isinstance(answer, Outcome) and answer.busy:
                    self._board.defer(run)
                    self._todo.append(run)
                elif run is not None and isinstance(answer, Outcome):
                    self._board.finish(run, answer.failure)

    def _drop(self, slot: _Slot, error: BaseException) -> None:
        """Remove a worker that cannot take part; raise `UserError` if it was the last one."""
        import ray

        if isinstance(getattr(error, "cause", None), FileNotFoundError):
            reason = f"a node does not see {self._marker}; all nodes must share that folder"
        else:
            reason = f"a worker did not start: {brief(error)}"
        ray.kill(slot.actor)
        self._slots.remove(slot)
        if not self._slots:
            raise UserError(f"sweep: {reason}.")
        self._board.say(f"left out: {reason}")

    def _replace(self, slot: _Slot, run: PlannedRun | None, error: BaseException) -> None:
        """Replace a worker whose process died, and retry its run up to `RETRIES` times."""
        import ray

        ray.kill(slot.actor)
        name = run.name if run else ""
        self._deaths[name] += 1
        if self._deaths[name] > RETRIES:
            reason = f"its process died {self._deaths[name]} times: {brief(error)}"
            if run is None:
                raise UserError(f"sweep: workers do not start: {brief(error)}")
            self._board.finish(run, reason)
        elif run is not None:
            self._board.wait(run, "its process died")
            # At the front, so that it is continued before other runs with the same backbone and
            # data.
            self._todo.insert(0, run)
        self._slots[self._slots.index(slot)] = self._spawn()


def _fits(there: float, each: float) -> int:
    """Return how many runs fit, e.g. on 2 GPUs with 0.4 each: 4, as a share never spans two GPUs.

    Args:
        there: The amount that is available.
        each: The amount that one run needs.
    """
    if 0 < each < 1 and there >= 1:
        # The addend absorbs rounding errors: 0.3 / 0.1 is 2.9999999999999996 in floating point.
        return int(there) * int(1 / each + 1e-9)
    return int(there / each + 1e-9)


def _room(nodes: Sequence[dict[str, Any]], resources: Resources) -> int:
    """Return how many runs the living nodes of a Ray cluster can execute at the same time.

    Args:
        nodes: The answer of `ray.nodes()`.
        resources: What one run needs. It must fit on one node; nodes are not pooled.
    """
    total = 0
    for node in nodes:
        if not node["Alive"]:
            continue
        there = node["Resources"]
        room = [_fits(there.get("CPU", 0), resources.cpus)]
        if resources.gpus:
            room.append(_fits(there.get("GPU", 0), resources.gpus))
        if resources.memory_gb:
            room.append(_fits(there.get("memory", 0), resources.memory_gb * 1e9))
        total += min(room)
    return total
