"""The cache folder and its files: where it is, how its files are keyed, locked and written.

The layout, all below the cache folder (`output.cache`, else $FEDPROMPT_CACHE, else
~/.cache/fedprompt):

    features/<encoding>/<owner>-<n>.rows    rows of images, in the order in which they were encoded
    features/<encoding>/<owner>-<n>.index   the keys of these images, and checksums
    features/<owner>.lock                   held by the process that encodes images of a data set
    scan/<owner>.journal                    hashes of the images that were already checked
    labels/<drawings>.npy                   what is seen on drawn images (`aerial_objects`)

`<encoding>` is the view and a digest of the backbone and its preprocessing. `<owner>` is a digest
of the place of a data set, such as its folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from fedprompt.errors import UserError
from fedprompt.files import remove_temporaries, replacing

ADVICE = "set output.cache or $FEDPROMPT_CACHE to a writable folder with enough free space"
log = logging.getLogger(__name__)


def default_cache_dir(configured: str | None = None) -> Path:
    """The cache folder: `output.cache`, else $FEDPROMPT_CACHE, else ~/.cache/fedprompt."""
    folder = configured or os.environ.get("FEDPROMPT_CACHE") or "~/.cache/fedprompt"
    return Path(folder).expanduser()


def digest(*parts: str) -> str:
    """A short content key (128 bits) of some strings."""
    # Each part carries its length, so that no two lists of parts join to the same text.
    text = "\x1f".join(f"{len(part)}:{part}" for part in parts)
    # Paths and names of files need not be valid UTF-8.
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of one cache file, waiting for other processes; creates the file's folder.

    Raises:
        UserError: the folder cannot be created or written.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process that is writing %s", path)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a cache file so that other processes see all of it or nothing; call under its lock.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(path):
        # Under the lock, temporary files can only come from a process that was killed.
        remove_temporaries(path)
        with replacing(path) as temporary, temporary.open("wb") as file:
            write(file)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating-system error in the block into one line about a cache file.

    Raises:
        UserError: the block raised `OSError`.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"cache: cannot write {path}: {reason}; {ADVICE}.") from None


def open_at(path: Path, size: int) -> BinaryIO:
    """Open a file for appending behind its first `size` bytes; it is created if necessary.

    The rest of the file is cut off. The file is not buffered: what was written is with the kernel,
    and stays there if the process is killed.

    Raises:
        OSError: the file cannot be written.
    """
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    file.truncate(size)
    file.seek(size)
    return file


def write_all(file: BinaryIO, content: bytes | memoryview) -> None:
    """Write all bytes to a file that is not buffered, which may take several attempts.

    Raises:
        OSError: the disk is full, for example; a part may have been written.
    """
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
