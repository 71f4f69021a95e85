"""Which run of a sweep comes next: one that no other process is executing.

The process that drives a sweep asks; the answer is read from the run folders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedprompt.experiment.run_folder import is_held
from fedprompt.sweeps.live import Board
from fedprompt.sweeps.plan import PlannedRun
from fedprompt.sweeps.state import progress


def take(
    todo: list[PlannedRun], board: Board, key: Callable[[PlannedRun], Any] = lambda run: 0
) -> PlannedRun | None:
    """Remove and return the next run that no other process is executing.

    Several sweeps may work on one folder. What another one has completed is removed as well.

    Args:
        todo: The runs that are left; changed in place.
        board: Receives the runs that are busy, and those that another process has completed.
        key: The run with the smallest key comes first; of equal ones, the first in `todo`.

    Returns:
        The run, or None if all runs that are left are busy.
    """
    for run in sorted(todo, key=key):
        if is_held(run.folder):
            board.defer(run)
            continue
        todo.remove(run)
        if not (board.is_busy(run) and progress(run).done):
            return run
        board.skip(run)
        board.say(f"done   {run.name}, by another process")
    return None
