"""Server rules on named shared tensors: no CLIP, no data set, no private tensor."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from fedprompt.errors import UserError, did_you_mean
from fedprompt.federation.strategy import SharedPromptStrategy

__all__ = ["SharedPromptStrategy", "all_strategies", "strategy_class"]


@cache
def all_strategies() -> dict[str, type[SharedPromptStrategy]]:
    """Every strategy by name, found by importing the modules of this package."""
    found: dict[str, type[SharedPromptStrategy]] = {}
    package = importlib.import_module("fedprompt.strategies")
    for module in pkgutil.iter_modules(package.__path__):
        for item in vars(importlib.import_module(f"{package.__name__}.{module.name}")).values():
            is_strategy = isinstance(item, type) and issubclass(item, SharedPromptStrategy)
            if is_strategy and "name" in vars(item):
                found[item.name] = item
    return dict(sorted(found.items()))


def strategy_class(name: str) -> type[SharedPromptStrategy]:
    """The strategy called `name`; raises `UserError` with the nearest name when there is none."""
    strategies = all_strategies()
    if name not in strategies:
        hint = did_you_mean(name, list(strategies))
        raise UserError(f"config: no strategy '{name}'.{hint}")
    return strategies[name]
