"""Finds data sources by name: modules of `fedprompt.data.sources`, and entry points.

A source is imported when its name is looked up. To keep commands fast, no source of this package
imports PyTorch or `datasets` before it opens a data set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from fedprompt.config.fields import build
from fedprompt.config.registry import Registry
from fedprompt.config.renamed import refuse_renamed
from fedprompt.config.schema import DataConfig
from fedprompt.errors import UserError

if TYPE_CHECKING:
    from fedprompt.data.sources.base import DataSource

DEFAULT = "aerial_scenes"
"""The source of a `data` section that names none."""

SOURCES: Registry[DataSource] = Registry(
    "data source",
    "fedprompt.data.sources",
    "fedprompt.data.sources.base:DataSource",
    helpers=("base", "registry"),
)


def all_sources() -> dict[str, type[DataSource]]:
    """Every data source by name. This imports all of them."""
    return SOURCES.all()


def source_class(name: str) -> type[DataSource]:
    """The class of the data source called `name`.

    Raises:
        UserError: there is no such source; the message suggests the nearest name.
    """
    return SOURCES.get(name)


def source_keys(name: str) -> dict[str, dataclasses.Field[Any]]:
    """The keys that the `data` section may have for one source, with their fields.

    Raises:
        UserError: there is no such source.
    """
    return {field.name: field for field in dataclasses.fields(source_class(name).Config)}


def all_keys() -> dict[str, dataclasses.Field[Any]]:
    """The keys of all sources, each once, with the field of the last source that has it."""
    return {key: field for name in SOURCES.names() for key, field in source_keys(name).items()}


def key_types() -> dict[str, Any]:
    """The types of the keys of all sources."""
    types: dict[str, Any] = {}
    for source in all_sources().values():
        types |= get_type_hints(source.Config)
    return types


def build_data(values: Mapping[str, Any], where: str = "data") -> DataConfig:
    """Build the config of the source that a `data` section names.

    Args:
        values: the section's keys. Without `source`, the source is `aerial_scenes`.
        where: path of the section for messages.

    Returns:
        An instance of the source's `Config`.

    Raises:
        UserError: there is no such source, a key is unknown or belongs to another source, or a
            value is not allowed.
    """
    name = str(values.get("source", DEFAULT))
    keys = source_keys(name)
    # `build` refuses unknown keys too, but cannot tell to which source a key belongs.
    for key in values:
        if key not in keys:
            refuse_renamed(f"{where}.{key}")
            _refuse_key_of_another_source(name, str(key), where)
    return build(source_class(name).Config, values, where)


def _refuse_key_of_another_source(name: str, key: str, where: str) -> None:
    """Raise an error that names the sources which have the key, if there are any."""
    having = [f"'{other}'" for other in SOURCES.names() if key in source_keys(other)]
    if having:
        sources = " and ".join(filter(None, (", ".join(having[:-1]), having[-1])))
        plural = "s" if len(having) > 1 else ""
        raise UserError(
            f"config: {where}.{key} is a key of source{plural} {sources}, and {where}.source is "
            f"'{name}'."
        )
