"""How far the runs of a sweep are, read from their folders; and how long the rest will take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedprompt.reports.run_data import CONFIG, SUMMARY, TIMINGS
from fedprompt.sweeps.plan import PlannedRun

TAIL_BYTES = 4096
"""Enough for the last lines of timings.jsonl."""


@dataclass(frozen=True)
class Progress:
    """One run on disk: `done` complete, `begun` has a folder; rounds so far; seconds if done."""

    done: bool
    begun: bool
    rounds: int
    seconds: float | None = None
    summary: dict[str, Any] | None = None

    def share_left(self, run: PlannedRun) -> float:
        """Part of the run that is still to do."""
        return 0.0 if self.done else 1 - self.rounds / (run.config.federation.rounds + 1)


def progress(run: PlannedRun) -> Progress:
    """How far one run is."""
    folder = run.folder
    begun = (folder / CONFIG).is_file()
    rounds = rounds_done(folder) if begun else 0
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        return Progress(True, True, rounds, float(summary["wall_s"]), summary)
    except (OSError, ValueError, KeyError, TypeError):
        # Not finished; a damaged summary is for the run itself to complain about.
        return Progress((folder / SUMMARY).is_file(), begun, rounds)


def rounds_done(folder: Path) -> int:
    """Rounds in timings.jsonl, the one before training included."""
    try:
        with (folder / TIMINGS).open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - TAIL_BYTES))
            lines = stream.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["round"]) + 1
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return 0


def seconds_left(planned: Sequence[PlannedRun], at_once: int) -> float | None:
    """Expected time of what is left; None while no run of the sweep is finished.

    A run is expected to take as long as finished ones of its row and grid values do on average,
    else as long as the average of all finished ones. Runs are dealt to `at_once` places, longest
    first.
    """
    found = [(run, progress(run)) for run in planned]
    times = [(run, p.seconds) for run, p in found if p.seconds is not None]
    if not times:
        return None
    usual = fmean(seconds for _, seconds in times)
    left = []
    for run, state in found:
        alike = [s for other, s in times if _point(other) == _point(run)]
        left.append((fmean(alike) if alike else usual) * state.share_left(run))
    places = [0.0] * max(1, at_once)
    for seconds in sorted(left, reverse=True):
        places[places.index(min(places))] += seconds
    return max(places)


def _point(run: PlannedRun) -> tuple[str, str]:
    return run.row, json.dumps(dict(run.values), sort_keys=True)
