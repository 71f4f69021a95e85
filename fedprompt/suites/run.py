"""Runs a suite: searches, the runs of tuned and of default settings, and the result files.

All searches share their batches, and all runs of the table are one list of work, so that workers
start once per batch and once for the table. The run folders are the only state: repeating the
command after any interruption ends with the same result files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedprompt.config.schema import Config
from fedprompt.errors import UserError, did_you_mean
from fedprompt.experiment.compose import compose
from fedprompt.experiment.workspaces import ResourceCache
from fedprompt.reports.compare.load import CHOSEN_BY
from fedprompt.suites.collect import collect, search_words
from fedprompt.suites.fingerprints import Fingerprints, take
from fedprompt.suites.folder import MARKER, claim, search_folder
from fedprompt.suites.result_file import RESULTS, ResultFile, write
from fedprompt.suites.rows import search_plan, table
from fedprompt.suites.spec import Scenario, Suite
from fedprompt.sweeps.api import run_planned
from fedprompt.sweeps.plan import PlannedRun, SweepFile, expand, file_name, load_sweep, write_plan
from fedprompt.tuning.plan import TunePlan, has_key
from fedprompt.tuning.results import TUNED, write_results
from fedprompt.tuning.search import RowResult, search_all

Rows = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class SuiteResult:
    """The state of a suite's folder after a command.

    Attributes:
        results: The results of the rows that the command asked for, by name of the row.
        failures: The reason of each failure, by trial, run or row.
    """

    results: Mapping[str, ResultFile]
    failures: Mapping[str, str]


@dataclass(frozen=True)
class Execution:
    """How runs are executed; see `run_planned`."""

    jobs: int | None = None
    serial: bool = False
    address: str | None = None
    quiet: bool = False


def run_suite(
    suite: Suite,
    rows: Rows,
    folder: Path,
    *,
    settings: Sequence[str] = ("tuned", "default"),
    data: Path | None = None,
    execution: Execution = Execution(),
    say: Callable[[str], None] = lambda text: None,
) -> SuiteResult:
    """Run what is missing of a suite and write the result files of the rows.

    Args:
        suite: The suite.
        rows: Overrides by name of the rows to run. What other rows have left is kept.
        folder: The folder of the suite, which is created if necessary.
        settings: `tuned`, `default` or both.
        data: The folder that holds one folder per data set, named as in the catalogue; None for
            the places that the experiments name.
        execution: How runs are executed.
        say: Takes one line about the progress.

    Returns:
        The results of the rows, which hold everything that is complete.

    Raises:
        UserError: Data are missing or not those of the suite, a row does not fit a scenario, or the
            folder holds something else. Nothing has been run then.
    """
    places = {scenario.name: _place(scenario, data) for scenario in suite.scenarios.values()}
    found = open_data(suite, places)
    _check_spaces(suite, rows)
    plans = _plans(suite, rows, places) if "tuned" in settings else {}
    # Composed before anything runs, for its errors.
    for scenario in suite.scenarios.values():
        expand(table(suite, scenario, "default", rows, places[scenario.name]), folder)
    recorded = claim(suite, rows, folder)
    failures: dict[str, str] = {}
    if plans:
        failures |= _search(suite, plans, folder, execution, say)
    sweeps = {
        (scenario.name, setting): table(
            suite,
            scenario,
            setting,
            recorded if setting == "default" else _tuned(suite, scenario, recorded, folder),
            places[scenario.name],
        )
        for scenario in suite.scenarios.values()
        for setting in ("tuned", "default")
    }
    planned = {key: expand(sweeps[key], folder / key[0] / key[1]) for key in sweeps}
    failures |= _run(sweeps, planned, rows, settings, folder, execution, say)
    results = {}
    for row in rows:
        chosen = {
            scenario.name: _chosen(scenario, row, rows[row], folder)
            for scenario in suite.scenarios.values()
        }
        result = collect(suite, row, planned, found, chosen)
        if result is not None:
            results[row] = result
            write(result, folder / RESULTS / f"{file_name(row)}.json")
    return SuiteResult(results, failures)


def open_data(suite: Suite, places: Mapping[str, Sequence[str]]) -> dict[str, Fingerprints]:
    """Open the data of every scenario and compare them with the pinned fingerprints.

    Args:
        suite: The suite.
        places: Overrides that say where the images are, by scenario.

    Returns:
        The fingerprints by scenario.

    Raises:
        UserError: Data are missing, or are not those that the suite names.
    """
    cache = ResourceCache()
    return {
        scenario.name: take(
            suite,
            scenario,
            compose(scenario.experiment, [*scenario.overrides, *places[scenario.name]]),
            cache,
        )
        for scenario in suite.scenarios.values()
    }


def _place(scenario: Scenario, data: Path | None) -> list[str]:
    """Overrides that say where the images of a scenario are."""
    config = compose(scenario.experiment, scenario.overrides)
    if data is None or not has_key(config, "data.root"):
        return []
    # A data set of several has a folder for each of them, under the same folder as all others.
    root = data if config.data.source == "multi" else data / str(config.data.title)
    return [f"data.root={root.expanduser().absolute()}"]


def _check_spaces(suite: Suite, rows: Rows) -> None:
    """Refuse a space whose key no row has."""
    left = set(suite.spaces)
    known: set[str] = set()
    scenario = next(iter(suite.scenarios.values()))
    for overrides in ({**suite.rows, **rows}).values() if left else ():
        config: Config = compose(scenario.experiment, [*scenario.overrides, *overrides])
        left = {key for key in left if not has_key(config, key)}
        known |= {f"method.{key}" for key in vars(config.method)}
    for key in sorted(left):
        raise UserError(
            f"suite: {suite.path}: space: no row has the key '{key}'."
            f"{did_you_mean(key, sorted(known))}"
        )


def _plans(
    suite: Suite, rows: Rows, places: Mapping[str, Sequence[str]]
) -> dict[tuple[str, str], TunePlan]:
    """The searches by scenario and row, without rows that have nothing to search."""
    plans = {
        (scenario.name, row): search_plan(suite, scenario, row, texts, places[scenario.name])
        for scenario in suite.scenarios.values()
        if not scenario.settings_of
        for row, texts in rows.items()
    }
    return {key: plan for key, plan in plans.items() if plan.rows[0].space}


def _search(
    suite: Suite,
    plans: Mapping[tuple[str, str], TunePlan],
    folder: Path,
    execution: Execution,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Run the searches and write what they leave; the failures by trial or row."""
    searches = [(plan, search_folder(folder, *key)) for key, plan in plans.items()]
    say(f"searching: {search_words(suite)}")
    found = search_all(searches, folder / MARKER, **vars(execution), say=say)
    failures = {}
    for (plan, place), (result,) in zip(searches, found, strict=True):
        for number, reason in result.failures.items():
            failures[f"{plan.name}, trial {number}"] = reason
        if result.best is None:
            failures[plan.name] = "no trial is complete, so nothing was chosen"
        else:
            _write(suite, plan, result, place)
    return failures


