"""Composing the config of an experiment from files and overrides.

Every command that runs or shows an experiment starts here. There are four layers, and later ones
take precedence: the schema's defaults, `configs/<group>/<name>.yaml`, the experiment file, and
`key=value` overrides. The result is checked and frozen. The `config.yaml` of a run folder is
complete and composes to the same config again.

In an experiment file, the value of a group is a name (`method: promptfl`), a name with changes
(`method: {use: promptfl, context_tokens: 4}`) or plain keys. `extends:` names a shipped experiment,
or a YAML file relative to the one that extends it. If the upper file selects a group by name, all
keys of the lower file's selection are dropped; if it gives plain keys, they change the selection.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprompt.config.as_typed import AsTyped, read_override, with_texts
from fedprompt.config.renamed import refuse_renamed
from fedprompt.config.schema import (
    SECTIONS,
    Config,
    to_dict,
)
from fedprompt.config.shipped import load_yaml, merge, one_line, over, shipped_file
from fedprompt.data.sources.registry import all_keys
from fedprompt.errors import UserError, did_you_mean
from fedprompt.experiment.groups import GROUPS, select
from fedprompt.experiment.validate import TOP_LEVEL, validate

SELECTING = ("use", "name", "source")
"""Keys of a group that replace the whole group instead of changing it."""


def compose(
    experiment: str | Path | Config,
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Compose the config of an experiment.

    Args:
        experiment: the name of a shipped experiment, a YAML file, or a config to change.
        overrides: changes as on the command line, e.g. `federation.rounds=20`.
        changes: changes as values by key, e.g. `{"federation.rounds": 20}`. A value may be a
            mapping of keys: `{"federation": {"rounds": 20}}`. They take precedence over
            `overrides`.

    Returns:
        The complete, checked and frozen config.

    Raises:
        UserError: a file is missing, a key is unknown, or a value has the wrong type or is
            impossible.
    """
    raw = to_dict(experiment) if isinstance(experiment, Config) else _load(str(experiment))
    parsed = [_parse_override(item) for item in overrides]
    parsed += [(_path_of(key), plain_value(value, key)) for key, value in changes.items()]
    # First the overrides that select a group, then the keys within groups. `method=...` would
    # otherwise drop a key of the method that was given before it.
    for path, value in parsed:
        if _selects_group(path):
            selected = str(value) if isinstance(value, AsTyped) else value
            selection = {"source": selected} if path[-1] == "source" else selected
            raw = _layer(raw, {path[0]: selection})
    for group in GROUPS:
        raw[group] = select(group, raw.get(group))
    for path, value in parsed:
        if not _selects_group(path):
            _assign(raw, path, value)
    return validate(raw)


def plain_value(value: Any, key: str) -> Any:
    """Convert a Python value to the types that a config holds.

    Args:
        value: None, a bool, number or string, a path, a NumPy number, or lists, tuples and mappings
            of these.
        key: the config key, for messages.

    Returns:
        The value made of None, bools, numbers, strings, lists and dicts.

    Raises:
        UserError: the value has another type.
    """
    if isinstance(value, np.generic):  # first, since np.float64 is a float that OmegaConf refuses
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(k): plain_value(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item, key) for item in value]
    raise UserError(f"config: {key} is a {type(value).__name__}; a config cannot hold that.")


def parse(text: str) -> Config:
    """Read a config that `to_yaml` wrote, as the server of a deployment receives it.

    Args:
        text: a complete config as YAML; no file is read.

    Returns:
        The checked and frozen config.

    Raises:
        UserError: the text is not such a config, or `validate` refuses it.
    """
    try:
        raw: Any = with_texts(OmegaConf.to_container(OmegaConf.create(text)), text)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(f"config: this is not valid YAML: {one_line(error)}.") from None
    if not isinstance(raw, dict):
        raise UserError("config: it must hold 'key: value' lines.")
    return validate({str(key): value for key, value in raw.items()})


def _load(
    experiment: str, folder: Path | None = None, seen: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Load an experiment file and the files that it extends.

    Args:
        experiment: the name of a shipped experiment, or a YAML file.
        folder: the folder that relative paths start from.
        seen: the files that extend this one, to detect a circle.

    Returns:
        The merged keys.

    Raises:
        UserError: a file is missing or not valid, or extends itself.
    """
    if experiment.endswith((".yaml", ".yml")):
        path = (folder or Path()) / Path(experiment).expanduser()
        if not os.path.isfile(path):
            raise UserError(f"config: no file {path}.")
    else:
        path = shipped_file("experiment", experiment)
    if path.resolve() in seen:
        raise UserError(f"config: {path} extends itself.")
    raw = load_yaml(path)
    if not raw:
        raise UserError(f"config: {path} is empty; it must hold 'key: value' lines.")
    # Without a name of its own, an experiment has that of its file, not of the one it extends.
    raw.setdefault("experiment", path.stem)
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise UserError(f"config: {path}: 'extends' must name one experiment, got {base!r}.")
    return _layer(_load(base, path.parent, (*seen, path.resolve())), raw)


def _layer(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `top` over `base`; a group that `top` selects replaces the one in `base`."""
    below = dict(base)
    for group in GROUPS:
        new, old = top.get(group), below.get(group)
        chooses = not isinstance(new, Mapping) or any(key in new for key in SELECTING)
        if new is not None and chooses:
            below.pop(group, None)
        # Plain keys can only be merged into a mapping, so a bare name becomes one.
        elif isinstance(old, str):
            below[group] = {"use": old}
    return merge(below, top)


def _selects_group(path: Sequence[str]) -> bool:
    """Whether an override key replaces a whole group: `method=...`, `method.name=...`."""
    return path[0] in GROUPS and (len(path) == 1 or (len(path) == 2 and path[1] in SELECTING))


def _parse_override(item: str) -> tuple[list[str], Any]:
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise UserError(f"config: {item!r} is not key=value, e.g. federation.rounds=20.")
    path = _path_of(key.strip())
    value = read_override(item, key.strip(), text)
    if isinstance(value, AsTyped) and value.problem and (len(path) == 1 or _selects_group(path)):
        raise UserError(value.problem)
    if value is None and _selects_group(path):
        raise UserError(f"config: {item!r} has no value.")
    return path, value


def _path_of(key: str) -> list[str]:
    """Split a dotted key into its parts.

    Raises:
        UserError: the first part is not a key of a config.
    """
    path = key.split(".")
    if path[0] not in TOP_LEVEL:
        refuse_renamed(key)
        raise UserError(f"config: unknown key {key!r}.{_nearest_key(key)}")
    return path


def _nearest_key(key: str) -> str:
    """A hint with the nearest key; for a key without its section, the key with its section."""
    whole = [
        f"{name}.{field.name}"
        for name, schema in SECTIONS.items()
        for field in dataclasses.fields(schema)
    ]
    whole += [f"data.{key}" for key in all_keys()]
    close = [known for known in whole if known.partition(".")[2] == key]
    close = close or get_close_matches(key, whole, n=1, cutoff=0.8)
    return f" Did you mean '{close[0]}'?" if close else did_you_mean(key.split(".")[0], TOP_LEVEL)


def _assign(raw: dict[str, Any], path: Sequence[str], value: Any) -> None:
    node = raw
    for part in path[:-1]:
        child = node.get(part)
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise UserError(f"config: {'.'.join(path)!r}: {part!r} has no keys of its own.")
        node[part] = child
        node = child
    node[path[-1]] = over(node.get(path[-1]), value)
