"""Progress of the runs of a sweep, read from their folders, and the estimate of the time left.

Reading files instead of asking workers gives the same answer before, during and after a sweep, and
also for `fedprompt sweep --dry-run`.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedprompt.reports.run_data import CONFIG, SUMMARY, TIMINGS
from fedprompt.sweeps.plan import PlannedRun

TAIL_BYTES = 4096
"""Bytes to read from the end of timings.jsonl; a line is much shorter."""


@dataclass(frozen=True)
class Progress:
    """The state of one run on disk.

    Attributes:
        done: Whether the run is complete, which means that it has a summary.
        begun: Whether the run folder exists and holds a config.
        rounds: Rounds recorded so far, including the evaluation before training.
        seconds: Wall time of a complete run.
        summary: The content of `summary.json` of a complete run.
    """

    done: bool
    begun: bool
    rounds: int
    seconds: float | None = None
    summary: dict[str, Any] | None = None

    def share_left(self, run: PlannedRun) -> float:
        """Return the fraction of the run's rounds that is still to do."""
        # One more than the configured rounds: `rounds` includes the evaluation before training.
        return 0.0 if self.done else 1 - self.rounds / (run.config.federation.rounds + 1)


def progress(run: PlannedRun) -> Progress:
    """Read the state of one run from its folder."""
    folder = run.folder
    begun = (folder / CONFIG).is_file()
    rounds = rounds_done(folder) if begun else 0
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        return Progress(True, True, rounds, float(summary["wall_s"]), summary)
    except (OSError, ValueError, KeyError, TypeError):
        # The run is not finished, or its summary is damaged, which the code that reads it reports.
        return Progress((folder / SUMMARY).is_file(), begun, rounds)


def rounds_done(folder: Path) -> int:
    """Return the number of rounds in timings.jsonl, including the evaluation before training."""
    try:
        with (folder / TIMINGS).open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - TAIL_BYTES))
            # The part after the last newline is a line that is still being written, or nothing.
            lines = stream.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["round"]) + 1
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return 0


def seconds_left(
    planned: Sequence[PlannedRun],
    at_once: int,
    read: Callable[[PlannedRun], Progress] = progress,
) -> float | None:
    """Estimate how long the unfinished part of a sweep will take.

    A run is expected to take as long as the finished runs of its row and grid values on average, or
    as the average of all finished runs if there are none. Runs are then assigned to places, longest
    first, and the busiest place determines the estimate.

    Args:
        planned: The runs of the sweep, finished ones included; a board leaves out failed ones.
        at_once: How many runs execute at the same time.
        read: Returns the state of a run.

    Returns:
        Seconds, or None while no run of the sweep is finished.
    """
    found = [(run, read(run)) for run in planned]
    times = [(run, p.seconds) for run, p in found if p.seconds is not None]
    if not times:
        return None
    usual = fmean(seconds for _, seconds in times)
    alike: dict[tuple[str, str], list[float]] = {}
    for run, seconds in times:
        alike.setdefault(run.point, []).append(seconds)
    means = {point: fmean(some) for point, some in alike.items()}
    left = [
        means.get(run.point, usual) * state.share_left(run)
        for run, state in found
        if not state.done
    ]
    places = [0.0] * max(1, at_once)
    for seconds in sorted(left, reverse=True):
        # The place that is free first gets the next run.
        heapq.heapreplace(places, places[0] + seconds)
    return max(places)
