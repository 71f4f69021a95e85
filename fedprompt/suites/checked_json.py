"""Builds dataclasses from JSON that anyone may have written, and checks every value on the way.

The annotations of a dataclass are its schema. `Annotated[float, Limits(0, 1)]` limits a number, and
`Annotated[str, Pattern(...)]` the form of a text.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from fedprompt.errors import UserError, did_you_mean
from fedprompt.runtime.peer_text import sanitised

T = TypeVar("T")
LONGEST_TEXT = 1000
"""Characters that a text may have; all of ours are single lines."""
LARGEST = 2**63 - 1
"""The largest whole number; readers in other languages hold them in 64 bits."""
SHOWN = 80
"""Characters of a refused value that a message shows."""


@dataclass(frozen=True)
class Limits:
    """The smallest and the largest value of a number."""

    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Pattern:
    """The form of a text: a regular expression for all of it, and how a message describes it."""

    expression: str
    words: str


def key_of(field: str) -> str:
    """The JSON key of a field, e.g. `global` of `global_`, which Python does not allow."""
    return field.removesuffix("_")


def build(kind: type[T], value: Any) -> T:
    """Build a dataclass from a JSON object.

    Args:
        kind: the dataclass. Its fields are texts, numbers, dataclasses, mappings from texts or
            whole numbers to these, `tuple[X, ...]`, `X | None`, or `Any`, which takes every JSON
            value. A field with a default may be absent.
        value: the object as `json.loads` returns it, without NaN and infinity.

    Returns:
        An instance whose whole content has the annotated types.

    Raises:
        UserError: a field is missing or unknown, or its value has the wrong type or is outside its
            limits. The message names the field by its path, e.g. `scenarios.few-shot.metric`.
    """
    built = _value(kind, value, "")
    assert isinstance(built, kind)
    return built


def plain(value: Any) -> Any:
    """The JSON value of a dataclass, the inverse of `build`; fields at their default are absent."""
    if dataclasses.is_dataclass(value):
        return {
            key_of(field.name): plain(item)
            for field in dataclasses.fields(value)
            if (item := getattr(value, field.name)) != field.default
        }
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _value(kind: Any, value: Any, where: str) -> Any:
    if get_origin(kind) is Annotated:
        bare, rule = get_args(kind)
        built = _value(bare, value, where)
        _check(rule, built, where)
        return built
    if get_origin(kind) in (Union, UnionType):
        inner, none = get_args(kind)
        assert none is NoneType
        return None if value is None else _value(inner, value, where)
    if get_origin(kind) is Mapping:
        return _mapping(kind, value, where)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where} is {_shown(value)}; it must be a list.")
        return tuple(_value(get_args(kind)[0], item, where) for item in value)
    if dataclasses.is_dataclass(kind):
        return _object(kind, value, where)
    if kind is Any:
        return value
    return _scalar(kind, value, where)


def _object(kind: Any, value: Any, where: str) -> Any:
    values = _as_object(value, where)
    kinds = get_type_hints(kind, include_extras=True)
    fields = {key_of(field.name): field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise UserError(f"{_path(where, key)} is unknown.{did_you_mean(key, list(fields))}")
    built = {}
    for key, field in fields.items():
        if key in values:
            built[field.name] = _value(kinds[field.name], values[key], _path(where, key))
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{_path(where, key)} is missing.")
    return kind(**built)


def _mapping(kind: Any, value: Any, where: str) -> Any:
    key_kind, item_kind = get_args(kind)
    built = {}
    for key, item in _as_object(value, where).items():
        at = _path(where, key)
        if key_kind is int:
            # One spelling for each number, so that two keys cannot be the same.
            if not re.fullmatch(r"0|[1-9][0-9]{0,17}", key):
                raise UserError(f"{at} must be named by a whole number of at most 18 digits.")
            built[int(key)] = _value(item_kind, item, at)
        else:
            built[_scalar(str, key, f"the name {at}")] = _value(item_kind, item, at)
    return built


def _scalar(kind: type, value: Any, where: str) -> Any:
    # `bool` is a subclass of `int`.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number and abs(value) <= LARGEST:
        return float(value)
    if kind is int and isinstance(value, int) and number and abs(value) <= LARGEST:
        return value
    if kind is str and isinstance(value, str):
        # The texts of others are printed, and must not control a terminal.
        if len(value) <= LONGEST_TEXT and value.isprintable():
            return value
        raise UserError(
            f"{where} must be one line of at most {LONGEST_TEXT} characters without control "
            "characters."
        )
    words = {float: "a number", int: "a whole number", str: "text"}[kind]
    raise UserError(f"{where} is {_shown(value)}; it must be {words}.")


def _check(rule: Limits | Pattern, value: Any, where: str) -> None:
    if isinstance(rule, Pattern):
        if not re.fullmatch(rule.expression, value):
            raise UserError(f"{where} is {_shown(value)}; it must be {rule.words}.")
    elif not rule.low <= value <= rule.high:
        words = f"at least {rule.low:g}" if rule.high == math.inf else ""
        words = words or f"from {rule.low:g} to {rule.high:g}"
        raise UserError(f"{where} is {_shown(value)}; it must be {words}.")


def _as_object(value: Any, where: str) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    raise UserError(f"{where or 'the content'} is {_shown(value)}; it must be a JSON object.")


def _path(where: str, key: str) -> str:
    return f"{where}.{sanitised(key, SHOWN)}".lstrip(".")


def _shown(value: Any) -> str:
    return sanitised(json.dumps(value, ensure_ascii=False), SHOWN)
