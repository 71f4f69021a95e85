"""The journal of a scan: which image files were already read, and what was found.

As git does for its index, a file is taken to be unchanged if its size, its times of modification
and of status change, and its inode are unchanged. These say nothing about a file that was written
so recently that another write could give it the same times; such a file is read again by the next
scan, which compares its hash.

The journal is append-only. Each line is a CRC-32 and a JSON object, and is added while the scan
goes on, so a scan that is killed goes on where it was. Lines with a wrong CRC-32, such as the last
one after a power failure, are dropped.

    {"images": {name: [stamp or null, hash, deep, reason]}}   verdicts, replacing earlier ones
    {"gone": [name]}                                          files that no longer exist
    {"complete": true}                                        the scan has come to its end
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprompt.data.cache_files import open_at, write_all, write_atomic, writing

COARSE_NS = 2_000_000_000
"""Resolution of times that are whole seconds, as on FAT and some network file systems."""
FINE_NS = 100_000_000
"""Resolution of other times. A kernel's clock ticks every 1 to 10 ms; the rest is a margin."""
LINE_IMAGES = 4096
"""Images per line of a journal that is written anew."""
FORMAT = 3
log = logging.getLogger(__name__)

Stamp = tuple[int, ...]
"""Changes when an image may have changed: size, mtime and ctime in ns, inode. It is empty for an
image that cannot change under its name."""


@dataclass(frozen=True)
class Verdict:
    """The result of decoding one image.

    Attributes:
        hash: of the encoded bytes; empty if the image is unreadable.
        reason: why it is unreadable; None if it is readable.
        deep: whether its pixels have more than 8 bits.
    """

    hash: str
    reason: str | None = None
    deep: bool = False


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of a file; None if it cannot be examined, in which case reading says why."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def settled(stamp: Stamp | None, now_ns: int) -> bool:
    """Whether a change after `now_ns` would change this stamp, which was taken then or later."""
    if not stamp:
        return stamp is not None
    _, modified, changed, _ = stamp
    coarse = modified % 1_000_000_000 == 0 and changed % 1_000_000_000 == 0
    return max(modified, changed) < now_ns - (COARSE_NS if coarse else FINE_NS)


class Journal:
    """The verdicts on the images of one place; the caller holds the lock of the file.

    Args:
        path: the file; it need not exist.

    Attributes:
        known: by name, the stamp under which a verdict holds (None if it never does) and the
            verdict. Verdicts on unreadable images are there only if the scan that found them was
            interrupted: afterwards, other permissions or a newer Pillow may make them readable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.known: dict[str, tuple[Stamp | None, Verdict]] = {}
        self._complete = True
        self._damaged = False
        self._written = 0
        self._end = 0
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("%s cannot be read (%s); all images are checked again", path, error)
            return
        # A line that was cut off is the trace of a process that was killed, and no damage.
        for raw in content[: content.rfind(b"\n") + 1].splitlines(keepends=True):
            self._end += len(raw)
            line = _decoded(raw)
            if line is not None:
                self._take(line)
            elif not self._damaged:
                self._damaged = True
                log.warning("%s is damaged; images without a verdict are checked again", path)

    def verdict(self, name: str, stamp: Stamp | None) -> Verdict | None:
        """The verdict on an image that is unchanged, else None."""
        held, verdict = self.known.get(name, (None, None))
        return verdict if held is not None and held == stamp else None

    def add(self, found: Mapping[str, tuple[Stamp | None, Verdict]]) -> None:
        """Append verdicts.

        Raises:
            UserError: the file cannot be written.
        """
        if found:
            self._append({"images": {name: _plain(*found[name]) for name in found}})

    def complete(self, gone: Iterable[str]) -> None:
        """Note that every image has a verdict, and forget images that no longer exist.

        Raises:
            UserError: the file cannot be written.
        """
        absent = [name for name in gone if name in self.known]
        if absent:
            self._append({"gone": absent})
        if not self._complete:
            self._append({"complete": True})
        # Superseded verdicts may make up half of the file, so that it does not grow for ever.
        if self._damaged or self._written > 2 * len(self.known) + LINE_IMAGES:
            self._rewrite()

    def _take(self, line: dict[str, Any]) -> None:
        """Change `known` as a line says."""
        for name, (stamp, value, deep, reason) in line.get("images", {}).items():
            held = None if stamp is None else tuple(stamp)
            self.known[name] = held, Verdict(value, reason, deep)
        self._written += len(line.get("images", ()))
        for name in line.get("gone", ()):
            self.known.pop(name, None)
        self._complete = bool(line.get("complete"))
        if self._complete:
            self.known = {n: found for n, found in self.known.items() if found[1].hash}

    def _append(self, line: dict[str, Any]) -> None:
        with writing(self._path), open_at(self._path, self._end) as file:
            write_all(file, _encoded(line))
            self._end = file.tell()
        self._take(line)

    def _rewrite(self) -> None:
        names = list(self.known)
        parts = [names[i : i + LINE_IMAGES] for i in range(0, len(names), LINE_IMAGES)]
        lines = [_encoded({"images": {n: _plain(*self.known[n]) for n in part}}) for part in parts]
        content = b"".join([*lines, _encoded({"complete": True})])
        write_atomic(self._path, lambda file: file.write(content))
        self._written, self._end, self._damaged = len(names), len(content), False


def _plain(stamp: Stamp | None, verdict: Verdict) -> list[Any]:
    return [stamp, verdict.hash, verdict.deep, verdict.reason]


def _encoded(line: dict[str, Any]) -> bytes:
    # Names need not be valid Unicode; JSON escapes what is not.
    text = json.dumps({"format": FORMAT, **line}, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decoded(raw: bytes) -> dict[str, Any] | None:
    sum_, _, text = raw.rstrip(b"\n").partition(b" ")
    if sum_ != b"%08x" % zlib.crc32(text):
        return None
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and line.get("format") == FORMAT else None
