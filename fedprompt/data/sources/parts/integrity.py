"""Decodes every image once when a data set is opened, to find bad images and to hash the others.

This must happen before images are divided among clients, because leaving an image out changes the
indices of all later ones. The hashes are stored on disk, so that later runs read only files that
have changed. Verdicts on bad images are not stored: bad images are few, and one may become
readable, for instance with other permissions or a newer version of Pillow.
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

from fedprompt.data.cache_files import DECODE_THREADS, digest, locked, write_atomic
from fedprompt.data.dataset import BadImage
from fedprompt.data.images import PLAIN, decode
from fedprompt.data.pixels import Pixels
from fedprompt.data.progress import progress_bar
from fedprompt.errors import UserError

LONG_SCAN = 500
"""Number of images from which a scan shows a progress bar; fewer take about a second."""
VERSION = 2
"""Format of the stored hashes; files of another version are ignored."""
log = logging.getLogger(__name__)


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


def memo_path(cache_dir: Path, *source: str) -> Path:
    """The file that stores the hashes of one data set, which the strings `source` identify."""
    return cache_dir / "scan" / f"{digest(*source)}.json"


def scan(
    keys: Sequence[str],
    read: Callable[[int], bytes],
    memo: Path,
    title: str,
    pixels: Pixels = PLAIN,
) -> list[Verdict]:
    """Check every image, reading only those that are not in the memo file yet.

    Args:
        keys: one key per image, such as its path, size and time of modification. It must change
            when the image may have changed, and must not require reading the image.
        read: returns the encoded bytes of image i, or raises `OSError` or `ValueError`.
        memo: the file with the hashes of earlier scans.
        title: name of the data set, for the progress bar and the warning.
        pixels: how stored values become RGB; `memo` is of these options.

    Returns:
        One verdict per image.

    Raises:
        UserError: the cache folder cannot be written.
    """
    # Under the lock, a second process that starts at the same time waits and then finds the hashes.
    with locked(memo):
        known = _load(memo)
        verdicts = [known.get(key, Verdict("")) for key in keys]
        unknown = [i for i, verdict in enumerate(verdicts) if not verdict.hash]
        is_long = len(unknown) >= LONG_SCAN
        # Threads suffice, since Pillow releases the interpreter's lock while it decodes.
        pool = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="scan")
        try:
            with progress_bar(f"checking {title}", len(unknown), is_long) as advance:
                judged = pool.map(lambda i: _judge(lambda: read(i), pixels), unknown)
                for i, verdict in zip(unknown, judged, strict=True):
                    verdicts[i] = verdict
                    advance(1)
        finally:
            # After an error or Ctrl-C, the images still in the queue must not be waited for.
            pool.shutdown(cancel_futures=True)
        # Keys that no longer occur are dropped, so that the file does not grow.
        good = {key: verdict for key, verdict in zip(keys, verdicts, strict=True) if verdict.hash}
        if good != known:
            hashes = {key: verdict.hash for key, verdict in good.items()}
            deep = [key for key, verdict in good.items() if verdict.deep]
            text = json.dumps({"version": VERSION, "hashes": hashes, "deep": deep})
            write_atomic(memo, lambda file: file.write(text.encode()))
    deep_ones = sum(verdict.deep for verdict in verdicts)
    if deep_ones and not pixels.stretch:
        log.warning(
            "%s: %d of %d images have more than 8 bits per value. Their range of 16 bits is mapped "
            "to black and white, so images of fewer bits are dark: set data.stretch=[low, high], "
            "e.g. [0, 4095] for 12 bits, or [0, 65535] to keep it as it is.",
            title, deep_ones, len(verdicts),
        )  # fmt: skip
    return verdicts


def bad_images(
    names: Sequence[str],
    verdicts: Sequence[Verdict],
    on_bad_image: Literal["error", "skip"],
    title: str,
) -> tuple[BadImage, ...]:
    """Report unreadable images, or refuse the data set because of them.

    Args:
        names: name of each image for messages.
        verdicts: one per image, from `scan`.
        on_bad_image: `error` refuses the data set; `skip` logs the images.
        title: name of the data set.

    Returns:
        The unreadable images.

    Raises:
        UserError: an image is unreadable while `on_bad_image` is `error`.
    """
    bad = tuple(
        BadImage(name, verdict.reason)
        for name, verdict in zip(names, verdicts, strict=True)
        if verdict.reason is not None
    )
    if bad and on_bad_image == "error":
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"data: cannot read {bad[0].where}{more}: {bad[0].reason}; repair or remove it, or "
            "set data.on_bad_image=skip."
        )
    for image in bad[:5]:
        log.warning("skipped unreadable image %s: %s", image.where, image.reason)
    if bad:
        log.warning("%s: %d of %d images skipped as unreadable", title, len(bad), len(names))
    return bad


def _judge(read: Callable[[], bytes], pixels: Pixels) -> Verdict:
    try:
        data = read()
        _, deep = decode(data, pixels)
    except OSError as error:
        return Verdict("", error.strerror or str(error))
    except ValueError as error:
        return Verdict("", str(error))
    return Verdict(hashlib.blake2b(data, digest_size=16).hexdigest(), deep=deep)


def _load(memo: Path) -> dict[str, Verdict]:
    try:
        stored = json.loads(memo.read_bytes())
        if stored["version"] == VERSION:
            deep = set(stored["deep"])
            return {
                str(key): Verdict(str(value), deep=key in deep)
                for key, value in stored["hashes"].items()
            }
    # The first scan of a data set has no memo file.
    except FileNotFoundError:
        pass
    # A damaged memo only costs time, so it must not stop the run.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s); all images are checked again", memo, error)
    return {}
