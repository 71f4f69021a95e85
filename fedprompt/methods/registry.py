"""Every method by name: the modules of `fedprompt.methods`, and entry points of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedprompt.config.registry import Registry

if TYPE_CHECKING:
    from fedprompt.methods.base import Method

METHODS: Registry[Method] = Registry(
    "method",
    "fedprompt.methods",
    "fedprompt.methods.base:Method",
    helpers=("base", "batch", "registry"),
)


def all_methods() -> dict[str, type[Method]]:
    """Every method by name; this imports all of them."""
    return METHODS.all()


def method_class(name: str) -> type[Method]:
    """The method called `name`.

    Raises:
        UserError: there is no such method; the message has the nearest name.
    """
    return METHODS.get(name)
