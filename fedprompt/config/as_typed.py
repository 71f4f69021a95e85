"""Values of YAML files and overrides that keep the text from which they were read.

YAML 1.1 reads `yes` as true, `010` as 8 and `12:30` as 750. Whether that is meant depends on the
key: a class may be called `yes`, and a folder `001`. So readers keep the text of such values, and
`fields.build` decides by the type of the key which of the two it takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf

from fedprompt.errors import UserError

_TAG = "tag:yaml.org,2002:"


class _Texts(yaml.SafeLoader):  # type: ignore[misc]
    """Reads every scalar as text, and merges mappings (`<<`) like any other loader."""

    # Without a resolver, a scalar is a text, except for the key `<<`.
    yaml_implicit_resolvers = {"<": [(f"{_TAG}merge", re.compile("^<<$"))]}  # noqa: RUF012


# The same for scalars with a tag, such as `!!int 5`.
for _kind in ("bool", "int", "float", "null", "timestamp"):
    _Texts.add_constructor(f"{_TAG}{_kind}", yaml.SafeLoader.construct_yaml_str)


@dataclass(frozen=True)
class AsTyped:
    """A scalar as the user typed it, and what YAML makes of it.

    Attributes:
        text: the text.
        value: the value in YAML 1.1.
        problem: why the text is not valid YAML, as a message to the user; empty if it is valid.
    """

    text: str
    value: bool | int | float | str | None
    problem: str = ""

    def __repr__(self) -> str:
        """The value, as messages show it."""
        return repr(self.value)

    def __str__(self) -> str:
        """The text."""
        return self.text


def with_texts(loaded: Any, text: str) -> Any:
    """Replace the scalars of a YAML document that are no texts by `AsTyped`.

    Args:
        loaded: the document as a reader for YAML 1.1 yields it.
        text: the document.

    Returns:
        The document. A null that is the value of a key stays None; a null in a list is `AsTyped`.
    """
    return _with_texts(loaded, yaml.load(text, Loader=_Texts))


def read_override(item: str, key: str, text: str) -> Any:
    """Read the value of an override.

    Args:
        item: the override, for messages.
        key: its key.
        text: the part behind `=`.

    Returns:
        A mapping, a list, None, the content of a quoted text, or an `AsTyped`. A text that is not
        valid YAML is an `AsTyped` with a problem: for a key that takes a text, it is none.

    Raises:
        UserError: the text is not UTF-8, as a file name on the command line may be.
    """
    bare = text.strip()
    if not text.isascii() and text.encode(errors="replace").decode() != text:
        raise UserError(f"config: {item!a} is not text in UTF-8.")
    try:
        loaded: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        value = with_texts(loaded["value"], text)
    except Exception as error:  # the errors of OmegaConf and PyYAML have no common base class
        reason = " ".join(str(error).split())
        return AsTyped(bare, bare, f"config: cannot read {item!r}: {reason}. {_quoted(key, bare)}")
    # A text without quotation marks is all of the argument; in YAML, it would end at a ` #`.
    if isinstance(value, str) and bare[:1] not in ("'", '"') and "\n" not in bare:
        return AsTyped(bare, value)
    return value


def plain(value: Any) -> Any:
    """A value as YAML yields it, without the texts.

    Raises:
        UserError: the value is an override that is not valid YAML.
    """
    if isinstance(value, AsTyped):
        if value.problem:
            raise UserError(value.problem)
        return value.value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def typed_text(value: Any) -> str:
    """A value as messages show it: text in quotation marks, other scalars as typed."""
    if isinstance(value, AsTyped):
        return repr(value.text) if isinstance(value.value, str) else value.text
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(typed_text, value))}]"
    return repr(plain(value))


def for_kind(value: Any, kind: Any, where: str) -> Any:
    """What a key of some type takes of a value.

    Args:
        value: a value with `AsTyped` in it.
        kind: the type of the key: text, numbers, `Literal`, None, or lists and mappings of these.
        where: the key, for messages.

    Returns:
        The value without `AsTyped`: text where the type asks for text, else what YAML yields. It
        need not have the type.

    Raises:
        UserError: the value is not valid YAML and no text, or it is a number in a notation that
            most people would read as another number.
    """
    kinds = _alternatives(kind)
    if isinstance(value, AsTyped):
        return _scalar(value, kinds, where)
    if isinstance(value, Mapping):
        inner = next((get_args(k)[1] for k in kinds if get_origin(k) is dict), Any)
        return {key: for_kind(item, inner, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        inner = next((get_args(k)[0] for k in kinds if get_origin(k) is list), Any)
        return [for_kind(item, inner, where) for item in value]
    return value


def _scalar(scalar: AsTyped, kinds: tuple[Any, ...], where: str) -> Any:
    value = scalar.value
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if scalar.text in choices or (str in kinds and isinstance(value, str)):
        return scalar.text
    if value is None and NoneType in kinds:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and (float in kinds or (int in kinds and isinstance(value, int))):
        if re.search(r"^[-+]?0[0-7_]+$|:", scalar.text):
            raise UserError(
                f"config: {where} is {scalar.text}, which YAML reads as {value}; write {value}, or "
                "the number that you mean without leading zeros and colons."
            )
        return value
    if isinstance(value, bool) and bool in kinds:
        return value
    takes_text = str in kinds or any(isinstance(choice, str) for choice in choices)
    return scalar.text if takes_text else plain(scalar)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _with_texts(value: Any, typed: Any) -> Any:
    """`value` with the texts of its scalars, from the same document read as texts."""
    if isinstance(value, dict):
        texts = typed if isinstance(typed, dict) else {}
        names = list(texts) if len(texts) == len(value) else list(value)
        # `yes` as a key is text as well: no key is a number or a truth value.
        return {
            key if isinstance(key, str) else name: _with_texts(item, texts.get(name))
            for (key, item), name in zip(value.items(), names, strict=True)
        }
    if isinstance(value, list):
        fits = isinstance(typed, list) and len(typed) == len(value)
        return [
            AsTyped(text, None) if item is None and text else _with_texts(item, text)
            for item, text in zip(value, typed if fits else [None] * len(value), strict=True)
        ]
    if isinstance(value, (bool, int, float)) and isinstance(typed, str):
        return AsTyped(typed, value)
    return value


def _quoted(key: str, text: str) -> str:
    """How to write a text that YAML cannot read."""
    parts = [part.strip().strip("'\"") for part in text.strip("[]").split(",")]
    example = json.dumps(parts if text.startswith("[") else text, ensure_ascii=False)
    return (
        "Texts with brackets, braces, commas, colons or '#' need double quotes, and the argument "
        f"single ones: '{key}={example}'."
    )
