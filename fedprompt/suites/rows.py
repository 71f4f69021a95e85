"""Which rows of a suite a command runs, and how they are searched and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedprompt.errors import UserError, did_you_mean
from fedprompt.experiment.compose import compose
from fedprompt.methods.registry import METHODS
from fedprompt.suites.spec import Scenario, Suite
from fedprompt.sweeps.plan import SweepFile, file_name
from fedprompt.tuning.plan import TunePlan, row_of

Rows = Mapping[str, tuple[str, ...]]


def select_rows(suite: Suite, wanted: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """The rows that a user has named.

    Args:
        suite: The suite.
        wanted: Names of rows as in file names, e.g. `coop-local-only`, or of methods; a method
            stands for all of its rows. A method without a row gets one with its own settings. None
            selects all rows of the suite.

    Returns:
        Overrides by name of the row, in the order of the suite.

    Raises:
        UserError: There is neither a row nor a method of this name.
    """
    if wanted is None:
        return dict(suite.rows)
    chosen: dict[str, tuple[str, ...]] = {}
    for name in wanted:
        found = [row for row, texts in suite.rows.items() if name in names_of(row, texts)]
        if found:
            chosen |= {row: suite.rows[row] for row in found}
        elif name in METHODS.names():
            chosen[name] = (f"method={name}",)
        else:
            known = {n for row, texts in suite.rows.items() for n in names_of(row, texts)}
            raise UserError(
                f"suite: {suite.name} has no row {name!r}, and there is no such method."
                f"{did_you_mean(name, sorted(known | set(METHODS.names())))}"
            )
    order = list(suite.rows)
    return dict(sorted(chosen.items(), key=lambda item: _place(order, item[0])))


def names_of(row: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """The names by which a user selects a row: as it stands, as in file names, and its method."""
    methods = [text.removeprefix("method=") for text in overrides if text.startswith("method=")]
    return (row, file_name(row), *methods)


def search_plan(
    suite: Suite, scenario: Scenario, row: str, overrides: Sequence[str], data: Sequence[str]
) -> TunePlan:
    """The search for the settings of a row in a scenario.

    Args:
        suite: The suite.
        scenario: A scenario with a search of its own.
        row: Name of the row.
        overrides: Its changes.
        data: Overrides that say where the images are.
    """
    common = (*scenario.overrides, *suite.search_with, *data)
    config = compose(scenario.experiment, [*common, *overrides])
    return TunePlan(
        name=f"{scenario.name}/{file_name(row)}",
        experiment=scenario.experiment,
        common=common,
        rows=(row_of(scenario.experiment, common, row, overrides, suite.spaces),),
        budget=replace(suite.budget, objective=scenario.objective),  # type: ignore[arg-type]
        seed=config.seed,
        seeds=suite.seeds,
        resources=suite.resources,
    )


def table(
    suite: Suite, scenario: Scenario, setting: str, rows: Rows, data: Sequence[str]
) -> SweepFile:
    """The sweep of a scenario's rows over the seeds of the suite.

    Args:
        suite: The suite.
        scenario: The scenario.
        setting: `tuned` or `default`.
        rows: Overrides by name of the row, with the settings that a search has chosen.
        data: Overrides that say where the images are.
    """
    # The round that is reported is chosen like the other settings: by the search's rule, or not.
    chosen = ("evaluation.select=best_validation",) if setting == "tuned" else ()
    return SweepFile(
        name=f"{suite.name}, {scenario.name}, {setting}",
        path=suite.path,
        experiment=scenario.experiment,
        seeds=suite.seeds,
        common=(*scenario.overrides, *data, *chosen),
        rows=rows,
        grid={},
        resources=suite.resources,
    )


def _place(order: Sequence[str], row: str) -> int:
    return order.index(row) if row in order else len(order)
