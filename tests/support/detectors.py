"""A method's own strategy, with what it needs beside CLIPs of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedprompt.methods.base import Method

DETECTOR = str(Path(__file__).with_name("detector_32.json"))
"""A detector of `sabre_fl` for embeddings of 32 numbers, those of `builders.random_clip`.

The one that is shipped is for the embedded CLIP.
"""


def strategy_of(method: Method) -> dict[str, Any]:
    """The `strategy` section of the method's paper."""
    keys = dict(method.config.default_strategy)
    return keys | ({"detector": DETECTOR} if keys["name"] == "sabre_fl" else {})
