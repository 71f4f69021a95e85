"""Plans and runs sweeps, for `fedprompt sweep` and for Python as `fedprompt.sweep`.

A sweep is driven by one process on the operator's machine. Each of its runs is a simulation; none
of this code runs on a server or a client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedprompt.experiment.api import Result
from fedprompt.experiment.compose import plain_value
from fedprompt.reports.compare.load import load_rows
from fedprompt.reports.compare.metrics import choose
from fedprompt.reports.compare.names import PLAN
from fedprompt.reports.compare.table import compare_rows, markdown
from fedprompt.runtime import cards
from fedprompt.sweeps.gpus import with_gpus
from fedprompt.sweeps.live import Board, PlainBoard, make_board
from fedprompt.sweeps.plan import (
    PlannedRun,
    SweepFile,
    check_seeds,
    expand,
    load_sweep,
    sweep_path,
    write_plan,
    yaml_text,
)
from fedprompt.sweeps.run import RaySweep, check_inline, places_here, run_serial
from fedprompt.sweeps.state import progress as progress_of


@dataclass(frozen=True)
class SweepResult:
    """The state of a sweep's folder after the sweep.

    Attributes:
        path: The sweep's folder.
        runs: The result of each complete run, by the run's name, in the order of the plan.
        failures: The reason why each failed run failed, by the run's name.
    """

    path: Path
    runs: Mapping[str, Result]
    failures: Mapping[str, str]

    def table(self) -> str:
        """Return means and standard deviations over seeds as Markdown, with one row per setting."""
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
    """Run every row, grid value and seed of a sweep, skipping runs that are already complete.

    Args:
        file: The name of a shipped sweep, or the path of a YAML file.
        *overrides: Changes to the config of every run, written as on the command line.
        seeds: Seeds that replace those of the file.
        quick: Whether to run the small variant that the file describes under `quick`.
        out: The folder for the runs; by default `runs/<name of the sweep>`.
        jobs: How many runs may execute at the same time. With 1, the runs execute one after the
            other in this process; with None, as many as fit on the machine, each in a Ray worker.
        progress: Whether to print what `fedprompt sweep` prints; by default nothing is printed.
        **changes: Changes to the config of every run, as values by key.

    Returns:
        The complete runs, and the reasons of those that failed.

    Raises:
        UserError: The file or one of the configs is invalid, or Ray does not start.
    """
    table = load_sweep(sweep_path(str(file)), quick=quick)
    if seeds is not None:
        table = replace(table, seeds=check_seeds(list(seeds), "seeds"))
    folder = Path(out) if out is not None else Path("runs") / table.name
    texts = [*overrides, *(_override(key, value) for key, value in changes.items())]
    planned = expand(table, folder, texts)
    write_plan(table, planned, folder, texts)
    failures = run_planned(table, planned, folder, jobs=jobs, quiet=not progress)
    # Read from the folders, so that runs completed by an earlier sweep are included.
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
    plan: str = PLAN,
) -> dict[str, str]:
    """Execute the runs of a plan that are not complete yet.

    Args:
        table: The sweep; its `resources` say what one run needs.
        planned: The runs of the sweep, complete ones included.
        folder: The folder of the sweep, which holds its plan.
        jobs: How many runs may execute at the same time; None means as many as fit.
        serial: Whether to execute all runs in this process, one after the other.
        address: The address of a Ray cluster to join; None starts workers on this machine.
        quiet: Whether to suppress all output.
        plan: The name of the file in the folder that holds the plan.

    Returns:
        The reason why each failed run failed, by the run's name.

    Raises:
        UserError: Ray does not start, or a run would start Ray inside a Ray worker.
    """
    states = {run.name: progress_of(run) for run in planned}
    done = [run for run in planned if states[run.name].done]
    todo = [run for run in planned if not states[run.name].done]
    # On a cluster the room is counted by `RaySweep` once Ray is connected; `jobs` is only its
    # limit.
    resources = table.resources if address else with_gpus(table.resources, todo, cards.count())
    places = jobs if address else places_here(resources, len(todo), jobs)
    # One worker would gain nothing over this process, and would cost the start of Ray.
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
            RaySweep(
                todo, board, resources, places=places, address=address, plan=folder / plan
            ).run()
    finally:
        board.close()
    return board.failures


def _board(planned: Sequence[PlannedRun], at_once: int, quiet: bool) -> Board:
    if quiet:
        return PlainBoard(planned, at_once, Console(quiet=True))
    return make_board(planned, at_once)


def _override(key: str, value: Any) -> str:
    """Format a change as command-line text, because the plan records all changes in that form."""
    return f"{key}={yaml_text(plain_value(value, key))}"
