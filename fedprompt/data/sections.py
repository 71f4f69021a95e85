"""The `data` section of an experiment: a shipped file, a catalogue entry, or plain keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fedprompt.config.fields import build
from fedprompt.config.schema import DataConfig
from fedprompt.config.shipped import load_yaml, merge, shipped_file, shipped_names
from fedprompt.data import catalogue


def available(group: str) -> list[str]:
    """Names that one group may be set to, e.g. `available("experiment")`.

    They are the shipped config files; for `data` also the entries of the catalogue.
    """
    return sorted(shipped_names(group) + (catalogue.names() if group == "data" else []))


def data_config(chosen: Any, where: str) -> DataConfig:
    """The data set that a name, or a mapping as in an experiment file, stands for.

    Raises:
        UserError: unknown name or wrong keys; `where` is the key's path for the message.
    """
    return build(DataConfig, resolve_group("data", chosen), where)


def resolve_group(group: str, value: Any, registered: Collection[str] = ()) -> dict[str, Any]:
    """The keys that a group's value stands for.

    Args:
        group: a folder of `configs/`, e.g. `backbone`.
        value: a name, a mapping with `use: <name>` and changes to it, plain keys, or None. A name
            selects a shipped file or, for `data`, an entry of the catalogue.
        registered: names that need no shipped file: they stand for the defaults of the method or
            strategy that has this name.

    Returns:
        A mapping of its own; the caller may change it.

    Raises:
        UserError: nothing has this name.
    """
    if value is None:
        return {}
    changes: dict[str, Any] = {}
    if isinstance(value, Mapping):
        changes = {str(k): v for k, v in value.items()}
        if "use" not in changes:
            return changes
        value = changes.pop("use")
    if group == "data" and value in catalogue.names():
        return merge(catalogue.data_keys(value), changes)
    if value in registered and value not in shipped_names(group):
        return merge({"name": value}, changes)
    also = catalogue.names() if group == "data" else registered
    return merge(load_yaml(shipped_file(group, value, tuple(also))), changes)
