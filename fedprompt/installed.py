"""Files that ship with the package but that a Flower app bundle does not carry.

A bundle keeps .py, .toml, .md, .yaml and .json files only. In a deployment the code may run from
such a bundle while weights and templates lie in the `fedprompt` that is installed on the node.
"""

from __future__ import annotations

import importlib.metadata
import sys
from importlib import resources
from pathlib import Path

from fedprompt.errors import UserError


def asset(name: str) -> Path:
    """A file of `fedprompt/assets`: beside this code, else in the installed package.

    Raises:
        UserError: no installed copy holds the file.
    """
    for candidate in _candidates(name):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"{name} is in no installed fedprompt; install the package on this machine (pip install "
        "fedprompt, or pip install . in a checkout): an app bundle does not carry it."
    )


def _candidates(name: str) -> list[Path]:
    inside = Path("assets") / name
    found = [Path(str(resources.files("fedprompt") / str(inside)))]
    try:
        installed = importlib.metadata.distribution("fedprompt")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        found.append(Path(str(installed.locate_file(Path("fedprompt") / inside))))
    found += [Path(entry or ".") / "fedprompt" / inside for entry in sys.path]
    return found
