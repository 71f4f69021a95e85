"""Do the runs of a sweep that are not finished: in this process, or on Ray workers.

Every worker is one process that does a run at a time and keeps backbone and data sets open; runs
of the same ones come to the same worker where that is possible. A worker that dies is replaced and
its run goes on from its checkpoint. Each run computes what `fedprompt run` on its config computes,
bit for bit.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprompt.config.schema import SimulationConfig, to_dict
from fedprompt.errors import UserError
from fedprompt.experiment.workspaces import ResourceCache
from fedprompt.reports.compare.names import PLAN
from fedprompt.simulation.blocks import free_memory
from fedprompt.simulation.ray_cluster import start_ray
from fedprompt.sweeps.live import Board
from fedprompt.sweeps.plan import PlannedRun, Resources
from fedprompt.sweeps.worker import Outcome, SweepWorker, complete

RETRIES = 2
"""How often a run whose process died is tried again."""
POLL_S = 1.0


def places_here(resources: Resources, runs: int, most: int | None = None) -> int:
    """How many runs this machine can do at once, at least one.

    Raises:
        UserError: runs want GPUs and there are none.
    """
    import torch

    room = [max(1, runs), _fits(available_cpus(), resources.cpus)]
    if most is not None:
        room.append(most)
    if resources.gpus:
        gpus = torch.cuda.device_count()
        if not gpus:
            raise UserError("sweep: resources.gpus is set, but PyTorch sees no GPU.")
        room.append(_fits(gpus, resources.gpus))
    if resources.memory_gb:
        room.append(_fits(free_memory(torch.device("cpu")), resources.memory_gb * 1e9))
    return max(1, min(room))


def available_cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_serial(todo: Sequence[PlannedRun], board: Board) -> None:
    """One run after the other in this process."""
    import torch

    resources, threads = ResourceCache(), torch.get_num_threads()
    for run in todo:
        board.start(run)
        board.finish(run, complete(run.config, resources, threads).failure)


def check_inline(todo: Sequence[PlannedRun]) -> None:
    """Refuse runs that would start Ray actors of their own beside those of the sweep.

    Raises:
        UserError: one of them has `simulation.kind=ray`.
    """
    for run in todo:
        if run.config.simulation.kind == "ray":
            raise UserError(
                f"sweep: {run.name} has simulation.kind=ray; runs of a sweep share the cores among "
                "them. Set simulation.kind=inline, or do one run after the other with --serial."
            )


@dataclass(eq=False)
class _Slot:
    """One worker: starting (`ref` is its first answer), busy (`run`) or free (neither)."""

    actor: Any
    ref: Any = None
    run: PlannedRun | None = None
    last: str = ""


class RaySweep:
    """Runs on Ray workers, on this machine or a cluster.

    Args:
        todo: the runs, each with its folder.
        board: told what happens.
        resources: of one run.
        places: workers on this machine; on a cluster, the most.
        address: a Ray cluster to join; its nodes must share the sweep's folder.
        out: the sweep's folder, with its plan.
    """

    def __init__(
        self,
        todo: Sequence[PlannedRun],
        board: Board,
        resources: Resources,
        *,
        places: int | None,
        address: str | None,
        out: Path,
    ) -> None:
        self._todo = list(todo)
        self._board = board
        self._resources = resources
        self._places = places
        self._address = address
        self._marker = str((out / PLAN).absolute())
        self._deaths: Counter[str] = Counter()
        self._slots: list[_Slot] = []

    def run(self) -> None:
        """Do all runs; every one of them ends on the board.

        Raises:
            UserError: Ray or its workers do not start.
        """
        import ray

        started = not ray.is_initialized()
        if started:
            start_ray(self._ray_config())
        try:
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

    def _ray_config(self) -> SimulationConfig:
        return SimulationConfig(
            kind="ray",
            workers=self._places or 1,
            cpus_per_worker=self._resources.cpus,
            gpus_per_worker=self._resources.gpus,
            ray_address=self._address,
        )

    def _spawn(self) -> _Slot:
        import ray

        options: dict[str, Any] = {
            "num_cpus": self._resources.cpus,
            "num_gpus": self._resources.gpus,
            "scheduling_strategy": "SPREAD" if self._address else "DEFAULT",
        }
        if self._resources.memory_gb:
            options["memory"] = int(self._resources.memory_gb * 1e9)
        actor = ray.remote(SweepWorker).options(**options).remote()
        return _Slot(actor, actor.placed.remote(os.getcwd(), self._marker))

    def _dispatch(self) -> None:
        """Give every free worker a run, if possible of the backbone and data that it has open."""
        import torch

        for slot in self._slots:
            if slot.ref is not None or not self._todo:
                continue
            elsewhere = {s.last for s in self._slots if s is not slot}
            run = min(
                self._todo,
                key=lambda r: (_parts(r) != slot.last, _parts(r) in elsewhere),
            )
            self._todo.remove(run)
            slot.run, slot.last = run, _parts(run)
            slot.ref = slot.actor.run.remote(to_dict(run.config), torch.get_num_threads())
            self._board.start(run)

    def _collect(self) -> None:
        """Wait for a worker to report, a second at most, and take what it says."""
        import ray

        slots = {slot.ref: slot for slot in self._slots if slot.ref is not None}
        ready, _ = ray.wait(list(slots), num_returns=1, timeout=POLL_S)
        for ref in ready:
            slot = slots[ref]
            run, slot.run, slot.ref = slot.run, None, None
            try:
                answer = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                if run is None:
                    self._drop(slot, error)
                else:
                    self._board.finish(run, _brief(error))
            except ray.exceptions.RayError as error:
                self._replace(slot, run, error)
            else:
                if run is not None and isinstance(answer, Outcome):
                    self._board.finish(run, answer.failure)

    def _drop(self, slot: _Slot, error: BaseException) -> None:
        """A worker on a machine that cannot take part."""
        import ray

        if isinstance(getattr(error, "cause", None), FileNotFoundError):
            reason = f"a node does not see {self._marker}; all nodes must share that folder"
        else:
            reason = f"a worker did not start: {_brief(error)}"
        ray.kill(slot.actor)
        self._slots.remove(slot)
        if not self._slots:
            raise UserError(f"sweep: {reason}.")
        self._board.say(f"left out: {reason}")

    def _replace(self, slot: _Slot, run: PlannedRun | None, error: BaseException) -> None:
        """A worker's process died; what it did is tried again in another one."""
        import ray

        ray.kill(slot.actor)
        name = run.name if run else ""
        self._deaths[name] += 1
        if self._deaths[name] > RETRIES:
            reason = f"its process died {self._deaths[name]} times: {_brief(error)}"
            if run is None:
                raise UserError(f"sweep: workers do not start: {_brief(error)}")
            self._board.finish(run, reason)
        elif run is not None:
            self._board.wait(run, "its process died")
            self._todo.insert(0, run)
        self._slots[self._slots.index(slot)] = self._spawn()


def _parts(run: PlannedRun) -> str:
    """What a worker keeps open for a run."""
    return f"{run.config.backbone!r} {run.config.data!r}"


def _fits(there: float, each: float) -> int:
    """How many shares of `each` there are; fractions do not reach over two of a kind."""
    if 0 < each < 1 and there >= 1:
        return int(there) * int(1 / each + 1e-9)
    return int(there / each + 1e-9)


def _room(nodes: Sequence[dict[str, Any]], resources: Resources) -> int:
    """How many runs the living nodes of a cluster can do at once."""
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


def _brief(error: BaseException) -> str:
    """The end of a long error, which for Ray's is the reason, on one line."""
    return " ".join(str(error).replace("^", "").split())[-300:]
