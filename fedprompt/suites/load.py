"""Reads suites from YAML.

    title: ...                        one line
    seeds: [1, 2, 3]                  seeds of the runs that are reported
    common: [...]                     overrides of all scenarios
    rows: all_methods                 a sweep whose rows are compared, or `name: [overrides]` lines
    search:                           what every row gets, see `Budget`; `with` lists overrides of
      trials: 12                      the trials alone, e.g. other images than those of the runs
      with: [...]
    space: {key: space}               spaces that replace those of the methods
    scenarios:
      label-skew:
        experiment: benchmark         an experiment, and changes to it
        overrides: [...]
        metric: personal              what is compared
        objective: personal           what the search maximises
        settings_of: domain-skew      no search: the settings that it found in another scenario
        data: unpinned                fingerprint of the data set, see `fingerprints`
        partitions: unpinned          fingerprints of the partitions by seed
    resources: {cpus: 1}              of one run
    quick:                            what --quick changes; `common` is added to, `scenarios` and
      common: [federation.rounds=2]   `rows` list the names to keep, or give others; nothing is
                                      pinned

The score of a row is the mean of its metrics over the scenarios. A change of anything but `rows`,
`title` and `quick` makes other results, so it needs a new name; `Suite.hash` tells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from fedprompt.config.as_typed import plain
from fedprompt.config.fields import build
from fedprompt.config.search import space_from
from fedprompt.config.shipped import load_yaml, refuse_unknown, yaml_file
from fedprompt.errors import UserError, did_you_mean
from fedprompt.experiment.compose import compose
from fedprompt.reports.compare.metrics import KNOWN
from fedprompt.suites.spec import BUDGET_KEYS, Scenario, Suite
from fedprompt.sweeps.plan import Resources, check_seeds, file_name, load_sweep, sweep_path
from fedprompt.tuning.plan import Budget, Pruner, Sampler

KEYS = (
    "title", "seeds", "common", "rows", "search", "space", "scenarios", "resources", "quick",
)  # fmt: skip
SCENARIO_KEYS = (
    "experiment", "overrides", "metric", "objective", "settings_of", "data", "partitions",
)  # fmt: skip
UNPINNED = "unpinned"
"""Stands in place of a fingerprint that is not known, because the data cannot be shipped."""
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}"
"""The name of a suite, which is part of the names of files."""
OBJECTIVES = ("personal", "global")


def suite_path(name: str) -> Path:
    """Return the file of a shipped suite, or `name` itself if it is a YAML file.

    Raises:
        UserError: There is no shipped suite with this name.
    """
    return yaml_file("suite", name)


def load_suite(path: Path, *, quick: bool = False) -> Suite:
    """Read and validate a suite.

    Args:
        path: The YAML file.
        quick: Whether to apply the changes that the file lists under `quick`.

    Returns:
        The suite, named after the file, with `-quick` appended for the small variant.

    Raises:
        UserError: The file cannot be read, has unknown keys, or one of its parts is impossible.
    """
    where = f"suite: {path}"
    if not re.fullmatch(NAME, path.stem):
        raise UserError(
            f"{where}: a suite is named after its file; use letters, digits, dots and hyphens, "
            "e.g. sites-v1.yaml."
        )
    values = plain(load_yaml(path, "suite"))
    refuse_unknown(values, KEYS, where)
    if quick:
        values = _quick(values, where)
    search = dict(_mapping(values.get("search") or {}, f"{where}: 'search'"))
    search_with = _texts(search.pop("with", None), f"{where}: search: 'with'")
    common = _texts(values.get("common"), f"{where}: 'common'")
    scenarios = {
        name: _scenario(name, part, common, path)
        for name, part in _mapping(values.get("scenarios"), f"{where}: 'scenarios'").items()
    }
    suite = Suite(
        name=f"{path.stem}-quick" if quick else path.stem,
        title=str(values.get("title", path.stem)),
        path=path,
        seeds=check_seeds(values.get("seeds", [1, 2, 3]), str(path)),
        rows=_rows(values.get("rows"), where),
        budget=_budget(search, where),
        search_with=search_with,
        spaces={
            key: space_from(key, space)
            for key, space in _mapping(values.get("space") or {}, f"{where}: 'space'").items()
        },
        scenarios=scenarios,
        resources=build(Resources, values.get("resources") or {}, "resources"),
    )
    _check_scenarios(suite, where)
    return suite


def _quick(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of the file, changed by those under its `quick`."""
    changes = values.get("quick")
    if not isinstance(changes, Mapping):
        raise UserError(f"{where} has no 'quick' variant.")
    changes = {str(key): value for key, value in changes.items()}
    refuse_unknown(changes, KEYS, f"{where}: quick")
    merged = {**values, **changes}
    merged["common"] = values.get("common")
    last = list(_texts(changes.get("common"), f"{where}: quick: 'common'"))
    merged["search"] = {**(values.get("search") or {}), **(changes.get("search") or {})}
    for key, parts in (
        ("rows", {k: list(v) for k, v in _rows(values.get("rows"), where).items()}),
        ("scenarios", _mapping(values.get("scenarios"), f"{where}: 'scenarios'")),
    ):
        kept = changes.get(key, list(parts))
        if isinstance(kept, list):
            for name in kept:
                if name not in parts:
                    raise UserError(
                        f"{where}: quick: {key}: no {name!r}.{did_you_mean(str(name), list(parts))}"
                    )
            merged[key] = {name: parts[name] for name in kept}
    # The fingerprints are those of the whole suite's images.
    pins = {"data": UNPINNED, "partitions": UNPINNED}
    merged["scenarios"] = {
        name: {**part, **pins, "overrides": [*(part.get("overrides") or []), *last]}
        for name, part in merged["scenarios"].items()
        if isinstance(part, Mapping)
    }
    return merged


