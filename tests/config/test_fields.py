"""The limits of single options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest

from fedprompt.config.fields import build, option
from tests.support.refusals import refused


@dataclass(frozen=True)
class Limits:
    """One field per limit."""

    count: int = option(5, "a count", ge=1, le=9)
    share: float = option(0.5, "a share", gt=0, lt=1)
    maybe: float | None = option(None, "a number or nothing", gt=0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"count": 1}, None),
        ({"count": 9}, None),
        ({"count": 0}, "at least 1"),
        ({"count": 10}, "at most 9"),
        ({"share": 0.999}, None),
        ({"share": 0.0}, "greater than 0"),
        ({"share": 1}, "less than 1"),
        ({"share": -1e-9}, "greater than 0"),
        ({"maybe": None}, None),
        ({"maybe": 0}, "greater than 0"),
        ({"maybe": "much"}, "a number or null"),
    ],
)
def test_limits(values: dict[str, Any], words: str | None) -> None:
    if words is None:
        assert dataclasses.asdict(build(Limits, values, "x")).items() >= values.items()
    else:
        (key,) = values
        line = refused(lambda: build(Limits, values, "x"))
        assert line.startswith(f"config: x.{key} is ")
        assert line.endswith(f"it must be {words}.")
