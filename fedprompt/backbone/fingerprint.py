"""Hashes that tell one set of weights from another; names of cached files are made of them."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from fedprompt.errors import UserError
from fedprompt.files import write_bytes


def digest(text: str) -> str:
    """SHA-256 of a text, 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path, cache_dir: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits.

    Hashing gigabytes takes seconds, so the result is remembered by path, size and modification
    time. A cache that cannot be written only costs that time.

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
