"""Which block to start next, and on which worker: longest first, by measured cost.

Workers are named by anything hashable. Nothing here changes a result, only when it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

NEWEST = 0.3
"""Weight of the newest measurement in the moving average."""


class Costs:
    """Measured seconds per unit of work, by kind of message and worker."""

    def __init__(self) -> None:
        self._rates: dict[tuple[str, Hashable], float] = {}

    def record(self, kind: str, worker: Hashable, units: float, seconds: float) -> None:
        """Take in that `worker` needed `seconds` for `units` of work."""
        rate = seconds / max(units, 1e-9)
        last = self._rates.get((kind, worker))
        self._rates[kind, worker] = rate if last is None else last + NEWEST * (rate - last)

    def forget(self, worker: Hashable) -> None:
        """Drop what is known of a worker that another process has replaced."""
        self._rates = {key: rate for key, rate in self._rates.items() if key[1] != worker}

    def seconds(self, kind: str, worker: Hashable, units: float) -> float:
        """Expected seconds; for a worker without a measurement, the mean of the others.

        Before the first measurement of a kind a unit counts as one second on all workers.
        """
        rate = self._rates.get((kind, worker))
        if rate is None:
            known = [r for (k, _), r in self._rates.items() if k == kind]
            rate = sum(known) / len(known) if known else 1.0
        return units * rate


def remaining(expected_s: float, elapsed_s: float) -> float:
    """Seconds that a running block still needs; one that is late, as long again as so far."""
    return expected_s - elapsed_s if elapsed_s < expected_s else elapsed_s


def next_start(
    waiting: Iterable[float],
    free: Sequence[Hashable],
    busy: Mapping[Hashable, float],
    seconds: Callable[[Hashable, float], float],
) -> tuple[int, Hashable] | None:
    """The block to start now and the free worker to start it on.

    Blocks are planned in their order, each on the worker that would finish it soonest. One that a
    busy worker would finish sooner than any free one is left to it.

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
        # Of two workers that finish at the same time the one that starts now.
        best = min(ends, key=lambda worker: (ends[worker], at[worker]))
        if best in free:
            return index, best
        at[best] = ends[best]
    return None
