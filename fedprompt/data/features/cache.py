"""The feature cache: the frozen image tower encodes each image once, and later runs read the rows.

It is filled before the first round, in whichever process of a machine needs a row first. A row is
found by the content of its image, the view, the backbone's weights and its preprocessing. So a row
is never out of date, only unused; a file that was added or changed is encoded by itself; and a pass
that was interrupted goes on where it was. Labels, names and places of images do not matter.

Suffixes: N images of a data set, R images (rows) that are asked for, B images in a batch.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedprompt.data.cache_files import ADVICE, digest, locked
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.encoding import Encoding, ImageEncoder
from fedprompt.data.features.rows import Rows
from fedprompt.data.features.segments import Keys, Kind
from fedprompt.data.features.staging import staged
from fedprompt.data.features.store import Store, remove_unused
from fedprompt.data.progress import announce, progress_bar
from fedprompt.data.threads import in_threads
from fedprompt.errors import UserError

log = logging.getLogger(__name__)


def image_keys(dataset: ImageDataset, *, of_place: bool = False) -> Keys:
    """The keys by which rows of images are found.

    Args:
        dataset: the images.
        of_place: whether rows also depend on the number of the image in its data set.

    Returns:
        One key per image (N,). Images of equal content have equal keys, unless `of_place`.
    """
    if not dataset.pixel_keys:
        # Only the whole data set has a key, so that an image is known by its number in there.
        whole = bytes.fromhex(digest(dataset.fingerprint))[:8]
        parts_N2 = np.empty((len(dataset), 2), dtype=">u8")
        parts_N2[:, 0] = int.from_bytes(whole, "big")
        parts_N2[:, 1] = np.arange(len(dataset))
        return np.frombuffer(parts_N2.tobytes(), dtype="S16")
    content = [bytes.fromhex(key) for key in dataset.pixel_keys]
    if of_place:
        content = [
            hashlib.blake2b(key + i.to_bytes(8, "big"), digest_size=16).digest()
            for i, key in enumerate(content)
        ]
    return np.frombuffer(b"".join(content), dtype="S16")


def cached(
    clip: ImageEncoder,
    dataset: ImageDataset,
    cache_dir: Path,
    encodings: Sequence[Encoding],
    *,
    index_R: NDArray[np.int64] | None = None,
    progress: bool = True,
) -> list[Rows]:
    """Read encoded images from the cache; those that are not there are computed and stored.

    If several processes need the same images, one computes them and the others wait.

    Args:
        clip: the backbone.
        dataset: the images.
        cache_dir: the cache folder.
        encodings: how an image becomes a row; all share `load`, and each image is opened once for
            all of them.
        index_R: the images to encode, in this order; None for all of them.
        progress: whether to report progress on stderr.

    Returns:
        For each encoding, rows (R, *encoding.shape), memory-mapped and read-only. Each row is
        verified when it is first read.

    Raises:
        UserError: the cache folder cannot be written, an image cannot be read, or an encoding is
            not finite.
    """
    numbers_R = np.arange(len(dataset)) if index_R is None else index_R
    columns = [_column(clip, dataset, cache_dir, encoding, numbers_R) for encoding in encodings]
    found = [column.store.find(column.keys_R) for column in columns]
    if not any(one.missing_N.any() for one in found):
        return [one.rows() for one in found]
    folder = cache_dir / "features"
    with locked(folder / columns[0].store.owner):
        # Another process may have encoded the images while this one waited for the lock.
        for column in columns:
            column.store.repair()
        found = [column.store.find(column.keys_R) for column in columns]
        missing = [one.missing_N for one in found]
        if any(missing_R.any() for missing_R in missing):
            _tell_of_former(dataset, folder)
            _Pass(clip, dataset, columns, numbers_R, progress).encode(missing)
            _clean(dataset, columns, folder)
            found = [column.store.find(column.keys_R) for column in columns]
    if any(one.missing_N.any() for one in found):
        raise UserError(f"feature cache: {folder} was written but cannot be read; {ADVICE}.")
    return [one.rows() for one in found]


def put(
    clip: ImageEncoder,
    dataset: ImageDataset,
    cache_dir: Path,
    encoding: Encoding,
    rows_N: NDArray[Any],
) -> None:
    """Store rows that were computed elsewhere, one per image of the data set.

    Raises:
        UserError: the cache folder cannot be written.
    """
    column = _column(clip, dataset, cache_dir, encoding, np.arange(len(dataset)))
    with locked(cache_dir / "features" / column.store.owner):
        column.store.repair()
        writer = column.store.writer()
        writer.add(column.keys_R, np.ascontiguousarray(rows_N, dtype=encoding.dtype))
        writer.seal()
        writer.close()


@dataclass(frozen=True, eq=False)
class _Column:
    """An encoding, where its rows are, and the keys of the images that are asked for."""

    encoding: Encoding
    store: Store
    keys_R: Keys


def _column(
    clip: ImageEncoder,
    dataset: ImageDataset,
    cache_dir: Path,
    encoding: Encoding,
    numbers_R: NDArray[np.int64],
) -> _Column:
    weights = clip.fingerprint if encoding.of_weights else ""
    key = digest(weights, clip.preprocess_fingerprint, encoding.view)
    store = Store(
        cache_dir / "features" / f"{encoding.view}-{key}",
        Kind(encoding.shape, encoding.dtype),
        digest(dataset.place or dataset.fingerprint),
    )
    return _Column(encoding, store, image_keys(dataset, of_place=encoding.of_place)[numbers_R])


@dataclass(frozen=True, eq=False)
class _Pass:
    """One pass over images that fills all columns; fields as the arguments of `cached`."""

    clip: ImageEncoder
    dataset: ImageDataset
    columns: Sequence[_Column]
    numbers_R: NDArray[np.int64]
    progress: bool

    def encode(self, missing: Sequence[NDArray[np.bool_]]) -> None:
        """Encode the images that a column lacks, batch by batch; `missing` has a mask (R,) each."""
        load = self.columns[0].encoding.load
        wanted = [_first_of_each(c.keys_R, m) for c, m in zip(self.columns, missing, strict=True)]
        places = np.flatnonzero(np.any(wanted, axis=0))
        views = [c.encoding.view for c, w in zip(self.columns, wanted, strict=True) if w.any()]
        what = "" if views == ["center"] else f" ({', '.join(views)})"
        name, total, start = f"{self.dataset.name}{what}", len(places), time.monotonic()
        announce(f"encoding {total} images of {name}; later runs read the cache", self.progress)
        size = self.clip.image_batch
        # Two batches are decoded ahead of the encoder.
        decoded = in_threads(load, self.numbers_R[places].tolist(), ahead=2 * size)
        with ExitStack() as stack:
            images = stack.enter_context(closing(decoded))
            writers = [column.store.writer() for column in self.columns]
            for writer in writers:
                stack.callback(writer.close)
            advance = stack.enter_context(progress_bar(f"encoding {name}", total, self.progress))
            in_turn = [places[first : first + size] for first in range(0, total, size)]
            loaded = (torch.stack(list(islice(images, len(batch_B)))) for batch_B in in_turn)
            # Pixels alone need no device.
            towers = any(
                w.any() and c.encoding.of_weights for c, w in zip(self.columns, wanted, strict=True)
            )
            batches = staged(loaded, self.clip.device if towers else torch.device("cpu"))
            for batch_B, batch in zip(in_turn, batches, strict=True):
                for column, writer, wanted_R in zip(self.columns, writers, wanted, strict=True):
                    asked_B = wanted_R[batch_B]
                    if asked_B.any():
                        numbers = self.numbers_R[batch_B[asked_B]]
                        # What needs no tower is computed on the CPU.
                        tower = column.encoding.of_weights
                        images_BCHW = batch.there_BCHW if tower else batch.here_BCHW
                        # A batch of all images is not copied.
                        some = images_BCHW if asked_B.all() else images_BCHW[asked_B]
                        rows = _encoded(column.encoding, some, numbers)
                        writer.add(column.keys_R[batch_B[asked_B]], rows)
                advance(len(batch_B))
            for writer in writers:
                writer.seal()
        announce(f"encoded {total} images in {time.monotonic() - start:.1f} s", self.progress)


def _first_of_each(keys_R: Keys, missing_R: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Of the missing images, the first one of each key."""
    places = np.flatnonzero(missing_R)
    _, first = np.unique(keys_R[places], return_index=True)
    wanted_R = np.zeros(len(keys_R), dtype=bool)
    wanted_R[places[first]] = True
    return wanted_R


