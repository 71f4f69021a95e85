"""The cache folder and its files: where it is, how its files are keyed, locked and written.

The layout, all below the cache folder (`output.cache`, else $FEDPROMPT_CACHE, else
~/.cache/fedprompt):

    features/<data set>/<view>-<key>.npy   one row per image, in data set order, and checksums
    scan/<data set>.json                   hashes of the images that were already checked
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
from fedprompt.runtime.machine import cpu_count

ADVICE = "set output.cache or $FEDPROMPT_CACHE to a writable folder with enough free space"
DECODE_THREADS = min(8, cpu_count())
"""Threads that decode images. More than eight do not help: the encoder is then the slower part."""
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process that is writing %s", path)
            lock.acquire()
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from None
    try:
        yield
    finally:
        lock.release()


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a cache file so that other processes see all of it or nothing; call under its lock.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        # Under the lock, temporary files can only come from a process that was killed.
        remove_temporaries(path)
        with replacing(path) as temporary, temporary.open("wb") as file:
            write(file)
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from None


def _cannot_write(path: Path, error: OSError) -> str:
    reason = error.strerror or type(error).__name__
    return f"cache: cannot write {path}: {reason}; {ADVICE}."
