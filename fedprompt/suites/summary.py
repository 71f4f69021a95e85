"""The table at the end of a suite: tuned and default side by side, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from fedprompt.reports.format import MISSING, human_bytes, human_time
from fedprompt.suites.result_file import SETTINGS, ResultFile, SeedResult, SettingResult
from fedprompt.suites.spec import Suite


def heading(suite: Suite) -> list[str]:
    """The columns of the table."""
    return ["row", *suite.scenarios, "mean", "sent", "steps", "time"]


def summary_rows(suite: Suite, results: Mapping[str, ResultFile]) -> list[list[str]]:
    """The rows of the table, best mean of tuned settings first.

    Args:
        suite: The suite.
        results: The results by row.

    Returns:
        Cells: accuracies of both settings per scenario and their mean over the scenarios; bytes
        sent, optimiser steps and seconds of the reported runs with the first of the settings that
        was run.
    """
    ranked = sorted(results.values(), key=lambda one: _rank(suite, one))
    return [_cells(suite, one) for one in ranked]


def score(suite: Suite, result: ResultFile, setting: str) -> float | None:
    """The mean over the scenarios of a row's metrics; None if one of them is missing."""
    values = [_mean(_part(result, name, setting), suite) for name in suite.scenarios]
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _cells(suite: Suite, result: ResultFile) -> list[str]:
    cells = [result.row]
    for name in suite.scenarios:
        cells.append(_pair([_mean(_part(result, name, one), suite) for one in SETTINGS]))
    cells.append(_pair([score(suite, result, one) for one in SETTINGS]))
    runs = _runs(result)
    cells.append(human_bytes(sum(run.bytes_up + run.bytes_down for run in runs)))
    cells.append(f"{sum(run.client_steps for run in runs):,}")
    cells.append(human_time(sum(run.seconds for run in runs)))
    return cells


def _pair(values: Sequence[float | None]) -> str:
    return "/".join(MISSING if value is None else f"{100 * value:.1f}" for value in values)


def _rank(suite: Suite, result: ResultFile) -> tuple[float, ...]:
    return tuple(-(score(suite, result, setting) or 0.0) for setting in SETTINGS)


def _runs(result: ResultFile) -> list[SeedResult]:
    parts = [scenario.tuned or scenario.default for scenario in result.scenarios.values()]
    return [run for part in parts if part for run in part.seeds.values()]


def _part(result: ResultFile, scenario: str, setting: str) -> SettingResult | None:
    found = result.scenarios.get(scenario)
    part: SettingResult | None = getattr(found, setting) if found else None
    return part


def _mean(part: SettingResult | None, suite: Suite) -> float | None:
    """The mean over all seeds; None unless all are complete."""
    if part is None or set(part.seeds) != set(suite.seeds):
        return None
    return fmean(run.value for run in part.seeds.values())
