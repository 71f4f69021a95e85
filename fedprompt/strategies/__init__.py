"""Server strategies, one per file.

    >>> import fedprompt
    >>> "fedavg" in fedprompt.strategies.names()
    True
    >>> fedprompt.strategies.get("fedavg").name
    'fedavg'

In a wheel the files are in this folder. In a checkout they are in the top-level folder
`strategies/`, which this package takes as its own. No package called `strategies` that happens to
be installed or to lie in the working folder is ever imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedprompt.errors import UserError
from fedprompt.federation.registry import STRATEGIES

if TYPE_CHECKING:
    from fedprompt.federation.strategy import SharedPromptStrategy


def names() -> list[str]:
    """The names of all strategies, those of other installed distributions included."""
    return STRATEGIES.names()


def get(name: str) -> type[SharedPromptStrategy]:
    """The strategy class with this name.

    Raises:
        UserError: there is no such strategy; the message suggests the nearest name.
    """
    return STRATEGIES.get(name)


def _folder(package: Path) -> Path:
    """The folder that holds the strategies of the fedprompt in whose `strategies/` we are.

    Raises:
        UserError: neither place has them.
    """
    root = package.parents[1]
    # Beside an installed package, `strategies` is somebody else's: only a checkout has the project
    # file there.
    in_checkout = root / "strategies" if (root / "pyproject.toml").is_file() else package
    for folder in (package, in_checkout):
        if (folder / "fedavg.py").is_file():
            return folder
    raise UserError(
        f"no strategies in {package} or {root / 'strategies'}: this copy of fedprompt is "
        "incomplete; install it again."
    )


__path__[:] = [str(_folder(Path(__file__).parent))]
