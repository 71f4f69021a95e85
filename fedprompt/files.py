"""Atomic file replacement, and files that ship with the package.

A Flower app bundle keeps .py, .toml, .md, .yaml and .json files only. In a deployment the code may
run from such a bundle while weights and templates lie in the `fedprompt` that is installed there.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from fedprompt.errors import UserError


@contextlib.contextmanager
def replacing(path: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """A temporary path in the same folder; on success it is synced and becomes `path`.

    A crash at any moment leaves the old file (or none) and at most a `.tmp` file.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, mode)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content` atomically."""
    with replacing(path, mode=mode) as temporary:
        temporary.write_bytes(content)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def asset(name: str) -> Path:
    """A file of the package, e.g. `backbone/assets/x`: beside this code, else as installed.

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
    inside = Path(name)
    found = [Path(str(resources.files("fedprompt") / str(inside)))]
    try:
        installed = importlib.metadata.distribution("fedprompt")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        found.append(Path(str(installed.locate_file(Path("fedprompt") / inside))))
    found += [Path(entry or ".") / "fedprompt" / inside for entry in sys.path]
    return found
