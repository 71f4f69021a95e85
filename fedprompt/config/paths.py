"""Which keys of an experiment are paths, and what becomes of them on another machine.

A key says so itself, by `option(..., path=True)`. The data sets that a protocol's options list are
`data` sections, with the same keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fedprompt.config.schema import Config, DataConfig

T = TypeVar("T")
Change = Callable[[Any, Field[Any]], Any]
"""The new value of a path's key, from the present one and the key's field."""


def absolute(config: Config) -> Config:
    """Relative paths as they are meant on this machine; names that are no path here stay."""

    def one(path: str) -> str:
        found = Path(path).expanduser()
        return str(found.resolve()) if found.exists() else path

    def change(value: Any, field: Field[Any]) -> Any:
        return [one(v) for v in value] if isinstance(value, list) else value and one(value)

    return _changed(config, change)


def without_paths(config: Config) -> Config:
    """Every path as if the experiment did not name it."""
    return _changed(config, lambda value, field: _default(field))


def _changed(section: T, change: Change) -> T:
    """A dataclass with `change` made to all paths in it, those of dataclasses in it included."""
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
        paths = {f.name: f for f in fields(DataConfig) if f.metadata.get("path")}
        data = "source" in value
        return {
            key: change(item, paths[key]) if data and key in paths else _inside(item, change)
            for key, item in value.items()
        }
    return value


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
