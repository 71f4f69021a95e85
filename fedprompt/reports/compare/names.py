"""How a sweep names its runs: written by the sweep, read by reports and comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

PLAN = "sweep.json"
"""The file in a sweep's folder that lists its runs by row, grid values and seed."""


def describe(values: Mapping[str, Any]) -> str:
    """Format grid values as `alpha 0.1, clients 5`, with the last part of each key."""
    return ", ".join(f"{key.rpartition('.')[2]} {plain(value)}" for key, value in values.items())


def plain(value: Any) -> str:
    """Format a setting's value without quotation marks."""
    return value if isinstance(value, str) else json.dumps(value)
