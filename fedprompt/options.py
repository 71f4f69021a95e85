"""Config fields that carry their own help text and limits, so that one place checks them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedprompt.errors import UserError, did_you_mean

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A dataclass field with a help line and optional limits (`gt` and `lt` are exclusive)."""
    metadata = {"help": help, "gt": gt, "ge": ge, "le": le, "lt": lt}
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
            hint = did_you_mean(str(key), list(fields))
            raise UserError(f"config: unknown key '{where}.{key}'.{hint}")
    structured = OmegaConf.structured(schema)
    for key, value in values.items():
        try:
            merged = OmegaConf.merge(structured, {key: value})
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"config: {where}.{key}: {reason}.") from None
        structured = merged
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


def _check_limits(where: str, value: Any, limits: Mapping[str, Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if isinstance(value, float) and value != value:
        raise UserError(f"config: {where} is NaN.")
    rules = (
        ("gt", value.__gt__, "greater than"),
        ("ge", value.__ge__, "at least"),
        ("le", value.__le__, "at most"),
        ("lt", value.__lt__, "less than"),
    )
    for name, holds, words in rules:
        limit = limits.get(name)
        if limit is not None and holds(type(value)(limit)) is not True:
            raise UserError(f"config: {where} is {value}; it must be {words} {limit}.")
