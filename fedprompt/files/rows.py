"""A file of rows of bytes that is written as the rows come and read row by row.

It is a safetensors file, so any program that reads those can inspect it:

    rows (bytes,)                   the rows one after the other
    client, name, offset, size (R,) per row that counts: whose it is, the place of its name in
                                    `names`, its first byte in `rows` and its number of bytes
    sha256 (R, 32)                  the SHA-256 of the row
    names (bytes,)                  a JSON list

The header of a safetensors file stands at its beginning and is known at the end only. Its size is
therefore fixed, and it is filled up with spaces, as the format allows. The header carries the
checksum of everything but the rows, each of which is verified when it is read.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fedprompt.files import publish
from fedprompt.files.tensors import array_checksum

HEADER = 1024
"""Bytes before the first row, the eight of the header's length included."""
CHECKSUM = "sha256"
"""The key of the index's checksum in the file's metadata."""
ROWS, NAMES = "rows", "names"
COLUMNS = ("client", "name", "offset", "size")
SUMS = "sha256"
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Index:
    """What a file says about its R rows; see the module's docstring.

    Attributes:
        names: the names that the rows have.
        client: (R,).
        name: (R,), places in `names`.
        offset: (R,), in bytes.
        size: (R,), in bytes.
        sums: (R, 32).
    """

    names: Sequence[str]
    client: Integers
    name: Integers
    offset: Integers
    size: Integers
    sums: NDArray[np.uint8]

    def parts(self) -> dict[str, NDArray[np.int64] | NDArray[np.uint8]]:
        """The arrays of the file by name, all but `rows`."""
        texts = np.frombuffer(json.dumps(list(self.names)).encode(), dtype=np.uint8)
        columns: dict[str, Integers] = {c: getattr(self, c) for c in COLUMNS}
        return {**columns, SUMS: self.sums, NAMES: texts}


class RowWriter:
    """Writes rows into a temporary file, which `finish` turns into a file of its own.

    Args:
        temporary: the file; one of this name is replaced. Only the owner can read it.

    Attributes:
        size: number of bytes of all rows so far.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        # Unbuffered: rows are large, and what was appended must be readable at once.
        self._stream = os.fdopen(handle, "r+b", buffering=0)
        self.size = 0

    def append(self, row: bytes) -> int:
        """Append a row.

        Returns:
            Its offset in bytes.

        Raises:
            OSError: the disk is full; what was appended before stays.
        """
        offset = self.size
        self._write(HEADER + offset, row)
        self.size += len(row)
        return offset

    def read(self, offset: int, size: int) -> bytes:
        """Read a row that was appended."""
        return read_row(self.temporary, offset, size)

    def finish(self, index: Index, path: Path) -> None:
        """Complete the file and move it to `path`, atomically.

        Args:
            index: the rows that count; others are left in the file unread.
            path: the file to create or replace, in the same folder.

        Raises:
            OSError: the file cannot be written. The rows are still there.
        """
        parts = index.parts()
        # Whole numbers of eight bytes, which readers that map the file into memory require.
        rows = self.size + -self.size % 8
        at = HEADER + rows
        # `rows` is filled up first: a file that grows by seeking would have a hole.
        self._write(HEADER + self.size, b"\0" * (rows - self.size))
        entries: dict[str, object] = {
            "__metadata__": {CHECKSUM: array_checksum(parts)},
            ROWS: {"dtype": "U8", "shape": [rows], "data_offsets": [0, rows]},
        }
        for name, array in parts.items():
            kind = "U8" if array.dtype == np.uint8 else "I64"
            span = [at - HEADER, at - HEADER + array.nbytes]
            entries[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": span}
            self._write(at, array.tobytes())
            at += array.nbytes
        self._stream.truncate(at)
        header = json.dumps(entries).encode().ljust(HEADER - 8)
        self._write(0, len(header).to_bytes(8, "little") + header)
        publish(self.temporary, path)
        self._stream.close()

    def discard(self) -> None:
        """Remove the file, with all rows in it."""
        self._stream.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)

    def _write(self, at: int, content: bytes) -> None:
        self._stream.seek(at)
        left = memoryview(content)
        # Unbuffered streams may write a part, for example of more than 2 GB.
        while left:
            left = left[self._stream.write(left) :]


def read_index(path: Path) -> Index | None:
    """Read what a file says about its rows, but not the rows.

    Args:
        path: the file.

    Returns:
        The index, or None if the file is a safetensors file of another kind.

    Raises:
        ValueError: the file is damaged.
        OSError: it is missing or cannot be read.
    """
    try:
        with safe_open(path, framework="np") as reader:
            names = set(reader.keys())
            if ROWS not in names:
                return None
            parts = {n: reader.get_tensor(n) for n in (*COLUMNS, SUMS, NAMES) if n in names}
            stored = (reader.metadata() or {}).get(CHECKSUM)
    except SafetensorError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if stored != array_checksum(parts):
        raise ValueError("its checksum does not match")
    texts = json.loads(parts.pop(NAMES).tobytes())
    return Index(texts, sums=parts.pop(SUMS), **parts)


def read_row(path: Path, offset: int, size: int) -> bytes:
    """Read one row of a file; the caller compares its SHA-256.

    Args:
        path: the file.
        offset: the row's first byte.
        size: its number of bytes.

    Raises:
        OSError: the file is missing or cannot be read.
    """
    with path.open("rb") as stream:
        stream.seek(HEADER + offset)
        return stream.read(size)
