"""How a sweep names its runs, as reports and comparisons read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

PLAN = "sweep.json"
"""In the sweep's folder: which runs belong to it, by row, grid values and seed."""


def describe(values: Mapping[str, Any]) -> str:
    """Grid values as `alpha 0.1, clients 5`: the last part of each key is enough to read."""
    return ", ".join(f"{key.rpartition('.')[2]} {plain(value)}" for key, value in values.items())


def plain(value: Any) -> str:
    """A grid value without quotation marks."""
    return value if isinstance(value, str) else json.dumps(value)
