"""One full decode of every image before anything else: finds the bad ones, hashes the good ones.

It must come before partitioning, since leaving an image out moves the indices of those behind it.
The hashes are remembered on disk, so later starts only look at what changed. Verdicts on bad
images are not: they are few, and one may become readable again (permissions, a newer Pillow).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedprompt.data.dataset import BadImage
from fedprompt.data.features.cache import DECODE_THREADS, digest, locked, progress_bar, write_atomic
from fedprompt.data.images import decode_rgb
from fedprompt.errors import UserError

LONG_SCAN = 500  # images; fewer take about a second and need no bar
VERSION = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """`hash` of an image's encoded bytes, or the `reason` why it cannot be read."""

    hash: str
    reason: str | None = None


def memo_path(cache_dir: Path, *source: str) -> Path:
    """Where the hashes of one data source are remembered."""
    return cache_dir / "scan" / f"{digest(*source)}.json"


def scan(
    keys: Sequence[str], read: Callable[[int], bytes], memo: Path, title: str
) -> list[Verdict]:
    """A verdict on every image i, whose encoded bytes are `read(i)`.

    `keys[i]` names its content as cheaply as can be (path, size and mtime, say): an image whose
    key stands in the file `memo` is not read again.

    Raises:
        UserError: the cache folder cannot be written.
    """
    with locked(memo):
        known = _load(memo)
        verdicts = [Verdict(known.get(key, "")) for key in keys]
        unknown = [i for i, verdict in enumerate(verdicts) if not verdict.hash]
        shown = len(unknown) >= LONG_SCAN
        pool = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="scan")
        try:
            with progress_bar(f"checking {title}", len(unknown), shown) as advance:
                found = pool.map(lambda i: _judge(lambda: read(i)), unknown)
                for i, verdict in zip(unknown, found, strict=True):
                    verdicts[i] = verdict
                    advance(1)
        finally:
            pool.shutdown(cancel_futures=True)
        good = {key: v.hash for key, v in zip(keys, verdicts, strict=True) if v.hash}
        if good != known:
            text = json.dumps({"version": VERSION, "hashes": good})
            write_atomic(memo, lambda file: file.write(text.encode()))
    return verdicts


def bad_images(
    names: Sequence[str],
    verdicts: Sequence[Verdict],
    on_bad_image: Literal["error", "skip"],
    title: str,
) -> tuple[BadImage, ...]:
    """The unreadable images, reported; under 'error' the first of them ends the run."""
    bad = tuple(
        BadImage(name, verdict.reason)
        for name, verdict in zip(names, verdicts, strict=True)
        if verdict.reason is not None
    )
    if bad and on_bad_image == "error":
        others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"data: cannot read {bad[0].where}{others}: {bad[0].reason}; mend or remove it, or "
            "set data.on_bad_image=skip."
        )
    for image in bad[:5]:
        log.warning("skipped unreadable image %s: %s", image.where, image.reason)
    if bad:
        log.warning("%s: %d of %d images skipped as unreadable", title, len(bad), len(names))
    return bad


def _judge(read: Callable[[], bytes]) -> Verdict:
    try:
        data = read()
        decode_rgb(data)
    except OSError as error:
        return Verdict("", error.strerror or str(error))
    except ValueError as error:
        return Verdict("", str(error))
    return Verdict(hashlib.blake2b(data, digest_size=16).hexdigest())


def _load(memo: Path) -> dict[str, str]:
    try:
        stored = json.loads(memo.read_bytes())
        if stored["version"] == VERSION:
            return {str(key): str(value) for key, value in stored["hashes"].items()}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s); checking all images again", memo, error)
    return {}