def _scenario(name: str, part: Any, common: Sequence[str], path: Path) -> Scenario:
    where = f"suite: {path}: scenario '{name}'"
    values = _mapping(part, where)
    refuse_unknown(values, SCENARIO_KEYS, where)
    experiment = values.get("experiment")
    if not isinstance(experiment, str):
        raise UserError(f"{where} must name its 'experiment', e.g. experiment: benchmark.")
    # A suite and its experiments can be kept in one folder, wherever the command is run.
    beside = path.parent / experiment
    if experiment.endswith((".yaml", ".yml")) and beside.is_file():
        experiment = str(beside.absolute())
    metric = values.get("metric", "personal")
    accuracies = [
        one.name for one in KNOWN.values() if one.kind == "share" and one.higher_is_better
    ]
    if metric not in accuracies:
        raise UserError(f"{where}: no metric {metric!r}.{did_you_mean(str(metric), accuracies)}")
    objective = values.get("objective", "personal")
    if objective not in OBJECTIVES:
        raise UserError(f"{where}: 'objective' is {objective!r}; it must be personal or global.")
    data, partitions = (values.get(key, UNPINNED) for key in ("data", "partitions"))
    if partitions != UNPINNED and not isinstance(partitions, Mapping):
        raise UserError(f"{where}: 'partitions' must be '{UNPINNED}' or fingerprints by seed.")
    return Scenario(
        name,
        experiment,
        (*common, *_texts(values.get("overrides"), f"{where}: 'overrides'")),
        metric,
        objective,
        str(values.get("settings_of") or ""),
        None if data == UNPINNED else str(data),
        None if partitions == UNPINNED else {int(k): str(v) for k, v in partitions.items()},
    )


def _check_scenarios(suite: Suite, where: str) -> None:
    """Compose every scenario, so that a wrong name or key is reported before any work.

    Raises:
        UserError: An experiment or an override is impossible, or `settings_of` names no scenario
            with a search.
    """
    searched = [s.name for s in suite.scenarios.values() if not s.settings_of]
    if not searched:
        raise UserError(f"{where}: no scenario has a search of its own; leave out 'settings_of'.")
    for scenario in suite.scenarios.values():
        at = f"{where}: scenario '{scenario.name}'"
        if scenario.settings_of and scenario.settings_of not in searched:
            raise UserError(
                f"{at}: settings_of: no scenario {scenario.settings_of!r} with a search."
                f"{did_you_mean(scenario.settings_of, searched)}"
            )
        trials = [(*scenario.overrides, *suite.search_with)] if suite.search_with else []
        for overrides in (scenario.overrides, *trials):
            try:
                compose(scenario.experiment, overrides)
            except UserError as error:
                raise UserError(f"{at}: {error}") from None


def _rows(rows: Any, where: str) -> dict[str, tuple[str, ...]]:
    if isinstance(rows, str):
        return dict(load_sweep(sweep_path(rows)).rows)
    found = {
        name: _texts(row, f"{where}: row '{name}'")
        for name, row in _mapping(rows, f"{where}: 'rows'").items()
    }
    # Folders and result files are named after rows.
    slugs = [file_name(name) for name in found]
    for name, slug in zip(found, slugs, strict=True):
        if not slug or slugs.count(slug) > 1:
            raise UserError(f"{where}: row {name!r} has no file name of its own; rename it.")
    return found


def _budget(values: Mapping[str, Any], where: str) -> Budget:
    kinds = {"sampler": get_args(Sampler), "pruner": get_args(Pruner)}
    refuse_unknown(values, BUDGET_KEYS, f"{where}: search")
    for key, value in values.items():
        if key in kinds and value not in kinds[key]:
            raise UserError(
                f"{where}: search: {key} is {value!r}; it must be {', '.join(kinds[key])}."
            )
        low = 0 if key == "seed" else 1
        if key not in kinds and (type(value) is not int or value < low):
            raise UserError(
                f"{where}: search: {key} is {value!r}; it must be a whole number from {low}."
            )
    return Budget(**values)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where} must hold 'name: ...' lines.")
    return dict(value)


def _texts(values: Any, where: str) -> tuple[str, ...]:
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise UserError(f"{where} must be a list of overrides, e.g. [federation.rounds=20].")
    return tuple(values)
