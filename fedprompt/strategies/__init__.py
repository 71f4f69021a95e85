"""Server strategies, one per file.

    >>> import fedprompt
    >>> "fedavg" in fedprompt.strategies.names()
    True
    >>> fedprompt.strategies.get("fedavg").name
    'fedavg'

In a wheel the files are in this folder. In a checkout they are in `strategies/` at the top level.
This package looks there and nowhere else, so a foreign package that is also called `strategies` is
never imported in their place.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedprompt.federation.registry import STRATEGIES

if TYPE_CHECKING:
    from fedprompt.federation.strategy import SharedPromptStrategy

_inside = Path(__file__).parent
_checkout = _inside.parents[1] / "strategies"
if not (_inside / "fedavg.py").is_file():
    __path__ = [str(_checkout)]


def names() -> list[str]:
    """The names of all strategies, those of other installed distributions included."""
    return STRATEGIES.names()


def get(name: str) -> type[SharedPromptStrategy]:
    """The strategy class with this name.

    Raises:
        UserError: there is no such strategy; the message suggests the nearest name.
    """
    return STRATEGIES.get(name)
