"""Prompt-learning methods. Every module of this package is one; names select, paths never."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import fedprompt.methods as package
from fedprompt.errors import UserError, did_you_mean
from fedprompt.methods.base import Batch, Method, Task, Tensors

__all__ = ["Batch", "Method", "Task", "Tensors", "all_methods", "method_class"]


@cache
def all_methods() -> dict[str, type[Method]]:
    """Every method by name, found by importing the modules of this package."""
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name in ("base", "registry") or module.ispkg:
            continue
        for item in vars(importlib.import_module(f"{package.__name__}.{module.name}")).values():
            if isinstance(item, type) and issubclass(item, Method) and "name" in vars(item):
                found[item.name] = item
    return dict(sorted(found.items()))


def method_class(name: str) -> type[Method]:
    """The method called `name`; raises `UserError` with the nearest name when there is none."""
    methods = all_methods()
    if name not in methods:
        raise UserError(f"config: no method '{name}'.{did_you_mean(name, list(methods))}")
    return methods[name]
