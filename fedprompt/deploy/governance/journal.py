"""A file of entries that only grows, in which every entry holds the hash of the one before it.

The audit log and the privacy ledger of a node are journals. A line is one entry as JSON:

    {"event": ..., ..., "hash": H, "previous": H of the entry before, "seq": 1, 2, ..., "time": ...}

`H` is the SHA-256 of the entry without `hash`, in the canonical form that `_canonical` writes. The
file `<name>.head` holds number and hash of the last entry. Changing, inserting, removing or moving
an entry breaks the chain, and cutting off entries at the end leaves a head that is not in the file.
Whoever can write both files can write a new chain: only a copy of a hash that somebody else holds
reveals that. A node therefore sends the hash of its last audit entry with every reply.

A process that is killed while it writes leaves an incomplete last line. Nothing has left the node
on account of it, because an entry is complete before what it describes happens. It is cut off when
the next entry is added, and an entry says so.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedprompt.errors import UserError
from fedprompt.files import write_bytes

Entry = dict[str, Any]
TORN = "incomplete line"
"""Event of the entry that says that an incomplete line was cut off."""
START = "0" * 64
"""What the first entry names as the hash of the one before it."""


class Journal:
    """A journal that this process may add to; other processes of the node may add to it as well.

    Args:
        path: the file; it and its folder are created with the first entry.
        what: what the file is, for messages, e.g. `audit log`.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        self._entries: list[Entry] | None = None
        self._size = 0

    def append(self, event: str, **fields: Any) -> str:
        """Add an entry; it is on the disk when this returns.

        Args:
            event: what has happened.
            fields: further values as plain JSON.

        Returns:
            The entry's hash.

        Raises:
            UserError: the file has been changed, or cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with FileLock(f"{self.path}.lock"):
                return self._append(event, fields)
        except OSError as error:
            raise UserError(
                f"cannot write the {self.what} {self.path}: {error.strerror}; nothing is answered "
                "without it. Free some space, or make the folder writable."
            ) from None

    def entries(self) -> list[Entry]:
        """All entries, after a check of the whole chain.

        Raises:
            UserError: the file has been changed, or cannot be read.
        """
        size = self.path.stat().st_size if self.path.is_file() else 0
        # The chain is checked once per process and whenever another process has added entries.
        if self._entries is None or size != self._size:
            self._entries = verify(self.path, self.what)
            self._size = size
        return self._entries

    def _append(self, event: str, fields: Mapping[str, Any]) -> str:
        entries = self.entries()
        if not _head(self.path).is_file():
            # Before the first entry, so that a head that is missing later has been removed.
            _write_head(self.path, 0, START)
        added = []
        handle = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600)
        with os.fdopen(handle, "r+b") as stream:
            torn = stream.read().rpartition(b"\n")[2]
            if torn:
                stream.truncate(stream.tell() - len(torn))
                digest = hashlib.sha256(torn).hexdigest()
                added.append(_entry(entries, TORN, {"bytes": len(torn), "sha256": digest}))
            added.append(_entry([*entries, *added], event, fields))
            stream.seek(0, os.SEEK_END)
            stream.write(b"".join(_canonical(entry) + b"\n" for entry in added))
            stream.flush()
            os.fsync(stream.fileno())
        # Not before: an entry that could not be written must not be in the chain.
        entries += added
        self._size = self.path.stat().st_size
        last = entries[-1]
        # After the entry, so that a crash in between leaves a head that is in the file.
        _write_head(self.path, last["seq"], last["hash"])
        return str(last["hash"])


def verify(path: Path, what: str, known: str | None = None) -> list[Entry]:
    """Check a journal from its first entry to its last.

    Args:
        path: the file; if neither it nor its head exists, there are no entries.
        what: what the file is, for messages.
        known: the hash of an entry that must be in it, e.g. from the server's record.

    Returns:
        The entries, oldest first.

    Raises:
        UserError: the file cannot be read, or something in it has been changed, removed or added;
            the message names the line.
    """
    try:
        # The head first: an entry that is added meanwhile comes after it.
        head = json.loads(_head(path).read_bytes()) if _head(path).is_file() else None
        content = path.read_bytes() if path.is_file() else b""
        head_seq, head_hash = (0, START) if head is None else (head["seq"], head["hash"])
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"the {what} {path} has been changed: {_head(path)} is damaged.") from None
    entries: list[Entry] = []
    for number, fault in _read(content, entries):
        raise UserError(f"the {what} {path} has been changed: line {number} {fault}.")
    hashes = [START, *(entry["hash"] for entry in entries)]
    if entries and head is None:
        raise UserError(f"the {what} {path} has been changed: {_head(path)} has been removed.")
    if not isinstance(head_seq, int) or head_seq >= len(hashes) or hashes[head_seq] != head_hash:
        raise UserError(
            f"the {what} {path} has been changed: entry {head_seq} of {_head(path).name} is not in "
            "it, so entries have been removed or replaced."
        )
    if known is not None and known not in hashes[1:]:
        raise UserError(f"the {what} {path} holds no entry with the hash {known}.")
    return entries


def _read(content: bytes, entries: list[Entry]) -> Iterator[tuple[int, str]]:
    """Add the entries of a file to `entries`; yields the number of a line and what is wrong."""
    *lines, _ = content.split(b"\n")  # what follows the last line break is incomplete
    for number, line in enumerate(lines, 1):
        entry = _parsed(line)
        previous = entries[-1]["hash"] if entries else START
        if entry is None:
            yield number, "is no entry"
        elif entry.get("previous") != previous or entry.get("seq") != number:
            yield number, "does not follow the entry before it"
        elif entry.get("hash") != _hash(entry):
            yield number, "has another hash than its content"
        else:
            entries.append(entry)


def _parsed(line: bytes) -> Entry | None:
    """The entry of a line; None if it is none, or not written as we write it."""
    try:
        entry = json.loads(line)
        return entry if isinstance(entry, dict) and _canonical(entry) == line else None
    except (ValueError, TypeError, RecursionError):
        return None


def _entry(entries: list[Entry], event: str, fields: Mapping[str, Any]) -> Entry:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    previous = entries[-1]["hash"] if entries else START
    # Ours last, so that no field can take their place.
    entry = {**fields, "event": event, "seq": len(entries) + 1, "time": now, "previous": previous}
    return entry | {"hash": _hash(entry)}


def _hash(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical({k: v for k, v in entry.items() if k != "hash"})).hexdigest()


def _canonical(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _write_head(path: Path, seq: int, digest: str) -> None:
    write_bytes(_head(path), json.dumps({"seq": seq, "hash": digest}).encode(), mode=0o600)


def _head(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")
