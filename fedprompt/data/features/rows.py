"""Columns of a feature table: rows of the cache, indexed as one array.

Suffix: N rows of a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.features.segments import Kind, Segment


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


class StoredRows:
    """Rows of one or more segments, memory-mapped; each is verified when it is first read.

    Args:
        kind: what a row looks like.
        segments: the segments.
        segment_N: the segment of each row, an index into `segments`.
        row_N: the number of each row in its segment.
    """

    def __init__(
        self,
        kind: Kind,
        segments: Sequence[Segment],
        segment_N: NDArray[np.int64],
        row_N: NDArray[np.int64],
    ) -> None:
        self._kind, self._segments = kind, segments
        self._segment_N, self._row_N = segment_N, row_N
        used = np.unique(segment_N)
        self._only: Segment | None = segments[used[0]] if len(used) == 1 else None
        # The usual case: the segment is the column, and slices of it need no copy.
        whole = self._only is not None and len(self._only) == len(row_N)
        self._whole = whole and np.array_equal(row_N, np.arange(len(row_N)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows, and the shape of one row."""
        return (len(self), *self._kind.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy type of the numbers."""
        return np.dtype(self._kind.dtype)

    def __len__(self) -> int:
        return len(self._row_N)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Read rows, as from an array.

        Raises:
            DamagedFile: one of these rows is not what was written.
        """
        if self._only is not None:
            return self._only.read(index if self._whole else self._row_N[index])
        row_N = self._row_N[index]
        segment_N = self._segment_N[index]
        found: NDArray[Any] = np.empty((*np.shape(row_N), *self._kind.shape), self._kind.dtype)
        for k in np.unique(segment_N).tolist():
            chosen = segment_N == k
            found[chosen] = self._segments[k].read(row_N[chosen])
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        rows: NDArray[Any] = np.array(self[:], dtype=dtype)
        return rows
