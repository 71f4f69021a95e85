"""Rows of a cache file that are verified when they are first read.

A cache file ends with a CRC-32 for each block of about a megabyte. Reading a row verifies its
block, once per process, so that a few rows of a large file cost a few blocks and not the file.

    <the file in NumPy's .npy format> <CRC-32 of every block, 4 bytes each> <CRC-32 of those> MAGIC
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedprompt.errors import DamagedFile

BLOCK_BYTES = 1 << 20
"""Size of a block. A new value needs a new `MAGIC`, because files do not name the size."""
MAGIC = b"fpcrc32\x01"
"""The last bytes of a cache file with checksums."""


class Rows(Protocol):
    """A column of a feature table: an array, or something that is indexed like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows, and the shape of one row."""
        ...

    @property
    def dtype(self) -> Any:
        """NumPy type of the numbers."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class BlockSums:
    """The checksums of rows that are written one batch after the other.

    Args:
        row_bytes: size of one row.
    """

    def __init__(self, row_bytes: int) -> None:
        self._rows = rows_per_block(row_bytes)
        self._sums: list[int] = []
        self._in_block = 0

    def add(self, rows: NDArray[Any]) -> None:
        """Add the next rows (B, ...), which must be contiguous."""
        while len(rows):
            some = rows[: self._rows - self._in_block]
            started = self._sums.pop() if self._in_block else 0
            self._sums.append(zlib.crc32(some.tobytes(), started))
            self._in_block = (self._in_block + len(some)) % self._rows
            rows = rows[len(some) :]

    def trailer(self) -> bytes:
        """What follows the rows in the file."""
        sums = np.array(self._sums, dtype="<u4").tobytes()
        return sums + zlib.crc32(sums).to_bytes(4, "little") + MAGIC


class CheckedRows:
    """Memory-mapped rows; a block is verified when one of its rows is first read.

    Args:
        array: the rows (R, ...), memory-mapped.
        sums: the checksum of every block.
        path: the file, for messages.
    """

    def __init__(self, array: NDArray[Any], sums: NDArray[np.uint32], path: Path) -> None:
        self._array, self._sums, self._path = array, sums, path
        self._block = rows_per_block(_row_bytes(array))
        self._unread = np.ones(len(sums), dtype=bool)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows, and the shape of one row."""
        return self._array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy type of the numbers."""
        return self._array.dtype

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Any) -> Any:
        """Read rows, as from an array.

        Raises:
            DamagedFile: a block with one of these rows is not what was written.
        """
        if self._unread.any():
            self._verify(np.unique(np.arange(len(self))[index] // self._block))
        return self._array[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self[:], dtype=dtype)

    def _verify(self, blocks: NDArray[np.int64]) -> None:
        for block in blocks[self._unread[blocks]].tolist():
            rows = self._array[block * self._block : (block + 1) * self._block]
            if zlib.crc32(rows.tobytes()) != self._sums[block]:
                raise DamagedFile(
                    f"feature cache: {self._path} is damaged in block {block}; remove this file, "
                    "and the next run computes it again."
                )
            self._unread[block] = False


def rows_per_block(row_bytes: int) -> int:
    """How many rows of this size are one block; at least one."""
    return max(1, BLOCK_BYTES // max(1, row_bytes))


def sums_of(array: NDArray[Any]) -> BlockSums:
    """The checksums of rows that are already there, computed block by block."""
    sums, step = BlockSums(_row_bytes(array)), rows_per_block(_row_bytes(array))
    for first in range(0, len(array), step):
        sums.add(array[first : first + step])
    return sums


def read_sums(array: NDArray[Any], trailer: bytes) -> NDArray[np.uint32] | None:
    """Parse what follows the rows in a file.

    Args:
        array: the rows.
        trailer: the bytes behind them.

    Returns:
        The checksum of every block, or None if these are not the checksums of so many rows.
    """
    blocks = -(-len(array) // rows_per_block(_row_bytes(array)))
    sums, rest = trailer[: 4 * blocks], trailer[4 * blocks :]
    if rest != zlib.crc32(sums).to_bytes(4, "little") + MAGIC:
        return None
    return np.frombuffer(sums, dtype="<u4")


def _row_bytes(array: NDArray[Any]) -> int:
    return int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize
