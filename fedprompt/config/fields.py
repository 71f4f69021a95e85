"""Config fields that carry their own help text and limits, so that one place checks them all."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprompt.config.renamed import refuse_renamed
from fedprompt.errors import UserError, did_you_mean

T = TypeVar("T")

_RULES: tuple[tuple[str, Callable[[Any, Any], bool], str], ...] = (
    ("gt", operator.gt, "greater than"),
    ("ge", operator.ge, "at least"),
    ("le", operator.le, "at most"),
    ("lt", operator.lt, "less than"),
)
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "a list of texts",
    list[float]: "a list of numbers",
    list[int]: "a list of whole numbers",
    list[Any]: "a list",
    dict[str, Any]: "keys and values",
    NoneType: "null",
}


def option(
    default: Any,
    help: str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    path: bool = False,
) -> Any:
    """A dataclass field with a help line and optional limits (`gt` and `lt` are exclusive).

    `path` marks what names a file or folder of this machine: no other machine follows it.
    """
    metadata = {"help": help, "gt": gt, "ge": ge, "le": le, "lt": lt, "path": path}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def build(schema: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `schema` from plain `values`, checked.

    Raises:
        UserError: unknown key (with the nearest known one), wrong type, or a value outside its
            limits. `where` is the key's path for the message, e.g. `training`.
    """
    fields = {f.name: f for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            refuse_renamed(f"{where}.{key}")
            hint = did_you_mean(str(key), list(fields))
            raise UserError(f"config: unknown key {f'{where}.{key}'!r}.{hint}")
    structured = OmegaConf.structured(schema)
    kinds = get_type_hints(schema)
    for key, value in values.items():
        _refuse_placeholders(f"{where}.{key}", value)
        try:
            structured = OmegaConf.merge(structured, {key: value})
        except (OmegaConfBaseException, ValueError, TypeError):
            raise UserError(
                f"config: {where}.{key} is {value!r}; it must be {in_words(kinds[key])}."
                f"{_nearest(kinds[key], value)}"
            ) from None
    built = OmegaConf.to_object(structured)
    assert isinstance(built, schema)
    for name, field in fields.items():
        _check_limits(f"{where}.{name}", getattr(built, name), field.metadata)
    check = getattr(built, "check", None)
    if check is not None:
        try:
            check()
        except UserError as error:
            raise UserError(f"config: {where}: {error}") from None
    return built


def _refuse_placeholders(where: str, value: Any) -> None:
    """OmegaConf would fill in `${...}`, even from the environment, and drop `???`; we refuse."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_placeholders(f"{where}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_placeholders(where, item)
    elif isinstance(value, str) and ("${" in value or value == "???"):
        raise UserError(f"config: {where} is {value!r}; write the value itself.")


def in_words(kind: Any) -> str:
    """What a value of this type is, for messages and the documentation: `a number or null`."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if kind in _WORDS:
        return _WORDS[kind]
    return " or ".join(in_words(part) for part in get_args(kind)) or str(kind)


def _nearest(kind: Any, value: Any) -> str:
    """A hint where the value is nearly one of a few choices."""
    choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
    hint = did_you_mean(str(value), choices)
    return hint if hint.startswith(" Did") else ""


def _check_limits(where: str, value: Any, limits: Mapping[str, Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config: {where} is {value}; it must be a finite number.")
    for name, holds, words in _RULES:
        limit = limits.get(name)
        if limit is not None and not holds(value, limit):
            raise UserError(f"config: {where} is {value}; it must be {words} {limit}.")
