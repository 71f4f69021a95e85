"""Every strategy by name: the modules of `fedprompt.strategies`, and entry points of others."""

from __future__ import annotations

from fedprompt.config.registry import Registry
from fedprompt.federation.strategy import SharedPromptStrategy

STRATEGIES: Registry[SharedPromptStrategy] = Registry(
    "strategy", "fedprompt.strategies", SharedPromptStrategy
)


def all_strategies() -> dict[str, type[SharedPromptStrategy]]:
    """Every strategy by name; imports all of them."""
    return STRATEGIES.all()


def strategy_class(name: str) -> type[SharedPromptStrategy]:
    """The strategy called `name`.

    Raises:
        UserError: there is no such strategy; the message has the nearest name.
    """
    return STRATEGIES.get(name)