def _encoded(
    encoding: Encoding, images_BCHW: torch.Tensor, numbers_B: NDArray[np.int64]
) -> NDArray[Any]:
    """Encode one batch as rows (B, *shape) and check them; `numbers_B` are for the message."""
    rows = np.ascontiguousarray(encoding.encode(images_BCHW).numpy(), dtype=encoding.dtype)
    if rows.shape != (len(images_BCHW), *encoding.shape):
        raise ValueError(f"encoding gave {rows.shape} for {len(images_BCHW)} images")
    # A NaN in the cache would enter every later run, far from its cause.
    if not np.isfinite(rows).all():
        raise UserError(
            f"features of images {numbers_B[0]} to {numbers_B[-1]} are not finite; check the "
            "weights (backbone.checkpoint) or use backbone.precision=float32."
        )
    return rows


def _tell_of_former(dataset: ImageDataset, folder: Path) -> None:
    """Log one line if an earlier version has encoded this data set."""
    former = folder / digest(dataset.fingerprint)
    if former.is_dir():
        log.warning(
            "feature cache: %s is of an earlier version and is not read; the images are encoded "
            "again, and you may delete that folder",
            former,
        )


def _clean(dataset: ImageDataset, columns: Sequence[_Column], folder: Path) -> None:
    """Remove what the rows that were just written supersede; call under the owner's lock."""
    for column in columns:
        # Rows of crops are known by number too, so nothing is known of images outside the set.
        if not column.encoding.of_place:
            others = b"".join(bytes.fromhex(key) for key in dataset.retained)
            column.store.compact(
                np.concatenate([image_keys(dataset), np.frombuffer(others, dtype="S16")])
            )
    remove_unused(folder, time.time())
