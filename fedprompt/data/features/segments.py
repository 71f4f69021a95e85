"""Segments of the feature cache: append-only files of rows, each found by the key of its image.

A segment is a pair of files in the folder of one encoding:

    <owner>-<number>.rows    the rows, one after the other, as plain numbers
    <owner>-<number>.index   a header, then one group of records for every batch that was encoded

    header   MAGIC, length of the JSON text (4 bytes), JSON text, CRC-32 of all of these
    group    number of rows (4), their keys (16 each), CRC-32 of each row (4 each), CRC-32 of these
    seal     a group of no rows: everything before it has been written to the disk

Rows are written before the group that names them, so a process may be killed at any moment: rows
without a complete group are not there, and the next writer writes over them. After a power failure
a group may have reached the disk before its rows; rows behind the last seal are therefore verified
before anything is appended, and every row is verified when it is first read.

Suffix: R rows of a segment.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.cache_files import open_at, write_all, writing
from fedprompt.errors import DamagedFile

KEY_BYTES = 16
MAGIC = b"fprows\x01\n"
SYNC_S = 5.0
"""Seconds of work, at most, that a power failure may cost."""

Keys = NDArray[np.bytes_]
"""Keys of images, as NumPy's `S16`."""


@dataclass(frozen=True)
class Kind:
    """What the rows of an encoding look like.

    Attributes:
        shape: shape of one row.
        dtype: NumPy type of its numbers, e.g. `<f4`.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Size of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def header(self) -> bytes:
        """The first bytes of an index of such rows."""
        text = json.dumps({"shape": list(self.shape), "dtype": self.dtype}).encode()
        start = MAGIC + len(text).to_bytes(4, "little") + text
        return start + zlib.crc32(start).to_bytes(4, "little")


class Segment:
    """The complete groups of a segment at the moment of opening.

    Args:
        path: the index file.
        kind: what the rows must look like.

    Attributes:
        path: the index file.
        keys_R: the key of each row.
        sums_R: the CRC-32 of each row.
        rows_R: the rows, memory-mapped and read-only.
        sealed: number of rows that had reached the disk when their writer finished.
        end: where the complete groups end in the index file, in bytes.

    Raises:
        FileNotFoundError: one of the two files does not exist.
        ValueError: the index is not of this kind of rows.
        OSError: a file cannot be read.
    """

    def __init__(self, path: Path, kind: Kind) -> None:
        self.path, self.kind = path, kind
        content = path.read_bytes()
        if not content.startswith(kind.header):
            raise ValueError("it has another header")
        rows_path = path.with_suffix(".rows")
        # A group that was written without its rows is as good as none.
        most = rows_path.stat().st_size // kind.row_bytes
        keys, sums, self.sealed, self.end = [], [], 0, len(kind.header)
        count = 0
        for group_keys, group_sums, end in _groups(content, self.end):
            if count + len(group_keys) > most:
                break
            count += len(group_keys)
            self.sealed, self.end = self.sealed if len(group_keys) else count, end
            keys.append(group_keys)
            sums.append(group_sums)
        self._torn = _is_torn(content[self.end :])
        self.keys_R: Keys = np.concatenate([np.zeros(0, dtype="S16"), *keys])
        self.sums_R = np.concatenate([np.zeros(0, dtype="<u4"), *sums])
        shape, dtype = (count, *kind.shape), np.dtype(kind.dtype)
        # An empty file cannot be mapped. As plain arrays, mapped rows are cheaper to index.
        self.rows_R: NDArray[Any] = (
            np.asarray(np.memmap(rows_path, dtype, "r", shape=shape))
            if count
            else np.zeros(shape, dtype)
        )
        self._unread_R = np.ones(count, dtype=bool)
        self._order: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.keys_R)

    @property
    def appendable(self) -> bool:
        """Whether rows may be appended.

        They may not if something else than an unfinished group follows the complete ones, or if a
        row behind the last seal is not what its writer computed: then the disk has lost something,
        and other processes may be reading what stands there.
        """
        return self._torn and all(map(self.intact, range(self.sealed, len(self))))

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """The row of each key, -1 for those that the segment does not have."""
        # The usual case: all images of a data set, in its order.
        if len(keys) <= len(self) and np.array_equal(keys, self.keys_R[: len(keys)]):
            return np.arange(len(keys))
        if not len(self):
            return np.full(len(keys), -1)
        if self._order is None:
            self._order = np.argsort(self.keys_R, kind="stable")
        place = np.searchsorted(self.keys_R, keys, sorter=self._order)
        rows = self._order[np.minimum(place, len(self) - 1)]
        return np.where(self.keys_R[rows] == keys, rows, -1)

    def read(self, rows: Any) -> NDArray[Any]:
        """Read rows by their numbers or by a slice; each is verified when it is first read.

        Raises:
            DamagedFile: a row is not what its writer computed.
        """
        unread = self._unread_R[rows]
        if unread.any():
            for row in np.arange(len(self))[rows][unread].tolist():
                if not self.intact(row):
                    raise DamagedFile(
                        f"feature cache: {self.path.with_suffix('.rows')} is damaged in row {row}; "
                        "remove this file, and the next run computes it again."
                    )
            self._unread_R[rows] = False
        found: NDArray[Any] = self.rows_R[rows]
        return found

    def intact(self, row: int) -> bool:
        """Whether a row is what its writer computed."""
        return zlib.crc32(self.rows_R[row]) == int(self.sums_R[row])

    def touch(self, now: float, every_s: float) -> None:
        """Note that the segment is in use, unless that was noted less than `every_s` ago."""
        # In a folder that only others may write, nothing can be noted and nothing removed.
        with contextlib.suppress(OSError):
            if now - self.path.stat().st_mtime > every_s:
                os.utime(self.path)


def remove_segment(path: Path) -> None:
    """Remove a segment by the path of its index.

    Processes that have it open can still read it. The index goes first, so nobody finds half.
    """
    path.unlink(missing_ok=True)
    path.with_suffix(".rows").unlink(missing_ok=True)


def _is_torn(rest: bytes) -> bool:
    """Whether bytes are the beginning of a group, or nothing."""
    count = int.from_bytes(rest[:4], "little")
    return len(rest) < 4 or len(rest) < 8 + (KEY_BYTES + 4) * count


def _groups(content: bytes, start: int) -> Iterator[tuple[Keys, NDArray[np.uint32], int]]:
    """Yield (keys, checksums, end in bytes) of the groups up to the first incomplete one."""
    size = len(content)
    while start + 4 <= size:
        count = int.from_bytes(content[start : start + 4], "little")
        keys_end = start + 4 + KEY_BYTES * count
        end = keys_end + 4 * count
        if end + 4 > size:
            return
        if zlib.crc32(content[start:end]).to_bytes(4, "little") != content[end : end + 4]:
            return
        keys = np.frombuffer(content, "S16", count, start + 4)
        yield keys, np.frombuffer(content, "<u4", count, keys_end), end + 4
        start = end + 4


class Writer:
    """Appends rows to a segment; the caller holds the lock of its owner.

    Args:
        path: the index file; it and the file of rows are created by the first `add`.
        kind: what the rows look like.
        segment: what is in the files, or None if there are none yet.
    """

    def __init__(self, path: Path, kind: Kind, segment: Segment | None) -> None:
        self.path, self._kind = path, kind
        self._count = 0 if segment is None else len(segment)
        self._end = 0 if segment is None else segment.end
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        self._synced = time.monotonic()

    def add(self, keys: Keys, rows: NDArray[Any]) -> None:
        """Append contiguous rows (B, ...) with their keys (B,); all of them are found, or none.

        Raises:
            UserError: the files cannot be written.
        """
        with writing(self.path):
            index, file = self._files or self._open()
            write_all(file, rows.data.cast("B"))
            sums = np.array([zlib.crc32(row) for row in rows], dtype="<u4")
            # Rows must reach the disk first; a kill needs no help, since the kernel keeps order.
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(file.fileno())
                self._synced = time.monotonic()
            write_all(index, _group(keys, sums))

    def seal(self) -> None:
        """Write everything to the disk and note that it is there.

        Raises:
            UserError: the files cannot be written.
        """
        if self._files is None:
            return
        with writing(self.path):
            index, file = self._files
            os.fsync(file.fileno())
            write_all(index, _group(np.zeros(0, dtype="S16"), np.zeros(0, dtype="<u4")))
            os.fsync(index.fileno())

    def close(self) -> None:
        """Close the files; what was added stays, sealed or not."""
        for file in self._files or ():
            file.close()
        self._files = None

    def _open(self) -> tuple[BinaryIO, BinaryIO]:
        """Open both files behind the complete groups; whatever stands there is written over."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open_at(self.path.with_suffix(".rows"), self._count * self._kind.row_bytes)
        index = open_at(self.path, self._end)
        if not self._end:
            write_all(index, self._kind.header)
        self._files = index, file
        return self._files


def _group(keys: Keys, sums: NDArray[np.uint32]) -> bytes:
    group = len(keys).to_bytes(4, "little") + keys.tobytes() + sums.tobytes()
    return group + zlib.crc32(group).to_bytes(4, "little")
