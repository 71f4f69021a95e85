"""The feature cache: the frozen image tower encodes each image once, and later runs read the file.

It is filled before the first round, in whichever process of a machine needs a file first. The key
of a file hashes the backbone's weights, its preprocessing, the view and the pixels of the data set.
A file is therefore never out of date, only unused, and may be deleted at any time.

Suffixes: N images of a data set, R images (rows) of a file, B images in a batch.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from fedprompt.data.cache_files import ADVICE, DECODE_THREADS, digest, locked, write_atomic
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.checked import BlockSums, CheckedRows, Rows, read_sums, sums_of
from fedprompt.data.features.encoding import Encoding, ImageEncoder
from fedprompt.data.progress import announce, progress_bar
from fedprompt.errors import UserError

log = logging.getLogger(__name__)


def feature_path(
    clip: ImageEncoder,
    dataset: ImageDataset,
    cache_dir: Path,
    view: str = "center",
    *,
    of_weights: bool = True,
) -> Path:
    """Return the path of the file with one view of a data set's images, encoded by one backbone.

    Args:
        clip: the backbone.
        dataset: the images.
        cache_dir: the cache folder.
        view: name of the encoding; see `Encoding.view`.
        of_weights: False for files that depend on the preprocessing only, such as pixels; all
            backbones with the same preprocessing then share the file.

    Returns:
        The path; the file need not exist.
    """
    weights = clip.fingerprint if of_weights else ""
    key = digest(weights, clip.preprocess_fingerprint, view, dataset.fingerprint)
    return cache_dir / "features" / digest(dataset.fingerprint) / f"{view}-{key}.npy"


def cached(
    clip: ImageEncoder,
    dataset: ImageDataset,
    cache_dir: Path,
    encoding: Encoding,
    *,
    index_R: NDArray[np.int64] | None = None,
    progress: bool = True,
) -> Rows:
    """Read encoded images from the cache; they are computed and stored on first use.

    If several processes need the same file, one computes it and the others wait.

    Args:
        clip: the backbone.
        dataset: the images.
        cache_dir: the cache folder.
        encoding: how an image becomes a row.
        index_R: the images to encode, in this order; None for all of them.
        progress: whether to report progress on stderr.

    Returns:
        Rows (R, *encoding.shape), memory-mapped and read-only. They are verified block by block
        when they are first read.

    Raises:
        UserError: the cache folder cannot be written, an image cannot be read, or an encoding is
            not finite.
    """
    view, rows = encoding.view, range(len(dataset))
    if index_R is not None:
        # The images enter the key in a fixed byte order, so that all machines agree on the name.
        view = f"{view}-of-{digest(index_R.astype('<i8').tobytes().hex())[:16]}"
        rows = index_R.tolist()
    path = feature_path(clip, dataset, cache_dir, view, of_weights=encoding.of_weights)
    expected = (len(rows), *encoding.shape), np.dtype(encoding.dtype)
    rows_found = _read(path, *expected)
    if rows_found is not None:
        return rows_found
    with locked(path):
        # Another process may have written the file while this one waited for the lock.
        rows_found = _read(path, *expected, report=True)
        if rows_found is None:
            job = _Job(clip, dataset, encoding, rows, progress)
            write_atomic(path, job.write)
            rows_found = _read(path, *expected)
    if rows_found is None:
        raise UserError(f"feature cache: {path} was written but cannot be read; {ADVICE}.")
    return rows_found


def _read(
    path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], *, report: bool = False
) -> Rows | None:
    """Map the cached rows, or return None if there is no complete file of this shape and type."""
    try:
        # allow_pickle=False: a pickle could execute code when it is opened.
        array: np.memmap[Any, np.dtype[Any]] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        if report:
            log.warning("feature cache: %s is damaged (%s) and is computed again", path, error)
        return None
    with path.open("rb") as file:
        file.seek(array.offset + array.nbytes)
        trailer = file.read()
    # np.load maps a file whatever follows the rows.
    complete = not trailer or read_sums(array, trailer) is not None
    if array.shape != shape or array.dtype != dtype or not complete:
        if report:
            log.warning(
                "feature cache: %s holds %s %s instead of %s %s and is computed again",
                path,
                array.dtype,
                array.shape,
                dtype,
                shape,
            )
        return None
    sums = read_sums(array, trailer or _add_sums(path, array))
    return array if sums is None else CheckedRows(array, sums, path)


def _add_sums(path: Path, array: np.memmap[Any, np.dtype[Any]]) -> bytes:
    """Add checksums to a file of an older version, which has none.

    Its present content is taken to be right. If the folder cannot be written, the file stays as it
    is, and what this process reads is verified against the content at this moment.

    Returns:
        What follows the rows.
    """
    trailer = sums_of(array).trailer()
    try:
        # One write at a fixed place: processes that do this at the same time write the same bytes.
        with path.open("r+b") as file:
            file.seek(array.offset + array.nbytes)
            file.write(trailer)
    except OSError as error:
        log.debug("feature cache: no checksums for %s: %s", path, error)
    return trailer


@dataclass(frozen=True)
class _Job:
    """A cache file that has to be computed; fields as the arguments of `cached`."""

    clip: ImageEncoder
    dataset: ImageDataset
    encoding: Encoding
    rows: Sequence[int]
    progress: bool

    def write(self, file: BinaryIO) -> None:
        """Encode all rows batch by batch and write them to `file` in NumPy's .npy format."""
        # We write through the file and not through a writable memory map: when the disk is full,
        # a map ends the process with SIGBUS, while a write raises an error that we can report.
        total, start, shape = len(self.rows), time.monotonic(), self.encoding.shape
        header = {"descr": self.encoding.dtype, "fortran_order": False, "shape": (total, *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        what = "" if self.encoding.view == "center" else f" ({self.encoding.view})"
        name = f"{self.dataset.name}{what}"
        sums = BlockSums(int(np.prod(shape)) * np.dtype(self.encoding.dtype).itemsize)
        announce(f"encoding {total} images of {name}; later runs read the cache", self.progress)
        with progress_bar(f"encoding {name}", total, self.progress) as advance:
            for first, images_BCHW in self._batches():
                rows = self._encode(first, images_BCHW)
                file.write(rows.tobytes())
                sums.add(rows)
                advance(len(rows))
        file.write(sums.trailer())
        announce(f"encoded {total} images in {time.monotonic() - start:.1f} s", self.progress)

    def _encode(self, first: int, images_BCHW: torch.Tensor) -> NDArray[Any]:
        """Encode one batch as rows (B, *shape) and check them; `first` is its first row number."""
        features = self.encoding.encode(images_BCHW).numpy()
        rows = np.ascontiguousarray(features, dtype=self.encoding.dtype)
        if rows.shape != (len(images_BCHW), *self.encoding.shape):
            raise ValueError(f"encoding gave {rows.shape} for {len(images_BCHW)} images")
        # A NaN in the cache would enter every later run, far from its cause.
        if not np.isfinite(rows).all():
            raise UserError(
                f"features of images {first} to {first + len(rows) - 1} are not finite; check the "
                "weights (backbone.checkpoint) or use backbone.precision=float32."
            )
        return rows

    def _batches(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first row, images (B, C, H, W)); threads decode two batches ahead of the encoder.

        The bound on the number of decoded batches also bounds the memory that they take.
        """
        starts = range(0, len(self.rows), self.clip.image_batch)
        pool = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode")
        ahead: deque[tuple[int, list[Future[torch.Tensor]]]] = deque()
        try:
            for first in starts:
                batch = self.rows[first : first + self.clip.image_batch]
                ahead.append((first, [pool.submit(self.encoding.load, i) for i in batch]))
                if len(ahead) > 2:
                    ready, futures = ahead.popleft()
                    yield ready, torch.stack([future.result() for future in futures])
            while ahead:
                ready, futures = ahead.popleft()
                yield ready, torch.stack([future.result() for future in futures])
        finally:
            # After an error, images that are still queued must not be decoded first.
            pool.shutdown(cancel_futures=True)
