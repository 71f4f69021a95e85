"""Runs a search: batch by batch, every trial an ordinary run that holds no test image.

The run folders are the only state. A trial whose run is complete is read, others are run or
resumed, so repeating the command after any interruption ends with the same trials and the same
winner as a search that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedprompt.config.schema import Config
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from fedprompt.experiment.selection import objective_by_round
from fedprompt.experiment.summary import seconds_of
from fedprompt.reports.run_data import SUMMARY, load_run
from fedprompt.sweeps.api import run_planned
from fedprompt.sweeps.plan import PlannedRun, SweepFile, settings_hash, slug, with_threads
from fedprompt.tuning.plan import PLAN, Row, TunePlan, setting, write_plan
from fedprompt.tuning.proposals import Trial, best, next_batch, propose, thresholds

TRIALS = "trials"
"""The folder of the trials' runs, in the folder of the search."""
# What a trial needs not measure, and the test images that it must not see.
WITHOUT_TESTS = {
    "evaluation.withhold_tests": True,
    "evaluation.local_only": False,
    "evaluation.personal_on_global": False,
    "evaluation.every": 1,
    "evaluation.clients": "all",
    "evaluation.select": "best_validation",
    "protocols": ["global", "personalised"],
    "output.report": False,
    "output.loggers": [],
}


@dataclass(frozen=True)
class RowResult:
    """The search for one row.

    Attributes:
        row: the row.
        trials: all its trials, in order.
        best: number of the best trial, or None if none was complete.
        failures: reasons of failed trials by number.
    """

    row: Row
    trials: tuple[Trial, ...]
    best: int | None
    failures: dict[int, str]


