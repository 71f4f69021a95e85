"""Hashes that identify weights; the names of cached files contain them."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from fedprompt.errors import UserError
from fedprompt.files import write_bytes


def digest(text: str) -> str:
    """Return the SHA-256 of a text, 64 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def file_digest(path: Path, cache_dir: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits.

    Hashing gigabytes takes seconds, so the result is cached by path, size and modification time.
    If the cache cannot be written, the file is hashed again next time.

    Args:
        path: the file to hash.
        cache_dir: the cache folder.

    Raises:
        UserError: the file cannot be read.
    """
    status = path.stat()
    stamp = digest(f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}")
    memo = cache_dir / "weights" / "hashes" / stamp
    with contextlib.suppress(OSError):
        return memo.read_text()
    try:
        with path.open("rb") as stream:
            hexadecimal = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"backbone: cannot read {path}: {error.strerror}.") from None
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(memo, hexadecimal.encode())
    return hexadecimal
