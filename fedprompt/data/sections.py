"""The `data` section of an experiment: a shipped file, a catalogue entry, or plain keys."""

from __future__ import annotations

from collections.abc import Mapping
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


def resolve_group(group: str, value: Any) -> dict[str, Any]:
    """A group's mapping: a name selects a shipped file or entry; `use:` does, then adds."""
    if value is None:
        return {}
    extra: dict[str, Any] = {}
    if isinstance(value, Mapping):
        extra = {str(k): v for k, v in value.items()}
        if "use" not in extra:
            return extra
        value = extra.pop("use")
    if group == "data" and value in catalogue.names():
        return merge(catalogue.data_keys(value), extra)
    also = catalogue.names() if group == "data" else []
    return merge(load_yaml(shipped_file(group, value, also)), extra)
