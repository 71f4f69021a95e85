"""The groups of a config that a name selects, and the names that each of them may be set to.

Nothing here imports PyTorch: the command line offers these names when Tab is pressed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedprompt.config.registry import Registry
from fedprompt.config.shipped import purpose, shipped_file
from fedprompt.data import catalogue
from fedprompt.data.sections import available, resolve_group
from fedprompt.evaluation.protocols import PROTOCOLS
from fedprompt.federation.registry import STRATEGIES
from fedprompt.methods.registry import METHODS

GROUPS = ("backbone", "data", "method", "strategy")
REGISTRIES: Mapping[str, Registry[Any]] = {
    "method": METHODS,
    "strategy": STRATEGIES,
    "protocol": PROTOCOLS,
}


def choices(group: str) -> list[str]:
    """The names that a group may be set to, in alphabetical order.

    Args:
        group: one of `GROUPS`, or `experiment`, `sweep` or `protocol`.

    Returns:
        Names of shipped config files, entries of the catalogue (`data`), and methods, strategies
        and protocols without a config file, such as those of other distributions.
    """
    registry = REGISTRIES.get(group)
    return sorted({*available(group), *(registry.names() if registry else ())})


def description(group: str, name: str) -> str:
    """One sentence that says what a name stands for; empty for parts of other distributions.

    Args:
        group: as in `choices`.
        name: one of the group's choices.
    """
    if group == "data" and name in catalogue.names():
        return catalogue.entry(name).title
    if name in available(group):
        return purpose(shipped_file(group, name))
    return REGISTRIES[group].described(name)


def select(group: str, value: Any) -> dict[str, Any]:
    """The keys that a group's value in an experiment stands for.

    Args:
        group: one of `GROUPS`.
        value: a name, a mapping with `use: <name>` and changes to it, plain keys, or None.

    Raises:
        UserError: nothing has this name.
    """
    registry = REGISTRIES.get(group)
    return resolve_group(group, value, registry.names() if registry else ())
