"""Decodes every image once when a data set is opened, to find bad images and to hash the others.

This must happen before images are divided among clients, because leaving an image out changes the
indices of all later ones. The verdicts are kept in a journal (`verdicts`), so that later runs read
only files that have changed, and decode only content that is new.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedprompt.data.cache_files import digest, locked
from fedprompt.data.dataset import BadImage
from fedprompt.data.images import PLAIN, decode
from fedprompt.data.pixels import Pixels
from fedprompt.data.progress import progress_bar
from fedprompt.data.sources.parts.verdicts import Journal, Stamp, Verdict, settled
from fedprompt.data.threads import in_threads
from fedprompt.errors import UserError

AHEAD = 256
"""Images whose reading may be ahead of the journal."""
LONG_SCAN = 500
"""Number of images from which a scan reports its progress; fewer take about a second."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scan:
    """What a scan found.

    Attributes:
        verdicts: one per image that was asked for.
        others: hashes of readable images that earlier scans of the same place have seen, that were
            not asked for, and that still exist.
    """

    verdicts: tuple[Verdict, ...]
    others: tuple[str, ...]


def journal_path(cache_dir: Path, *source: str) -> Path:
    """The journal of one place of images, which the strings `source` identify."""
    return cache_dir / "scan" / f"{digest(*source)}.journal"


def scan(
    names: Sequence[str],
    stamp: Callable[[str], Stamp | None],
    read: Callable[[int], bytes],
    path: Path,
    title: str,
    pixels: Pixels = PLAIN,
) -> Scan:
    """Check every image, reading only those that the journal does not know to be unchanged.

    Args:
        names: a unique name of each image in its place, such as its path.
        stamp: returns the stamp of a name without reading the image, or None if there is no such
            image or its file cannot be examined.
        read: returns the encoded bytes of image i, or raises `OSError` or `ValueError`.
        path: the journal. It holds for one place and for one set of `pixels` options.
        title: name of the data set, for the progress report and the warning.
        pixels: how stored values become RGB.

    Returns:
        One verdict per image, and what is known of other images of the place.

    Raises:
        UserError: the cache folder cannot be written.
    """
    # Under the lock, a second process that starts at the same time waits and then finds the hashes.
    with locked(path):
        _tell_of_former(path)
        journal = Journal(path)
        now_ns = time.time_ns()
        stamps = [stamp(name) for name in names]
        found = [journal.verdict(*image) for image in zip(names, stamps, strict=True)]
        unknown = [i for i, verdict in enumerate(found) if verdict is None]
        # Content that was decoded once, under whatever name and time, need not be decoded again.
        decoded = {verdict.hash: verdict for _, verdict in journal.known.values() if verdict.hash}
        chunk = max(1, min(AHEAD, len(unknown) // 50))
        new: dict[str, tuple[Stamp | None, Verdict]] = {}
        with (
            closing(
                in_threads(lambda i: _judge(read, i, pixels, decoded), unknown, ahead=AHEAD)
            ) as judged,
            progress_bar(f"checking {title}", len(unknown), len(unknown) >= LONG_SCAN) as advance,
        ):
            for i, verdict in zip(unknown, judged, strict=True):
                found[i] = verdict
                new[names[i]] = (stamps[i] if settled(stamps[i], now_ns) else None), verdict
                if len(new) >= chunk:
                    journal.add(new)
                    new = {}
                advance(1)
        journal.add(new)
        verdicts = tuple(verdict for verdict in found if verdict is not None)
        asked = set(names)
        others = {name: stamp(name) for name in journal.known if name not in asked}
        journal.complete(name for name, status in others.items() if status is None)
        hashes = tuple(journal.known[name][1].hash for name in others if name in journal.known)
    deep_ones = sum(verdict.deep for verdict in verdicts)
    if deep_ones and not pixels.stretches:
        log.warning(
            "%s: %d of %d images have more than 8 bits per value. Their range of 16 bits is mapped "
            "to black and white, so images of fewer bits are dark: set data.stretch=[low, high], "
            "e.g. [0, 4095] for 12 bits, or [0, 65535] to keep it as it is; or "
            "data.percentiles=[2, 98], of each image.",
            title, deep_ones, len(verdicts),
        )  # fmt: skip
    return Scan(verdicts, hashes)


def _tell_of_former(path: Path) -> None:
    """Log one line if only an earlier version has scanned this place."""
    former = path.with_suffix(".json")
    if former.exists() and not path.exists():
        log.warning(
            "%s is of an earlier version and is not read; the images are checked again, and you "
            "may delete that file",
            former,
        )


def content_hash(data: bytes) -> str:
    """The hash of the encoded bytes of an image."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def pixel_keys(hashes: Sequence[str], pixels: Pixels) -> tuple[str, ...]:
    """`ImageDataset.pixel_keys` of images with these hashes, decoded with these options."""
    if not pixels.key:
        return tuple(hashes)
    return tuple(digest(one, *pixels.key) for one in hashes)


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


def _judge(
    read: Callable[[int], bytes], image: int, pixels: Pixels, decoded: Mapping[str, Verdict]
) -> Verdict:
    try:
        data = read(image)
        hash_ = content_hash(data)
        if hash_ in decoded:
            return decoded[hash_]
        _, deep = decode(data, pixels)
    except OSError as error:
        return Verdict("", error.strerror or str(error))
    except ValueError as error:
        return Verdict("", str(error))
    return Verdict(hash_, deep=deep)
