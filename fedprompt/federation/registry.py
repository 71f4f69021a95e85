"""All strategies by name: the modules of `fedprompt.strategies`, and entry points of others.

Strategies import their contract from this package, so importing them here would be circular.
Instead, the registry imports a strategy's module when its name is first requested.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedprompt.config.registry import Registry

if TYPE_CHECKING:
    from fedprompt.federation.strategy import SharedPromptStrategy

STRATEGIES: Registry[SharedPromptStrategy] = Registry(
    "strategy", "fedprompt.strategies", "fedprompt.federation.strategy:SharedPromptStrategy"
)


def all_strategies() -> dict[str, type[SharedPromptStrategy]]:
    """Every strategy by name; this imports all of them."""
    return STRATEGIES.all()


def strategy_class(name: str) -> type[SharedPromptStrategy]:
    """The strategy called `name`.

    Raises:
        UserError: there is no such strategy; the message suggests the nearest name.
    """
    return STRATEGIES.get(name)
