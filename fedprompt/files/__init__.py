"""Atomic replacement of files, and access to files that are installed with the package.

Run folders and caches are written through `replacing`, on the server and on nodes. A Flower
app bundle contains .py, .toml, .md, .yaml and .json files only. In a deployment the code may run
from such a bundle, while weights and templates are in the `fedprompt` that is installed on the
node; `asset` finds them.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from fedprompt.errors import UserError

# Python can only read the mask by setting it, for all threads, so this is done once and early.
UMASK = os.umask(0o077)
os.umask(UMASK)
MARKED_BYTES = 4096
"""How much of a file `refuse_foreign` reads."""


@contextlib.contextmanager
def replacing(path: Path, *, mode: int = 0o666) -> Iterator[Path]:
    """Yield a temporary path and rename it to `path` when the block succeeds.

    A crash at any moment leaves the old file, or none, and at most a `.tmp` file beside it. If the
    block raises an exception, the old file stays and the temporary file is removed.

    Args:
        path: the file to create or replace; its folder must exist.
        mode: permissions of the file, from which the process's umask takes some away.

    Yields:
        The path to write to; the file exists and is empty.

    Raises:
        OSError: the folder cannot be written.
    """
    # In the same folder, because a rename between file systems is not atomic. mkstemp creates the
    # file with mode 0600, so a private file is never readable by others, not even while written.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, mode & ~UMASK)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Rename a file that is written to its final name, such that a crash leaves it whole or not.

    Args:
        temporary: the file, in the folder of `path`.
        path: its name from now on; a file of this name is replaced.

    Raises:
        OSError: the folder cannot be written.
    """
    # The content reaches the disk before the name does, and then the folder's entry.
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def write_bytes(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write a file atomically; a reader sees the old content or the new, never a part.

    Args:
        path: the file to create or replace; its folder must exist.
        content: the new content.
        mode: permissions of the file, from which the process's umask takes some away.

    Raises:
        OSError: the folder cannot be written.
    """
    with replacing(path, mode=mode) as temporary:
        temporary.write_bytes(content)


def stand_in(head: bytes) -> str | None:
    """Say what a file is if it only stands in for the file that was meant.

    Args:
        head: the first bytes of the file, some hundreds.

    Returns:
        What it is and what to do, for a message; None if it is not one of the known cases.
    """
    if not head.strip(b"\0"):
        return "the file is empty" if not head else "the file holds zeros only"
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "this is a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "this is an HTML page, such as a web site's error message; download the file again"
    return None


def read_regular(path: Path) -> bytes:
    """Read a regular file; a pipe or device would block, or never end.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
    return path.read_bytes()


def refuse_foreign(path: Path, *marks: bytes) -> None:
    """Refuse to replace a file that fedprompt has not written.

    Commands write files with usual names (`report.html`, `partition.png`) into folders that belong
    to the user, who may have a file of that name there.

    Args:
        path: the file that is about to be written; it need not exist.
        marks: what each of our files of this kind contains one of near its beginning.

    Raises:
        UserError: the path exists and holds none of the marks.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(MARKED_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from None
    # An empty file holds nothing that could be lost; `mktemp` makes such files, for example.
    if start and not any(mark in start for mark in marks):
        raise UserError(
            f"{path} exists and was not written by fedprompt; choose another place with --out, "
            "or remove it."
        )


def remove_temporaries(path: Path) -> None:
    """Remove what processes left behind that were killed while they replaced a file.

    Other files are not touched, whatever their names. The caller must hold the lock under which
    `path` is written, because the temporary file of a living process looks the same.

    Args:
        path: the file that was being replaced; it need not exist.

    Raises:
        OSError: a file cannot be removed.
    """
    # The names that `replacing` draws.
    for stray in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        stray.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def asset(name: str) -> Path:
    """Find a file of the package, beside this code or else in an installed copy.

    Args:
        name: path below `fedprompt`, e.g. `backbone/assets/x`.

    Returns:
        The path of an existing file.

    Raises:
        UserError: no installed copy contains the file.
    """
    for candidate in _candidates(name):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"{name} is in no installed fedprompt; install the package on this machine (pip install "
        "fedprompt, or pip install . in a checkout): an app bundle does not contain it."
    )


def _candidates(name: str) -> list[Path]:
    """Return the paths at which the file may be, in the order of preference."""
    inside = Path(name)
    paths = [Path(str(resources.files("fedprompt") / str(inside)))]
    try:
        installed = importlib.metadata.distribution("fedprompt")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        paths.append(Path(str(installed.locate_file(Path("fedprompt") / inside))))
    # An editable install or a plain checkout on the path has no list of installed files.
    paths += [Path(entry or ".") / "fedprompt" / inside for entry in sys.path]
    return paths
