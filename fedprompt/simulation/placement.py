"""Which block to start next, and on which worker: longest first, by measured seconds.

The Ray grid uses it on the server. It affects only the time of a round, never a result. Compared
with plain longest-first placement, the planner shortens a round by up to 28 % if workers differ in
speed (two of eight workers four times slower, two blocks each), by 3 to 5 % with half-speed
workers, and not at all if all workers are equally fast: `python scripts/bench.py placement`, which
simulates both rules.

A worker can be named by any hashable value.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

W = TypeVar("W", bound=Hashable)

NEWEST = 0.3
"""Weight of the newest measurement in the exponential moving average."""


class Costs:
    """Measured seconds per unit of work, by kind of message and worker."""

    def __init__(self) -> None:
        self._rates: dict[tuple[str, Hashable], float] = {}

    def record(self, kind: str, worker: Hashable, units: float, seconds: float) -> None:
        """Record a measurement.

        Args:
            kind: type of the messages.
            worker: the worker that answered them.
            units: the work of the block; see `blocks.work`.
            seconds: the time that the worker took.
        """
        rate = seconds / max(units, 1e-9)
        last = self._rates.get((kind, worker))
        self._rates[kind, worker] = rate if last is None else last + NEWEST * (rate - last)

    def forget(self, worker: Hashable) -> None:
        """Drop all measurements of a worker whose process has been replaced."""
        self._rates = {key: rate for key, rate in self._rates.items() if key[1] != worker}

    def seconds(self, kind: str, worker: Hashable, units: float) -> float:
        """Estimate the time of a block on a worker.

        A worker without measurements is expected to be as fast as the mean of the others.

        Args:
            kind: type of the messages. Training and evaluation differ in cost per image.
            worker: the worker.
            units: the work of the block.

        Returns:
            Expected seconds. Before the first measurement of a kind, a unit counts as one second
            on all workers, which still orders blocks by their work.
        """
        rate = self._rates.get((kind, worker))
        if rate is None:
            known = [r for (k, _), r in self._rates.items() if k == kind]
            rate = sum(known) / len(known) if known else 1.0
        return units * rate


def remaining(expected_s: float, elapsed_s: float) -> float:
    """Estimate how many more seconds a running block needs.

    Args:
        expected_s: expected seconds of the whole block.
        elapsed_s: seconds since it was started.

    Returns:
        The rest of the expected time. A block that is already late is expected to need as long
        again as it has taken so far.
    """
    return expected_s - elapsed_s if elapsed_s < expected_s else elapsed_s


def next_start(
    waiting: Iterable[float],
    free: Sequence[W],
    busy: Mapping[W, float],
    seconds: Callable[[W, float], float],
) -> tuple[int, W] | None:
    """Choose a block to start now, and the free worker to start it on.

    The waiting blocks are planned in order, each on the worker that would finish it soonest. If
    that is a busy worker, the block waits for it, and the next block is planned.

    Args:
        waiting: units of work of the waiting blocks, in descending order.
        free: the workers that can start a block now.
        busy: the seconds until each other worker is free.
        seconds: the function that estimates a worker's seconds for a number of units.

    Returns:
        The block's position in `waiting` and the worker, or None if it is better to wait.
    """
    if not free:
        return None
    at = {**dict.fromkeys(free, 0.0), **busy}
    for index, units in enumerate(waiting):
        ends = {worker: start + seconds(worker, units) for worker, start in at.items()}
        # Of two workers that would finish at the same time, prefer the one that can start now.
        best = min(ends, key=lambda worker: (ends[worker], at[worker]))
        if best in free:
            return index, best
        # Only planned: the block stays in the queue until this busy worker is free.
        at[best] = ends[best]
    return None
