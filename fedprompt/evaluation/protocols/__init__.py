"""Evaluation protocols, one per file; the name of the file selects a protocol in a config.

>>> import fedprompt
>>> "calibration" in fedprompt.protocols.names()
True
>>> fedprompt.protocols.get("calibration").name
'calibration'
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedprompt.config.registry import Registry

if TYPE_CHECKING:
    from fedprompt.evaluation.protocol import Protocol

PROTOCOLS: Registry[Protocol] = Registry(
    "protocol",
    "fedprompt.evaluation.protocols",
    "fedprompt.evaluation.protocol:Protocol",
    group="fedprompt.protocols",
)


def names() -> list[str]:
    """The names of all protocols, including those of other installed distributions."""
    return PROTOCOLS.names()


def get(name: str) -> type[Protocol]:
    """The protocol class with this name.

    Raises:
        UserError: there is no such protocol; the message suggests the nearest name.
    """
    return PROTOCOLS.get(name)
