"""From the run folders of a suite to the result file of a row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedprompt.config.schema import Config, OutputConfig, to_yaml
from fedprompt.reports.compare.load import CHOSEN_BY
from fedprompt.reports.compare.metrics import KNOWN, Metric
from fedprompt.reports.marks import mark_line
from fedprompt.suites.checked_json import LONGEST_TEXT
from fedprompt.suites.fingerprints import Fingerprints
from fedprompt.suites.result_file import ResultFile, ScenarioResult, SeedResult, SettingResult
from fedprompt.suites.spec import Suite, without_root
from fedprompt.sweeps.plan import PlannedRun
from fedprompt.sweeps.state import progress

MACHINE = ("device", "cpus", "threads")
"""What of a run's environment is no version of a package."""

Planned = Mapping[tuple[str, str], Sequence[PlannedRun]]
"""The runs of all rows by scenario and setting."""


def collect(
    suite: Suite,
    row: str,
    planned: Planned,
    found: Mapping[str, Fingerprints],
    settings: Mapping[str, Mapping[str, Any]],
) -> ResultFile | None:
    """The result of a row, as far as its runs are complete.

    Args:
        suite: The suite.
        row: Name of the row.
        planned: The runs of all rows.
        found: The fingerprints by scenario.
        settings: What the search chose for the row, by scenario and key.

    Returns:
        The content of its result file; None if no run of the row is complete.
    """
    scenarios: dict[str, ScenarioResult] = {}
    environment: dict[str, Any] = {}
    method = ""
    for scenario in suite.scenarios.values():
        parts: dict[str, SettingResult] = {}
        for setting in ("tuned", "default"):
            runs = [run for run in planned.get((scenario.name, setting), ()) if run.row == row]
            seeds = {}
            for run in runs:
                summary = progress(run).summary
                if summary is None:
                    continue
                result = _of_seed(summary, KNOWN[scenario.metric])
                if result is not None:
                    seeds[run.seed] = result
                environment = environment or summary["environment"]
            if not seeds:
                continue
            config = runs[0].config
            method = config.method.name
            chosen = dict(settings.get(scenario.name, {})) if setting == "tuned" else {}
            chosen.pop(CHOSEN_BY, None)
            parts[setting] = SettingResult(
                settings=chosen,
                config_hash=config_hash(config),
                trials=suite.budget.trials if chosen else 0,
                seeds=seeds,
            )
        if parts:
            fingerprints = found[scenario.name]
            scenarios[scenario.name] = ScenarioResult(
                metric=scenario.metric,
                data=fingerprints.data,
                partitions=fingerprints.partitions,
                tuned=parts.get("tuned"),
                default=parts.get("default"),
            )
    if not scenarios:
        return None
    searched = any(part.tuned and part.tuned.trials for part in scenarios.values())
    return ResultFile(
        suite=suite.name,
        suite_hash=suite.hash,
        planned=dict.fromkeys(suite.scenarios, suite.seeds),
        method=method,
        row=row,
        versions={k: str(v) for k, v in environment.items() if k not in MACHINE and v is not None},
        machine={k: str(environment[k]) for k in MACHINE if environment.get(k) is not None},
        search=search_words(suite) if searched else "",
        scenarios=scenarios,
    )


def search_words(suite: Suite) -> str:
    """The search of a suite in one line."""
    return "; ".join(
        dict.fromkeys(
            str(replace(suite.budget, objective=scenario.objective))  # type: ignore[arg-type]
            for scenario in suite.scenarios.values()
            if not scenario.settings_of
        )
    )


def config_hash(config: Config) -> str:
    """SHA-256 of a run's config without its seed, `output` and the folder of the images."""
    bare = replace(config, seed=0, output=OutputConfig(), data=without_root(config.data))
    return hashlib.sha256(to_yaml(bare).encode()).hexdigest()


def _of_seed(summary: Mapping[str, Any], metric: Metric) -> SeedResult | None:
    """What one run has measured; None if not the metric, e.g. on new classes."""
    value = metric.value(summary)
    if value is None:
        return None
    # With `evaluation.select=last` there is only the last round.
    last = {**summary, **summary.get("last", {})}
    personal = summary.get("personal") or {}
    return SeedResult(
        value=value,
        last=metric.value(last),
        global_=(summary.get("global") or {}).get("accuracy"),
        personal=personal.get("mean"),
        worst=personal.get("worst"),
        bytes_up=summary["bytes_up"],
        bytes_down=summary["bytes_down"],
        client_steps=summary["client_steps"] or 0,
        seconds=summary["seconds"],
        peak_memory_bytes=summary["peak_memory_bytes"],
        diverged=(mark_line(summary) or "")[:LONGEST_TEXT] or None,
    )
