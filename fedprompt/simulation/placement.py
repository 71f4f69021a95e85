"""Which block to start next, and on which worker: longest first, by measured seconds.

Nothing here changes a result, only how soon it is there. Beside plain longest-first placement the
planner shortens a round by up to 28 % where workers differ in speed (two of eight workers four
times slower, two blocks each), by 3 to 5 % with half-speed workers, and by nothing where all
are equal: `python scripts/bench.py placement`, which simulates both rules.

Workers are named by anything hashable.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

W = TypeVar("W", bound=Hashable)

NEWEST = 0.3
"""Weight of the newest measurement in the moving average."""


class Costs:
    """Measured seconds per unit of work, by kind of message and worker."""

    def __init__(self) -> None:
        self._rates: dict[tuple[str, Hashable], float] = {}

    def record(self, kind: str, worker: Hashable, units: float, seconds: float) -> None:
        """Take in a measurement.

        Args:
            kind: type of message.
            worker: who did the work.
            units: the work, see `blocks.work`.
            seconds: how long it took.
        """
        rate = seconds / max(units, 1e-9)
        last = self._rates.get((kind, worker))
        self._rates[kind, worker] = rate if last is None else last + NEWEST * (rate - last)

    def forget(self, worker: Hashable) -> None:
        """Drop what is known of a worker that another process has replaced."""
        self._rates = {key: rate for key, rate in self._rates.items() if key[1] != worker}

    def seconds(self, kind: str, worker: Hashable, units: float) -> float:
        """Expected seconds for `units` of work of one kind on a worker.

        A worker without a measurement is expected to be as fast as the mean of the others. Before
        the first measurement of a kind, a unit counts as one second on all workers.
        """
        rate = self._rates.get((kind, worker))
        if rate is None:
            known = [r for (k, _), r in self._rates.items() if k == kind]
            rate = sum(known) / len(known) if known else 1.0
        return units * rate


def remaining(expected_s: float, elapsed_s: float) -> float:
    """Seconds that a running block still needs; a late one is given as long again as so far."""
    return expected_s - elapsed_s if elapsed_s < expected_s else elapsed_s


def next_start(
    waiting: Iterable[float],
    free: Sequence[W],
    busy: Mapping[W, float],
    seconds: Callable[[W, float], float],
) -> tuple[int, W] | None:
    """The block to start now and the free worker to start it on.

    Blocks are planned in their order, each on the worker that would finish it soonest. A block
    that a busy worker would finish sooner than any free worker is left to the busy one.

    Args:
        waiting: units of work of the waiting blocks, most first.
        free: workers that can start now.
        busy: seconds until each other worker is free.
        seconds: expected seconds of a worker for a number of units.

    Returns:
        Position in `waiting` and worker, or None where it is better to wait.
    """
    if not free:
        return None
    at = {**dict.fromkeys(free, 0.0), **busy}
    for index, units in enumerate(waiting):
        ends = {worker: start + seconds(worker, units) for worker, start in at.items()}
        # Of two workers that finish at the same time, prefer the one that starts now.
        best = min(ends, key=lambda worker: (ends[worker], at[worker]))
        if best in free:
            return index, best
        at[best] = ends[best]
    return None
