"""All rows of one encoding: which segments there are, and which of them has an image.

A row is found by its key in any segment, whichever data set it was encoded for. New rows go into a
segment of their data set's owner, under the owner's lock, so that processes that encode different
data sets do not wait for each other. If two of them encode the same new image, both rows stay.

Suffix: N images of a data set.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.features.rows import StoredRows
from fedprompt.data.features.segments import Keys, Kind, Segment, Writer, remove_segment

UNUSED_DAYS = 90
"""A segment of which no run has used a row for so long is removed when others are written."""
USE_NOTED_S = 24 * 3600.0
"""How often, at most, a segment's use is noted in its time of modification."""
COPIED_BYTES = 1 << 24
"""How much is copied at once when a segment is rewritten."""
NAME = re.compile(r"[0-9a-f]{32}-(\d+)\.(index|rows)")
FORMER = re.compile(r"[0-9a-f]{32}/.+-[0-9a-f]{32}\.npy(\.lock)?")
"""What earlier versions wrote: one file per data set and view."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Found:
    """Where the rows of images are.

    Attributes:
        kind: what a row looks like.
        segments: the segments that were searched.
        segment_N: the segment of each image, an index into `segments`; -1 if it has no row.
        row_N: the number of its row in there.
    """

    kind: Kind
    segments: tuple[Segment, ...]
    segment_N: NDArray[np.int64]
    row_N: NDArray[np.int64]

    @property
    def missing_N(self) -> NDArray[np.bool_]:
        """Which images have no row."""
        missing: NDArray[np.bool_] = self.segment_N < 0
        return missing

    def rows(self) -> StoredRows:
        """The rows; none may be missing."""
        now = time.time()
        for k in np.unique(self.segment_N).tolist():
            self.segments[k].touch(now, USE_NOTED_S)
        return StoredRows(self.kind, self.segments, self.segment_N, self.row_N)


class Store:
    """The segments in the folder of one encoding.

    Args:
        folder: the folder; it need not exist.
        kind: what a row looks like.
        owner: digest of the place of the data set that is opened.
    """

    def __init__(self, folder: Path, kind: Kind, owner: str) -> None:
        self.folder, self.kind, self.owner = folder, kind, owner

    def find(self, keys: Keys) -> Found:
        """Find the row of every key."""
        segment_N = np.full(len(keys), -1)
        row_N = np.full(len(keys), -1)
        searched: list[Segment] = []
        # Segments are opened one by one, so usually no other than the owner's own.
        segments = self._segments()
        while (left := np.flatnonzero(segment_N < 0)).size:
            segment = next(segments, None)
            if segment is None:
                break
            rows = segment.find(keys[left])
            hit = rows >= 0
            segment_N[left[hit]], row_N[left[hit]] = len(searched), rows[hit]
            searched.append(segment)
        return Found(self.kind, tuple(searched), segment_N, row_N)

    def _segments(self) -> Iterator[Segment]:
        """The readable segments, the owner's own first."""
        names = sorted(
            path.name for path in self.folder.glob("*.index") if NAME.fullmatch(path.name)
        )
        names.sort(key=lambda name: not name.startswith(self.owner))
        for name in names:
            if (segment := self._open(self.folder / name)) is not None:
                yield segment

    def _open(self, path: Path, *, report: bool = False) -> Segment | None:
        try:
            return Segment(path, self.kind)
        except FileNotFoundError:
            return None  # another process, or the user, has removed one of the files
        except (OSError, ValueError) as error:
            if report:
                log.warning("feature cache: %s is damaged (%s) and is replaced", path, error)
            return None

    def repair(self) -> None:
        """Make the owner's last segment ready for appending; call under the owner's lock.

        If it is damaged, what is intact of it is moved to a new one.
        """
        last = max(self._own(), key=_number, default=None)
        if last is None:
            return
        segment = self._open(last, report=True)
        if segment is None:
            remove_segment(last)
        elif not segment.appendable:
            log.warning(
                "feature cache: %s is damaged behind row %d; what is lost is computed again",
                last, segment.sealed,
            )  # fmt: skip
            self._move(segment, np.ones(len(segment), dtype=bool))

    def writer(self) -> Writer:
        """Open the owner's last segment for appending; call under the owner's lock."""
        last = max(self._own(), key=_number, default=None)
        if last is None:
            return Writer(self._new(), self.kind, None)
        return Writer(last, self.kind, Segment(last, self.kind))

    def compact(self, live: Keys) -> None:
        """Rewrite own segments of which most rows are superseded; call under the owner's lock.

        Args:
            live: keys of all images that the owner's place still has.
        """
        for path in self._own():
            segment = self._open(path)
            if segment is None or not len(segment):
                continue
            kept_R = np.isin(segment.keys_R, live)
            if 2 * np.count_nonzero(kept_R) < len(segment):
                self._move(segment, kept_R)

    def _move(self, old: Segment, kept_R: NDArray[np.bool_]) -> None:
        """Move the kept rows that are intact to a new segment, and remove the old one."""
        new = Writer(self._new(), self.kind, None)
        step = max(1, COPIED_BYTES // self.kind.row_bytes)
        rows = [row for row in np.flatnonzero(kept_R).tolist() if old.intact(row)]
        for first in range(0, len(rows), step):
            some = rows[first : first + step]
            new.add(old.keys_R[some], old.rows_R[some])
        new.seal()
        new.close()
        remove_segment(old.path)

    def _own(self) -> list[Path]:
        """The indexes of the owner's segments."""
        return [p for p in self.folder.glob(f"{self.owner}-*.index") if NAME.fullmatch(p.name)]

    def _new(self) -> Path:
        """The index of a new segment of the owner."""
        return self.folder / f"{self.owner}-{1 + max(map(_number, self._own()), default=-1)}.index"


def _number(path: Path) -> int:
    found = NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def remove_unused(folder: Path, now: float) -> None:
    """Remove files of all encodings that no run has used for `UNUSED_DAYS`.

    These are segments, and the files of earlier versions. Files of other names are not touched.

    Args:
        folder: the folder of all encodings.
        now: the time, in seconds since 1970.
    """
    oldest = now - UNUSED_DAYS * 24 * 3600
    for path in folder.glob("*/*"):
        try:
            if NAME.fullmatch(path.name):
                # Only the index is touched; rows without one were left by a removal.
                index = path.with_suffix(".index")
                used = (index if index.exists() else path).stat().st_mtime
            elif FORMER.fullmatch(f"{path.parent.name}/{path.name}"):
                status = path.stat()
                used = max(status.st_mtime, status.st_atime)
            else:
                continue
            if used < oldest:
                path.unlink()
                log.info("feature cache: removed %s, unused for %d days", path, UNUSED_DAYS)
        except OSError as error:  # somebody else's, or removed by another process just now
            log.debug("feature cache: %s was not removed: %s", path, error)
