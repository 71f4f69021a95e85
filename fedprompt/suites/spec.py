"""A suite: a named and versioned comparison, and what identifies it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedprompt.config.schema import Config
from fedprompt.config.search import Space
from fedprompt.experiment.compose import compose
from fedprompt.sweeps.plan import Resources
from fedprompt.tuning.plan import Budget

BUDGET_KEYS = ("trials", "batch", "sampler", "pruner", "seed")
"""What a suite says of its search. Budgets in seconds would depend on the machine."""


@dataclass(frozen=True)
class Scenario:
    """One setting in which all rows are compared.

    Attributes:
        name: Its name in the suite.
        experiment: A shipped experiment or a YAML file.
        overrides: Changes to it, those of the whole suite included.
        metric: The name of the compared metric, a key of `KNOWN` that is an accuracy.
        objective: The accuracy on validation images that a search maximises.
        settings_of: The scenario whose search chooses the settings; empty for its own search.
        data: The fingerprint that the data set must have; None if it is not pinned.
        partitions: The fingerprints that the partitions must have, by seed; None likewise.
    """

    name: str
    experiment: str
    overrides: tuple[str, ...]
    metric: str
    objective: str
    settings_of: str
    data: str | None
    partitions: Mapping[int, str] | None


@dataclass(frozen=True)
class Suite:
    """A whole suite.

    Attributes:
        name: The name of the file, which ends in the version, e.g. `scenes-v1`.
        title: What it compares, in one line.
        path: The file.
        seeds: Seeds of the reported runs.
        rows: The compared rows: changes to a scenario's experiment by name.
        budget: What the search for each row gets; `objective` is that of the scenario.
        search_with: Overrides of the trials alone.
        spaces: Spaces that replace those of the methods, by config key.
        scenarios: The scenarios by name.
        resources: What one run needs.
    """

    name: str
    title: str
    path: Path
    seeds: tuple[int, ...]
    rows: Mapping[str, tuple[str, ...]]
    budget: Budget
    search_with: tuple[str, ...]
    spaces: Mapping[str, Space]
    scenarios: Mapping[str, Scenario]
    resources: Resources = field(default_factory=Resources)

    @property
    def hash(self) -> str:
        """SHA-256 of everything that two results must have in common to be compared.

        Rows are left out: they are what is compared, and anyone may add one.
        """
        content = {
            "name": self.name,
            "seeds": self.seeds,
            "budget": {key: getattr(self.budget, key) for key in (*BUDGET_KEYS, "objective")},
            "search_with": self.search_with,
            "spaces": {key: repr(space) for key, space in sorted(self.spaces.items())},
            "scenarios": [
                {
                    **dataclasses.asdict(scenario),
                    "experiment": _setting(compose(scenario.experiment, scenario.overrides)),
                    "overrides": None,
                }
                for scenario in self.scenarios.values()
            ],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _setting(config: Config) -> dict[str, Any]:
    """What of a config decides about results and is the same for all rows.

    Only values that differ from the defaults count, so that a later version with further keys, off
    by default, has the same suite.
    """
    config = replace(config, data=without_root(config.data))
    content = _changed(config)
    for key in ("experiment", "seed", "method", "output", "simulation"):
        content.pop(key, None)
    for key in ("device", "deterministic", "cuda_graphs", "image_batch"):
        content.get("backbone", {}).pop(key, None)
    return content


def without_root(data: Any) -> Any:
    """A `data` section without the folder of the images, which differs between machines."""
    return replace(data, root=None) if getattr(data, "root", None) is not None else data


def _changed(node: Any) -> dict[str, Any]:
    found = {}
    for one in dataclasses.fields(node):
        value = getattr(node, one.name)
        default = one.default
        if one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
        if dataclasses.is_dataclass(value):
            value, default = _changed(value), {}
        elif isinstance(value, Mapping):
            # The options of protocols, a dataclass each.
            value = {k: _changed(v) for k, v in value.items()}
        if value != default:
            found[one.name] = value
    return found
