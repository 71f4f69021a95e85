"""Every method by name: the modules of `fedprompt.methods`, and other distributions' entry points.

Server, clients and command line all find a method here by the value of `method.name`. A name is
the name of a module, so a new file is a new method and no list has to be edited.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedprompt.config.registry import Registry

if TYPE_CHECKING:
    from fedprompt.backbone.clip import FrozenCLIP
    from fedprompt.methods.base import Method, Task

METHODS: Registry[Method] = Registry(
    "method",
    "fedprompt.methods",
    # The class is named by text, so that names can be listed without importing PyTorch.
    "fedprompt.methods.base:Method",
    # Modules of the package that are not methods.
    helpers=("base", "batch", "method_config", "registry"),
)


def all_methods() -> dict[str, type[Method]]:
    """Return every method class by name; this imports all of their modules."""
    return METHODS.all()


def method_class(name: str) -> type[Method]:
    """Return the class of the method called `name`.

    Raises:
        UserError: there is no such method; the message suggests the nearest name.
    """
    return METHODS.get(name)


def zero_shot(clip: FrozenCLIP, task: Task) -> Method:
    """Zero-shot CLIP, which protocols compare with.

    Args:
        clip: the frozen backbone.
        task: the class names and templates.
    """
    found = method_class("zero_shot")
    return found(found.Config(), clip, task)
