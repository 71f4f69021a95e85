"""The YAML files that ship with the package, and how one mapping is laid over another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprompt.errors import UserError, did_you_mean


def configs_dir() -> Path:
    """The folder of the shipped files: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_names(group: str) -> list[str]:
    """Names of the shipped files of one group, e.g. `shipped_names("experiment")`."""
    return sorted(path.stem for path in (configs_dir() / group).glob("*.yaml"))


def shipped_file(group: str, name: Any, also: Sequence[str] = ()) -> Path:
    """The shipped file of that name; names select files, paths never do.

    Args:
        group: a folder of `configs/`.
        name: the file's name without its ending.
        also: names that the user may write here besides, for the suggestion in the message.

    Raises:
        UserError: there is no such file.
    """
    known = shipped_names(group)
    if name not in known:
        hint = did_you_mean(str(name), sorted([*known, *also]))
        raise UserError(f"config: no {group} {str(name)!r}.{hint}")
    return configs_dir() / group / f"{name}.yaml"


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        UserError: the file is missing, is not valid YAML or holds something else.
    """
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UserError(f"config: cannot read {path}: {error.strerror}.") from None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(f"config: {path} is not valid YAML: {one_line(error)}.") from None
    if not isinstance(loaded, dict):
        raise UserError(f"config: {path} must hold 'key: value' lines.")
    return {str(k): v for k, v in loaded.items()}


def one_line(error: Exception) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` laid over `base`, mappings within them too."""
    return {**base, **{key: over(base.get(key), value) for key, value in top.items()}}


def over(old: Any, new: Any) -> Any:
    """`new`, laid over `old` where both are mappings."""
    both = isinstance(old, Mapping) and isinstance(new, Mapping)
    return merge(old, new) if both else new
