"""Resolves names in an experiment file: `data: eurosat` or `backbone: {use: tiny}`.

A name selects a shipped file of `configs/<group>/` or, for `data`, an entry of the catalogue.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fedprompt.config.schema import DataConfig
from fedprompt.config.shipped import load_yaml, merge, shipped_file, shipped_names
from fedprompt.data import catalogue
from fedprompt.data.sources.registry import build_data


def available(group: str) -> list[str]:
    """The names that a group may be set to, e.g. `available("experiment")`.

    They are the shipped config files and, for `data`, also the entries of the catalogue.
    """
    return sorted(shipped_names(group) + (catalogue.names() if group == "data" else []))


def data_config(selection: Any, where: str) -> DataConfig:
    """Build the config of a data set that is selected by name or described by keys.

    Args:
        selection: a name, or a mapping as in the `data` section of an experiment file.
        where: path of the section for messages.

    Returns:
        An instance of the `Config` of the data set's source.

    Raises:
        UserError: the name or a key is unknown, or a value is not allowed.
    """
    return build_data(resolve_group("data", selection), where)


def resolve_group(group: str, value: Any, registered: Collection[str] = ()) -> dict[str, Any]:
    """Replace the name in a group's value by the keys that it stands for.

    Args:
        group: a folder of `configs/`, e.g. `backbone`.
        value: a name, a mapping with `use: <name>` and changes to it, plain keys, or None. A name
            selects a shipped file or, for `data`, an entry of the catalogue.
        registered: names that need no shipped file: they stand for the defaults of the method or
            strategy of this name.

    Returns:
        The keys and their values, in a new mapping that the caller may change.

    Raises:
        UserError: the name is unknown.
    """
    if value is None:
        return {}
    changes: dict[str, Any] = {}
    if isinstance(value, Mapping):
        changes = {str(k): v for k, v in value.items()}
        # Plain keys describe the whole group; missing ones get the defaults of the schema.
        if "use" not in changes:
            return changes
        value = changes.pop("use")
    if group == "data" and value in catalogue.names():
        return merge(catalogue.data_keys(value), changes)
    # A shipped file takes precedence, since it may differ from the method's defaults.
    if value in registered and value not in shipped_names(group):
        return merge({"name": value}, changes)
    also = catalogue.names() if group == "data" else registered
    return merge(load_yaml(shipped_file(group, value, tuple(also))), changes)
