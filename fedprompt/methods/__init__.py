"""Prompt-learning methods, one paper per file; shared building blocks are in `parts/`.

>>> import fedprompt
>>> "promptfl" in fedprompt.methods.names()
True
>>> fedprompt.methods.get("promptfl").source
'Guo et al., IEEE TMC 2023'
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedprompt.methods.registry import METHODS

if TYPE_CHECKING:
    from fedprompt.methods.base import Method


def names() -> list[str]:
    """The names of all methods, those of other installed distributions included."""
    return METHODS.names()


def get(name: str) -> type[Method]:
    """The method class with this name.

    Raises:
        UserError: there is no such method; the message suggests the nearest name.
    """
    return METHODS.get(name)
