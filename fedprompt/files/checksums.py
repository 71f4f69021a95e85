"""SHA-256 of the files of a run folder, so that a damaged file is refused and not used.

Disks, copies and people change files, and a changed digit in a result looks like any other digit.
`checksums.txt` in a run folder lists its files as `sha256sum` does, so `sha256sum --check
checksums.txt` verifies a folder too. The process of a run writes an entry before the file itself,
and every command that reads the file verifies it. Checkpoints and private tensors, which change in
every round, carry their checksum inside (`tensors.py`).

A run folder without `checksums.txt` comes from an older version and is read unverified.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from fedprompt.errors import DamagedFile
from fedprompt.files import write_bytes

CHECKSUMS = "checksums.txt"
ALWAYS_LISTED = ("config.yaml", "summary.json")
"""Files that have an entry whenever they exist. Others may be older than `checksums.txt`."""


def digest(content: bytes) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def read_checksums(folder: Path) -> dict[str, str] | None:
    """Read the `checksums.txt` of a folder.

    Args:
        folder: a run folder.

    Returns:
        Digests by file name, or None if the folder has no such file.

    Raises:
        DamagedFile: a line is not `<64 hexadecimal digits>  <file name>`.
        OSError: the file exists but cannot be read.
    """
    path = folder / CHECKSUMS
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = re.fullmatch(rb"([0-9a-f]{64})  ([a-z]+\.[a-z]+)", line)
        if not match:
            raise DamagedFile(f"{path}, line {number} is damaged; {ADVICE}.")
        found[match[2].decode()] = match[1].decode()
    return found


def write_checksums(folder: Path, digests: Mapping[str, str]) -> None:
    """Replace the `checksums.txt` of a folder atomically.

    Args:
        folder: a run folder.
        digests: digests by file name; all files of a run folder that are not listed are read
            unverified.

    Raises:
        OSError: the folder cannot be written.
    """
    lines = [f"{value}  {name}\n" for name, value in sorted(digests.items())]
    write_bytes(folder / CHECKSUMS, "".join(lines).encode())


ADVICE = (
    "restore it from a copy, or repeat the run; if the change is meant, 'fedprompt run' with "
    "another output.dir gives it a run of its own"
)
"""What a message about a changed file advises."""


def read_verified(path: Path) -> bytes:
    """Read a file of a run folder, and verify it if `checksums.txt` there lists it.

    Args:
        path: the file.

    Returns:
        Its content.

    Raises:
        DamagedFile: the content is not what the run wrote, or lines of `checksums.txt` are missing.
        OSError: the file is missing or cannot be read.
    """
    content = path.read_bytes()
    _compare(path, digest(content))
    return content


def verify(path: Path) -> None:
    """Verify a file as `read_verified` does, without keeping its content.

    Args:
        path: the file.

    Raises:
        DamagedFile: the content is not what the run wrote, or lines of `checksums.txt` are missing.
        OSError: the file is missing or cannot be read.
    """
    with path.open("rb") as stream:
        _compare(path, hashlib.file_digest(stream, "sha256").hexdigest())


def _compare(path: Path, found: str) -> None:
    """Compare the digest of a file with the one that `checksums.txt` lists, if there is one."""
    digests = read_checksums(path.parent)
    if digests is None:
        return
    expected = digests.get(path.name)
    # A list that was cut off, or a damaged name in it, must not switch the check off.
    if expected is None and path.name in ALWAYS_LISTED:
        raise DamagedFile(
            f"{path.parent / CHECKSUMS} is damaged: it has no line for {path.name}; {ADVICE}."
        )
    if expected is not None and expected != found:
        raise DamagedFile(
            f"{path} was changed since the run wrote it (its checksum is not the one in "
            f"{CHECKSUMS}); {ADVICE}."
        )