def _write(suite: Suite, plan: TunePlan, result: RowResult, place: Path) -> None:
    """Write the results of a search for runs on the scenario's own images."""
    common = plan.common
    for text in suite.search_with:
        common = tuple(one for one in common if one != text)
    write_results(replace(plan, common=common), [result], place)


def _tuned(
    suite: Suite, scenario: Scenario, rows: Rows, folder: Path
) -> dict[str, tuple[str, ...]]:
    """The rows with their chosen settings; rows whose search is not complete are left out."""
    tuned = {}
    for row, texts in rows.items():
        values = _chosen(scenario, row, texts, folder)
        if values:
            if scenario.settings_of:
                values[CHOSEN_BY] += f", in scenario {scenario.settings_of}"
            tuned[row] = (*texts, *(f"{key}={json.dumps(v)}" for key, v in values.items()))
        elif not search_plan(suite, scenario, row, texts, ()).rows[0].space:
            tuned[row] = texts
    return tuned


def _chosen(scenario: Scenario, row: str, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """The settings that the search for a row has chosen, by config key; empty without a search."""
    file = search_folder(folder, scenario.settings_of or scenario.name, row) / TUNED
    if not file.is_file():
        return {}
    (texts,) = load_sweep(file).rows.values()
    # The search appends what it has chosen to the row's own overrides.
    pairs = (text.partition("=") for text in texts[len(overrides) :])
    return {key: json.loads(value) for key, _, value in pairs}


def _run(
    sweeps: Mapping[tuple[str, str], SweepFile],
    planned: Mapping[tuple[str, str], Sequence[PlannedRun]],
    rows: Rows,
    settings: Sequence[str],
    folder: Path,
    execution: Execution,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Run the rows in all scenarios; the failures by run."""
    runs = []
    for key, sweep in sweeps.items():
        scenario, setting = key
        if setting not in settings or not planned[key]:
            continue
        write_plan(sweep, planned[key], folder / scenario / setting, [])
        # The same name may occur in two scenarios.
        runs += [
            replace(run, name=f"{scenario}/{setting}/{run.name}")
            for run in planned[key]
            if run.row in rows
        ]
    say(f"running {len(rows)} rows in all scenarios")
    first = next(iter(sweeps.values()))
    return run_planned(first, runs, folder, **vars(execution), plan=MARKER)
