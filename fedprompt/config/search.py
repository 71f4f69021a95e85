"""Search spaces of config keys: where `fedprompt tune` looks for a value.

A space stands beside the option that it is for, and a tuning file may replace it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedprompt.errors import UserError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        low: the smallest value.
        high: the largest value.
        log: whether values are drawn evenly on a logarithmic scale, as suits learning rates and
            weights.
    """

    low: float
    high: float
    log: bool = False

    def __contains__(self, value: object) -> bool:
        """Whether a value lies in the range."""
        return isinstance(value, (int, float)) and self.low <= value <= self.high


@dataclass(frozen=True)
class Choices:
    """One of some values.

    Attributes:
        values: two or more different ones.
    """

    values: tuple[Any, ...]

    def __contains__(self, value: object) -> bool:
        """Whether a value is one of them."""
        return value in self.values


Space = Range | Choices
"""Where to look for the value of one key."""


def log_range(low: float, high: float) -> Range:
    """A logarithmic range."""
    return Range(low, high, log=True)


def space_from(key: str, value: Any) -> Space:
    """Read the space of a key from YAML.

    Args:
        key: the config key, for messages.
        value: a list of values, or `{low: ..., high: ..., log: true or false}`.

    Returns:
        The space.

    Raises:
        UserError: the value has neither form, or leaves nothing to choose from.
    """
    if isinstance(value, list):
        if len(value) < 2 or any(value[i] in value[:i] for i in range(len(value))):
            raise UserError(f"space: {key} is {value!r}; list two or more different values.")
        return Choices(tuple(value))
    if not isinstance(value, Mapping) or not {"low", "high"} <= set(value) <= {
        "low",
        "high",
        "log",
    }:
        raise UserError(
            f"space: {key} is {value!r}; give a list of values, or {{low: ..., high: ..., log: "
            "true}}."
        )
    low, high, log = value["low"], value["high"], value.get("log", False)
    numbers = all(
        isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n)
        for n in (low, high)
    )
    if not numbers or not isinstance(log, bool) or not low < high or (log and low <= 0):
        raise UserError(
            f"space: {key} is {dict(value)!r}; 'low' must be below 'high', and above 0 if 'log' is "
            "true."
        )
    return Range(float(low), float(high), log)
