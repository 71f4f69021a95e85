"""Config fields that carry their help text and limits, and the function that checks them.

The sections of an experiment and the `Config` classes of methods, strategies, protocols and data
sources are dataclasses whose fields are made by `option`. One definition thus serves the checks,
the shell completion and the generated documentation.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import operator
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprompt.config.as_typed import AsTyped, for_kind, typed_text
from fedprompt.config.renamed import refuse_renamed
from fedprompt.config.search import Space
from fedprompt.errors import UserError, did_you_mean

T = TypeVar("T")
MAX_SHOWN = 200
"""Characters of a refused value that a message shows."""
MAX_INTEGER = 10**18

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
    search: Space | None = None,
) -> Any:
    """Declare a config key: a dataclass field with a help text and optional limits.

    Args:
        default: value of the key if the user sets none. A list is copied for every instance.
        help: one line for the documentation and the shell completion.
        gt: exclusive lower limit of a number.
        ge: inclusive lower limit.
        le: inclusive upper limit.
        lt: exclusive upper limit.
        path: whether the value names a file or folder of this machine. Such a value means nothing
            on another machine.
        search: where `fedprompt tune` looks for a value; None if it keeps the key as it is.

    Returns:
        The field, typed as `Any` so that it can be assigned to an annotation of any type.
    """
    metadata: dict[str, Any] = {"help": help, "gt": gt, "ge": ge, "le": le, "lt": lt, "path": path}
    metadata["search"] = search
    if isinstance(default, list):
        # Dataclasses refuse a mutable default, which all instances would share.
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def build(schema: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build an instance of a config dataclass from plain values and check it.

    Args:
        schema: the dataclass; its fields are made by `option`. Its `check` method, if it has one,
            is called on the result.
        values: a mapping from keys to values as YAML yields them, with or without their texts
            (`AsTyped`). Missing keys get their defaults.
        where: path of the section for messages, e.g. `training`.

    Returns:
        The instance, with every value converted to the type of its field.

    Raises:
        UserError: a key is unknown (the message suggests the nearest one), or a value has the wrong
            type, is outside its limits or is refused by `check`.
    """
    fields = {f.name: f for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            # A renamed key gets its new name, not the most similar spelling.
            refuse_renamed(f"{where}.{key}")
            hint = did_you_mean(str(key), list(fields))
            raise UserError(f"config: unknown key {f'{where}.{key}'!r}.{hint}")
    built = _from_values(schema, values, where)
    # Limits are checked last, when OmegaConf has converted text such as `0.1` to numbers.
    for name, field in fields.items():
        _check_limits(f"{where}.{name}", getattr(built, name), field.metadata)
    check = getattr(built, "check", None)
    if check is not None:
        try:
            check()
        except UserError as error:
            raise UserError(f"config: {where}: {error}") from None
    return built


def _from_values(schema: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance whose values have the types of its fields; limits are not checked."""
    if not values:  # as in most sections of most configs
        return cast("T", copy.deepcopy(_default(schema)))  # type: ignore[arg-type]
    structured = copy.deepcopy(_structured(schema))  # type: ignore[arg-type]
    # The annotations are strings (`from __future__ import annotations`); this evaluates them.
    kinds = _hints(schema)  # type: ignore[arg-type]
    # Key by key, so that the message can name the key whose value is refused.
    for key, typed in values.items():
        value = for_kind(typed, kinds[key], f"{where}.{key}")
        _refuse_placeholders(f"{where}.{key}", value)
        try:
            OmegaConf.update(structured, key, value, merge=False)
        except (OmegaConfBaseException, ValueError, TypeError, OverflowError):
            shown = typed_text(typed)
            shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
            raise UserError(
                f"config: {where}.{key} is {shown}; it must be {in_words(kinds[key])}."
                f"{_nearest(kinds[key], value)}{_as_list(kinds[key], typed)}"
            ) from None
    built = OmegaConf.to_object(structured)
    assert isinstance(built, schema)
    return built


@functools.cache
def _default(schema: type[Any]) -> Any:
    """The instance without any value of the user, as most sections of most configs are."""
    return OmegaConf.to_object(_structured(schema))  # type: ignore[arg-type]


@functools.cache
def _structured(schema: type[Any]) -> Any:
    """The schema as OmegaConf sees it, made once: a copy of it is several times as fast."""
    structured = OmegaConf.structured(schema)
    # The schemas are frozen, which OmegaConf applies to their configs as well.
    OmegaConf.set_readonly(structured, False)
    return structured


@functools.cache
def _hints(schema: type[Any]) -> dict[str, Any]:
    return get_type_hints(schema)


def _refuse_placeholders(where: str, value: Any) -> None:
    """Refuse `${...}`, which OmegaConf would fill in, even from the environment, and `???`.

    OmegaConf takes `???` for a missing value and would drop it.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_placeholders(f"{where}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_placeholders(where, item)
    elif isinstance(value, str) and ("${" in value or value == "???"):
        raise UserError(f"config: {where} is {value!r}; write the value itself.")


def in_words(kind: Any) -> str:
    """Describe the values of a type for messages and documentation, e.g. `a number or null`."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if kind in _WORDS:
        return _WORDS[kind]
    return " or ".join(in_words(part) for part in get_args(kind)) or str(kind)


def _nearest(kind: Any, value: Any) -> str:
    """A suggestion if the value is close to one of the choices of a `Literal`, else nothing."""
    choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
    hint = did_you_mean(str(value), choices)
    # Otherwise the hint lists all choices, which the message does already.
    return hint if hint.startswith(" Did") else ""


def _as_list(kind: Any, value: Any) -> str:
    """How to write texts as a list, if that is what is missing."""
    if kind != list[str] or isinstance(value, Mapping):
        return ""
    items = value if isinstance(value, list) else [value]
    texts = [item.text if isinstance(item, AsTyped) else str(item) for item in items if item]
    return f" Write [{', '.join(json.dumps(t, ensure_ascii=False) for t in texts)}]."


def _check_limits(where: str, value: Any, limits: Mapping[str, Any]) -> None:
    # `bool` is a subclass of `int`, but limits do not apply to it.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    # Other libraries hold whole numbers in 64 bits.
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise UserError(f"config: {where} has more than 18 digits; it must be a smaller number.")
    # YAML has `.nan` and `.inf`; infinity would pass every lower limit.
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config: {where} is {value}; it must be a finite number.")
    for name, holds, words in _RULES:
        limit = limits.get(name)
        if limit is not None and not holds(value, limit):
            raise UserError(f"config: {where} is {value}; it must be {words} {limit}.")
