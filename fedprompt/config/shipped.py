"""Reads the YAML files that ship with the package, and merges nested mappings.

The keys that a user sets are merged over those of the shipped file that the user selects.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprompt.config.as_typed import with_texts
from fedprompt.errors import UserError, did_you_mean


def configs_dir() -> Path:
    """The folder of the shipped files."""
    package = Path(__file__).parents[1]
    # The wheel installs the folder inside the package; in a checkout it lies beside it.
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_names(group: str) -> list[str]:
    """The names of the shipped files of one group, e.g. `shipped_names("experiment")`."""
    return sorted(path.stem for path in (configs_dir() / group).glob("*.yaml"))


def shipped_file(group: str, name: Any, also: Sequence[str] = ()) -> Path:
    """Find a shipped file by its name.

    Args:
        group: a folder of `configs/`.
        name: name of the file without `.yaml`.
        also: other names that the user may write in this place; the message may suggest them.

    Returns:
        Path of the file.

    Raises:
        UserError: there is no such file.
    """
    known = shipped_names(group)
    # Only listed names are accepted: a path such as `../x` must not select a file.
    if name not in known:
        hint = did_you_mean(str(name), sorted([*known, *also]))
        raise UserError(f"config: no {group} {str(name)!r}.{hint}")
    return configs_dir() / group / f"{name}.yaml"


def yaml_file(group: str, name: str) -> Path:
    """Return the shipped file of a group, or `name` itself if it is a YAML file.

    Args:
        group: a folder of `configs/`, e.g. `sweep`.
        name: the name of a shipped file, or a path that ends in `.yaml` or `.yml`.

    Returns:
        The path of the file. A YAML file need not exist; `load_yaml` reports that.

    Raises:
        UserError: there is no shipped file with this name.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name).expanduser()
    known = shipped_names(group)
    if name not in known:
        raise UserError(f"{group}: no {group} {name!r}.{did_you_mean(name, known)}")
    return configs_dir() / group / f"{name}.yaml"


def refuse_unknown(values: Iterable[Any], known: Sequence[str], where: str) -> None:
    """Refuse keys that a file cannot have.

    Args:
        values: the keys of the file, or a mapping with them.
        known: those that it can have.
        where: the command and the file, for the message.

    Raises:
        UserError: a key is unknown; the message suggests the nearest one.
    """
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}.{did_you_mean(key, known)}")


def purpose(path: Path) -> str:
    """Return the first sentence of the comment with which a shipped file begins.

    Args:
        path: the file.
    """
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # An indented line of the comment is a command.
        if not line.startswith("# ") or line.startswith("#  "):
            break
        words.append(line.removeprefix("# "))
    text, depth = " ".join(words), 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        # Neither the initial of a name nor a citation in brackets ends a sentence.
        initial = i > 0 and text[i - 1].isupper() and (i < 2 or text[i - 2] == " ")
        if character == "." and depth == 0 and not initial and text[i + 1 : i + 2] in ("", " "):
            return text[:i]
    return text.rstrip(":")


def load_yaml(path: Path, what: str = "config") -> dict[str, Any]:
    """Read a YAML file that contains a mapping.

    Args:
        path: the file.
        what: what messages begin with: the kind of file.

    Returns:
        The mapping, with `AsTyped` where a scalar is no text. Interpolations such as `${...}` are
        left as text.

    Raises:
        UserError: the file cannot be read, is not valid YAML or contains no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{what}: cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{what}: {path} is not text in UTF-8 (line {line}); save it in that encoding."
        ) from None
    try:
        loaded = copy.deepcopy(_parsed(text))
    except OSError:  # OmegaConf's error for a document that is a number, for example
        raise UserError(f"{what}: {path} must hold 'key: value' lines.") from None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(
            f"{what}: {path} is not valid YAML: {one_line(error)}. Texts with brackets, braces, "
            "colons or '#' need quotation marks."
        ) from None
    if not isinstance(loaded, dict):
        raise UserError(f"{what}: {path} must hold 'key: value' lines.")
    return {str(k): v for k, v in loaded.items()}


@lru_cache(maxsize=64)
def _parsed(text: str) -> Any:
    """What a YAML text says; kept, because every run of a sweep composes the same few files."""
    # `to_container` does not resolve `${...}`, so that `fields.build` sees and refuses it.
    return with_texts(OmegaConf.to_container(OmegaConf.load(io.StringIO(text))), text)


def one_line(error: Exception) -> str:
    """The message of an error with its line breaks replaced by spaces."""
    # OmegaConf adds lines on its own objects.
    return " ".join(str(error).partition("\n    full_key:")[0].split())


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings into a new one.

    Args:
        base: the defaults.
        top: what takes precedence. Mappings are merged at every depth; other values, lists
            included, replace those of `base`.

    Returns:
        The merged mapping.
    """
    return {**base, **{key: over(base.get(key), value) for key, value in top.items()}}


def over(old: Any, new: Any) -> Any:
    """`new` merged over `old` if both are mappings, else `new`."""
    both = isinstance(old, Mapping) and isinstance(new, Mapping)
    return merge(old, new) if both else new
