"""Which keys of an experiment are paths, and what to do with them for another machine.

A deployment passes the config on to other machines, on which the paths of this one mean nothing.
A key is declared as a path by `option(..., path=True)`. The data sets in the options of a protocol
are `data` sections, with the keys of their sources.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fedprompt.config.schema import LOCAL_FOLDER, Config
from fedprompt.data.sources.registry import source_keys

ELSEWHERE = "(on the server)"
"""What other machines read in the place of an absolute path of this one."""

T = TypeVar("T")
Change = Callable[[Any, Field[Any]], Any]
"""Computes the new value of a path's key from the present value and the key's field."""


def absolute(config: Config) -> Config:
    """Resolve relative paths on this machine.

    Args:
        config: the experiment.

    Returns:
        The config with absolute paths. A text that names no file or folder here is not changed.
    """

    def resolve(text: str) -> str:
        # An empty text means that there is no folder; as a path, it is the working folder.
        path = Path(text).expanduser()
        return str(path.resolve()) if text and os.path.exists(path) else text

    def change(value: Any, field: Field[Any]) -> Any:
        return [resolve(v) for v in value] if isinstance(value, list) else value and resolve(value)

    return _with_folder(_changed(config, change), resolve)


def hidden(config: Config) -> Config:
    """Replace absolute paths by `ELSEWHERE`, so that other machines see that a path is set, but
    not which. Texts that are no absolute paths, such as the name of a data set on the hub, stay.
    """

    def hide(text: str) -> str:
        return ELSEWHERE if Path(text).expanduser().is_absolute() else text

    def change(value: Any, field: Field[Any]) -> Any:
        return [hide(v) for v in value] if isinstance(value, list) else value and hide(value)

    return _with_folder(_changed(config, change), lambda _: ELSEWHERE)


def named_paths(section: Any) -> dict[str, Any]:
    """The paths that a section sets, by key; values that are the default are left out."""
    paths = {f.name: f for f in fields(section) if f.metadata.get("path")}
    values = {name: getattr(section, name) for name in paths}
    return {name: value for name, value in values.items() if value != _default(paths[name])}


def without_paths(config: Config) -> Config:
    """Set every path to its default value, as if the experiment did not set it."""
    return _changed(config, lambda value, field: _default(field))


def _with_folder(config: Config, change: Callable[[str], str]) -> Config:
    """Apply `change` to the folder that `backbone.model` may name besides models by their names."""
    if not config.backbone.model.startswith(LOCAL_FOLDER):
        return config
    folder = change(config.backbone.model.removeprefix(LOCAL_FOLDER))
    return replace(config, backbone=replace(config.backbone, model=f"{LOCAL_FOLDER}{folder}"))


def _changed(section: T, change: Change) -> T:
    """Apply `change` to all paths of a dataclass, including those in nested dataclasses."""
    values: dict[str, Any] = {}
    for field in fields(section):  # type: ignore[arg-type]
        value = getattr(section, field.name)
        if field.metadata.get("path"):
            values[field.name] = change(value, field)
        elif is_dataclass(value) or isinstance(value, (list, dict)):
            values[field.name] = _inside(value, change)
    return replace(section, **values)  # type: ignore[type-var]


def _inside(value: Any, change: Change) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _changed(value, change)
    if isinstance(value, list):
        return [_inside(item, change) for item in value]
    if isinstance(value, Mapping):
        # A mapping with a source is a complete `data` section (`other_data_sets.complete`).
        keys = source_keys(str(value["source"])) if "source" in value else {}
        paths = {name: field for name, field in keys.items() if field.metadata.get("path")}
        return {
            key: change(item, paths[key]) if key in paths else _inside(item, change)
            for key, item in value.items()
        }
    return value


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