def search(
    plan: TunePlan,
    folder: Path,
    *,
    jobs: int | None = None,
    serial: bool = False,
    address: str | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[RowResult]:
    """Run what is missing of a search.

    Args:
        plan: the search.
        folder: its folder, which is created if necessary.
        jobs: how many trials may run at the same time; None means as many as fit.
        serial: whether to run all trials in this process, one after the other.
        address: the address of a Ray cluster to join; None starts workers on this machine.
        quiet: whether to suppress all output.
        say: takes one line about the progress.

    Returns:
        The results by row, in the plan's order.

    Raises:
        UserError: the folder holds another search, or a run cannot be started.
    """
    (results,) = search_all(
        [(plan, folder)],
        folder / PLAN,
        jobs=jobs,
        serial=serial,
        address=address,
        quiet=quiet,
        say=say,
    )
    return results


def search_all(
    searches: Sequence[tuple[TunePlan, Path]],
    marker: Path,
    *,
    jobs: int | None = None,
    serial: bool = False,
    address: str | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[list[RowResult]]:
    """Run what is missing of several searches side by side, as if each ran alone.

    The batches of all searches run together, so that workers wait for each other once per batch
    and not once per batch and search.

    Args:
        searches: plans with different names, each with a folder of its own.
        marker: a file above or in the folders, which exists when the runs start; workers of a
            cluster check that they see it.
        jobs: as for `search`, like all further arguments.
        serial: see there.
        address: see there.
        quiet: see there.
        say: see there.

    Returns:
        The results of each search by row, in the plan's order.

    Raises:
        UserError: a folder holds another search, or a run cannot be started.
    """
    for plan, folder in searches:
        write_plan(plan, folder)
    # Two searches may have the same trials, in folders of their own.
    prefix = "{}/" if len(searches) > 1 else ""
    found = [_Found(plan, folder, prefix.format(plan.name)) for plan, folder in searches]
    # Proposed together: no trial of a batch may depend on another one's result.
    while any(batches := [one.propose() for one in found]):
        numbers = sorted({n for batch in batches for _, n in batch})
        rows = len({(i, row) for i, batch in enumerate(batches) for row, _ in batch})
        say(f"trials {numbers[0]} to {numbers[-1]} of {rows} rows")
        runs = {run.name: run for batch in batches for run in batch.values()}
        reasons = run_planned(
            _as_sweep(searches[0][0]),
            list(runs.values()),
            marker.parent,
            jobs=jobs,
            serial=serial,
            address=address,
            quiet=quiet,
            plan=marker.name,
        )
        for one, batch in zip(found, batches, strict=True):
            one.read(batch, reasons)
    return [one.results() for one in found]


class _Found:
    """What a search has found so far."""

    def __init__(self, plan: TunePlan, folder: Path, prefix: str) -> None:
        self._plan = plan
        self._folder = folder
        self._prefix = prefix
        self._trials: dict[str, list[Trial]] = {row.name: [] for row in plan.rows}
        self._failures: dict[str, dict[int, str]] = {row.name: {} for row in plan.rows}

    def propose(self) -> dict[tuple[str, int], PlannedRun]:
        """The runs of the next batch by row and number of the trial; none if all rows are done."""
        runs = {}
        for row in self._plan.rows:
            pending: list[Mapping[str, Any]] = []
            for n in next_batch(self._trials[row.name], self._plan.budget) if row.space else ():
                run = _planned(self._plan, row, n, self._trials[row.name], pending, self._folder)
                if run is not None:
                    runs[row.name, n] = replace(run, name=f"{self._prefix}{run.name}")
                    pending.append(run.values)
        return runs

    def read(self, batch: dict[tuple[str, int], PlannedRun], reasons: Mapping[str, str]) -> None:
        """Read the results of a batch; `reasons` are those of failed runs by name."""
        for (row, n), run in batch.items():
            if run.name in reasons:
                self._failures[row][n] = reasons[run.name]
            self._trials[row].append(_read(run, failed=run.name in reasons))

    def results(self) -> list[RowResult]:
        """The results by row."""
        return [
            RowResult(row, tuple(trials), best(trials), self._failures[row.name])
            for row in self._plan.rows
            for trials in [self._trials[row.name]]
        ]


def trial_config(plan: TunePlan, row: Row, values: dict[str, Any]) -> Config:
    """The config of a trial.

    Args:
        plan: the search.
        row: the row that is tuned.
        values: the settings to try, by config key.

    Returns:
        The row's config with these settings, in which all test images are withheld. It has no
        thresholds at which the trial would end early.

    Raises:
        UserError: the settings are impossible.
    """
    changes = {**WITHOUT_TESTS, "evaluation.objective": plan.budget.objective, **values}
    config = compose(plan.experiment, [*plan.common, *row.overrides], changes)
    return with_threads(replace(config, seed=plan.seed), plan.resources)


def _planned(
    plan: TunePlan,
    row: Row,
    number: int,
    earlier: Sequence[Trial],
    pending: Sequence[Mapping[str, Any]],
    folder: Path,
) -> PlannedRun | None:
    """The run of a trial, or None if there is nothing more to try."""
    # Only the results of earlier batches: within a batch they depend on who is faster.
    known = earlier[: number - number % plan.budget.batch]
    values: dict[str, Any] | None = {}
    if number > 0:
        values = propose(row.space, known, number, plan.budget, row.name, pending=pending)
    if values is None:
        return None
    config = trial_config(plan, row, values)
    limits = thresholds(known, number, config.federation.rounds, plan.budget)
    config = replace(config, evaluation=replace(config.evaluation, stop_below=limits))
    # The whole setting, also for trial 0, so that it can be a point of the search like the others.
    values = {key: setting(config, key) for key in row.space}
    name = f"{slug(row.name, {}, config)}-trial{number:03d}-{settings_hash(config)}"
    place = str((folder / TRIALS / name).absolute())
    config = replace(config, output=replace(config.output, dir=place))
    return PlannedRun(name, row.name, values, plan.seed, config)


def _read(run: PlannedRun, *, failed: bool) -> Trial:
    """What a trial has measured, from its run folder."""
    try:
        read = load_run(run.folder)
    except UserError:
        if failed:  # before its first round
            return Trial(run.values, None)
        raise
    steps = sum(line.get("client_steps", 0) for line in read.rounds)
    seconds = seconds_of(read.timings)
    if failed:
        return Trial(run.values, None, steps=steps, seconds=seconds)
    if read.summary is None:
        raise UserError(f"tune: {run.folder / SUMMARY} is missing; repeat the command.")
    return Trial(
        run.values,
        read.summary.get("objective", {}).get("value"),
        objective_by_round(read.rounds, run.config.evaluation),
        pruned="ended_after_round" in read.summary,
        steps=steps,
        seconds=seconds,
    )


def _as_sweep(plan: TunePlan) -> SweepFile:
    """What `run_planned` needs to know of a sweep."""
    return SweepFile(
        plan.name, Path(plan.name), plan.experiment, plan.seeds, plan.common, {}, {}, plan.resources
    )
