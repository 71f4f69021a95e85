"""Sweeps: planned and run for the command line, and from Python as `fedprompt.sweep`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedprompt.experiment.api import Result
from fedprompt.experiment.compose import plain_value
from fedprompt.reports.compare.load import load_rows
from fedprompt.reports.compare.metrics import choose
from fedprompt.reports.compare.table import compare_rows, markdown
from fedprompt.sweeps.live import Board, PlainBoard, make_board
from fedprompt.sweeps.plan import (
    PlannedRun,
    SweepFile,
    check_seeds,
    expand,
    load_sweep,
    sweep_path,
    write_plan,
)
from fedprompt.sweeps.run import RaySweep, check_inline, places_here, run_serial
from fedprompt.sweeps.state import progress as progress_of


@dataclass(frozen=True)
class SweepResult:
    """What the folder of a sweep holds.

    Attributes:
        path: the folder.
        runs: the result of each complete run, by the run's name, in the order of the plan.
        failures: the reason of each failed run, by the run's name.
    """

    path: Path
    runs: Mapping[str, Result]
    failures: Mapping[str, str]

    def table(self) -> str:
        """Mean and standard deviation over seeds, one row per setting, as Markdown."""
        rows = load_rows([self.path]).rows
        return markdown(compare_rows(rows, choose(None, rows)))


def sweep(
    file: str | Path,
    /,
    *overrides: str,
    seeds: Sequence[int] | None = None,
    quick: bool = False,
    out: str | Path | None = None,
    jobs: int | None = 1,
    progress: bool = False,
    **changes: Any,
) -> SweepResult:
    """Run every row, grid value and seed of a sweep; runs that are complete are kept.

    Args:
        file: the name of a shipped sweep, or a YAML file.
        *overrides: changes to the config of every run, as on the command line.
        seeds: seeds that replace those of the file.
        quick: whether to run the small variant that the file describes.
        out: the folder for the runs; by default `runs/<name of the sweep>`.
        jobs: how many runs may be done at the same time. 1 does them one after the other in this
            process; None does as many as the machine has room for, each in a Ray worker.
        progress: whether to show what `fedprompt sweep` shows; by default nothing is printed.
        **changes: changes to the config of every run, as values by key.

    Returns:
        The complete runs and the reasons of those that failed.

    Raises:
        UserError: the file or one of its configs is not right.
    """
    table = load_sweep(sweep_path(str(file)), quick=quick)
    if seeds is not None:
        table = replace(table, seeds=check_seeds(list(seeds), "seeds"))
    folder = Path(out) if out is not None else Path("runs") / table.name
    texts = [*overrides, *(_override(key, value) for key, value in changes.items())]
    planned = expand(table, folder, texts)
    write_plan(table, planned, folder, texts)
    failures = run_planned(table, planned, folder, jobs=jobs, quiet=not progress)
    complete = {run.name: Result(run.folder) for run in planned if progress_of(run).done}
    return SweepResult(folder, complete, failures)


def run_planned(
    table: SweepFile,
    planned: Sequence[PlannedRun],
    folder: Path,
    *,
    jobs: int | None = None,
    serial: bool = False,
    address: str | None = None,
    quiet: bool = False,
) -> dict[str, str]:
    """Do the runs that are not complete.

    Args:
        table: the sweep, for the resources of one run.
        planned: its runs.
        folder: its folder.
        jobs: how many runs may be done at the same time; None = as many as there is room for.
        serial: whether all runs are done in this process.
        address: a Ray cluster to join; None = workers on this machine.
        quiet: whether nothing is printed.

    Returns:
        The reason of each failed run, by the run's name.

    Raises:
        UserError: Ray does not start, or a run would start Ray within Ray.
    """
    done = [run for run in planned if progress_of(run).done]
    todo = [run for run in planned if run not in done]
    places = jobs if address else places_here(table.resources, len(todo), jobs)
    single = serial or (places == 1 and not address)
    board = _board(planned, 1 if single else places or 1, quiet)
    for run in done:
        board.skip(run)
    board.say(board.counts())
    board.open()
    try:
        if todo and single:
            run_serial(todo, board)
        elif todo:
            check_inline(todo)
            RaySweep(todo, board, table.resources, places=places, address=address, out=folder).run()
    finally:
        board.close()
    return board.failures


def _board(planned: Sequence[PlannedRun], at_once: int, quiet: bool) -> Board:
    if quiet:
        return PlainBoard(planned, at_once, Console(quiet=True))
    return make_board(planned, at_once)


def _override(key: str, value: Any) -> str:
    """A change as text: a sweep's plan holds its changes as they are given on the command line."""
    return f"{key}={json.dumps(plain_value(value, key))}"
