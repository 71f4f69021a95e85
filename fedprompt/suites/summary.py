"""The tables at the end of a suite: accuracies of tuned and of default settings, and costs."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from fedprompt.reports.format import MISSING, human_bytes, human_time
from fedprompt.suites.result_file import ResultFile, SeedResult, SettingResult
from fedprompt.suites.spec import Suite


def accuracies(suite: Suite, results: Mapping[str, ResultFile], setting: str) -> list[list[str]]:
    """The table of one setting, best mean first; only its heading if no row was run with it.

    Args:
        suite: The suite.
        results: The results by row.
        setting: `tuned` or `default`.

    Returns:
        The heading, and by row the mean over the seeds in each scenario, in percent, and the mean
        over the scenarios.
    """
    table = [["row", *suite.scenarios, "mean"]]
    ranked = sorted(results.values(), key=lambda one: -(score(suite, one, setting) or 0.0))
    for result in ranked:
        if any(_part(result, name, setting) for name in suite.scenarios):
            values = [_mean(_part(result, name, setting), suite) for name in suite.scenarios]
            values.append(score(suite, result, setting))
            table.append([result.row, *(_percent(value) for value in values)])
    return table


def costs(results: Mapping[str, ResultFile]) -> list[list[str]]:
    """The heading, and by row what its reported runs cost, those of one setting.

    Args:
        results: The results by row.

    Returns:
        Bytes sent, optimiser steps, and seconds, with the first of the settings that was run.
    """
    table = [["row", "sent", "client steps", "time"]]
    for result in results.values():
        runs = _runs(result)
        table.append(
            [
                result.row,
                human_bytes(sum(run.bytes_up + run.bytes_down for run in runs)),
                f"{sum(run.client_steps for run in runs):,}",
                human_time(sum(run.seconds for run in runs)),
            ]
        )
    return table


def score(suite: Suite, result: ResultFile, setting: str) -> float | None:
    """The mean over the scenarios of a row's metrics; None if one of them is missing."""
    values = [_mean(_part(result, name, setting), suite) for name in suite.scenarios]
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _percent(value: float | None) -> str:
    # Without a percent sign, so that the columns of five scenarios fit into 80 letters.
    return MISSING if value is None else f"{100 * value:.1f}"


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
