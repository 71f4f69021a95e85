"""The feature cache: the frozen image tower sees each image once, ever.

Layout, all under the cache folder (`output.cache`, else $FEDPROMPT_CACHE, else
~/.cache/fedprompt):

    features/<data set>/<view>-<key>.npy   one float32 row per image, in data set order
    scan/<data set>.json                   which files were already read and hashed

`<key>` hashes the backbone, its preprocessing, the view and the data set's pixels, so a file is
never out of date, only unused. An `Encoding` says what a file holds: features of the plain view or
of an augmented one, of its patches, its pixels, or local features of some of the images.
Suffixes: N images, D embedding dimensions, B images in a batch.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedprompt.data.dataset import ImageDataset
from fedprompt.data.images import random_view
from fedprompt.errors import UserError
from fedprompt.files import replacing
from fedprompt.rng import generator

ADVICE = "set output.cache or $FEDPROMPT_CACHE to a folder with room that you may write to"
DECODE_THREADS = min(8, os.cpu_count() or 1)
log = logging.getLogger(__name__)


class ImageEncoder(Protocol):
    """What the cache needs of a frozen CLIP."""

    @property
    def fingerprint(self) -> str:
        """Changes when the weights do."""

    @property
    def preprocess_fingerprint(self) -> str:
        """Changes when preprocessing does."""

    @property
    def embed_dim(self) -> int:
        """Number of features D."""

    @property
    def image_batch(self) -> int:
        """Images encoded at once."""

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """One RGB image as a (3, H, W) tensor."""

    def encode_images(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Un-normalised features (B, D), float32, on the CPU."""


@dataclass(frozen=True)
class Encoding:
    """What a cache file holds of every image.

    `view` names it and keys the file, with whatever it depends on; `load` makes image i an input
    (3, H, W); `encode` makes B inputs B rows of `shape` on the CPU; `dtype` is how they are kept;
    `of_weights` says that rows depend on the backbone's weights, not on its preprocessing alone.
    """

    view: str
    shape: tuple[int, ...]
    load: Callable[[int], torch.Tensor]
    encode: Callable[[torch.Tensor], torch.Tensor]
    dtype: str = "<f4"
    of_weights: bool = True


def plain(clip: ImageEncoder, dataset: ImageDataset) -> Encoding:
    """The usual features (D,) of the whole image."""

    def load(index: int) -> torch.Tensor:
        return clip.preprocess(dataset.open_image(index))

    return Encoding("center", (clip.embed_dim,), load, clip.encode_images)


def augmented(clip: ImageEncoder, dataset: ImageDataset, view: int, min_scale: float) -> Encoding:
    """The features (D,) of one random crop, perhaps mirrored, per image; view 0 is the plain one.

    What is cropped depends on view, image and `min_scale` only, not on an experiment's seed, so
    that all runs share the files. The crop has the size that `preprocess` would give it, which then
    leaves it to be normalised like any other image.
    """
    if view == 0:
        return plain(clip, dataset)
    height, width = clip.preprocess(Image.new("RGB", (64, 64))).shape[-2:]

    def load(index: int) -> torch.Tensor:
        draw = generator(0, "view", view, index)
        image = dataset.open_image(index)
        return clip.preprocess(random_view(image, (width, height), draw, min_scale))

    return Encoding(f"crop{min_scale:g}-{view}", (clip.embed_dim,), load, clip.encode_images)


def default_cache_dir(configured: str | None = None) -> Path:
    """The cache folder: `output.cache`, else $FEDPROMPT_CACHE, else ~/.cache/fedprompt."""
    chosen = configured or os.environ.get("FEDPROMPT_CACHE") or "~/.cache/fedprompt"
    return Path(chosen).expanduser()


def content_dir(cache_dir: Path, dataset: ImageDataset) -> Path:
    """The folder with everything derived from exactly these images; safe to delete."""
    return cache_dir / "features" / digest(dataset.fingerprint)


def feature_path(
    clip: ImageEncoder,
    dataset: ImageDataset,
    cache_dir: Path,
    view: str = "center",
    *,
    of_weights: bool = True,
) -> Path:
    """The file with this backbone's features of one `view` of the images."""
    weights = clip.fingerprint if of_weights else ""
    key = digest(weights, clip.preprocess_fingerprint, view, dataset.fingerprint)
    return content_dir(cache_dir, dataset) / f"{view}-{key}.npy"


def cached_features(
    clip: ImageEncoder, dataset: ImageDataset, cache_dir: Path, *, progress: bool = True
) -> NDArray[np.float32]:
    """Un-normalised image features (N, D), memory-mapped and read-only; computed on first use.

    Processes that start at once compute the file once: one works, the others wait for it.

    Raises:
        UserError: the cache folder cannot be written, or the features are not finite.
    """
    return cached(clip, dataset, cache_dir, plain(clip, dataset), progress=progress)


def cached(
    clip: ImageEncoder,
    dataset: ImageDataset,
    cache_dir: Path,
    encoding: Encoding,
    *,
    index_R: NDArray[np.int64] | None = None,
    progress: bool = True,
) -> NDArray[Any]:
    """What `encoding` makes of the images `index_R` (None: of all), in that order; as above."""
    view, rows = encoding.view, range(len(dataset))
    if index_R is not None:
        view = f"{view}-of-{digest(index_R.astype('<i8').tobytes().hex())[:16]}"
        rows = index_R.tolist()
    path = feature_path(clip, dataset, cache_dir, view, of_weights=encoding.of_weights)
    expected = (len(rows), *encoding.shape), np.dtype(encoding.dtype)
    found = _read(path, *expected)
    if found is not None:
        return found
    with locked(path):
        found = _read(path, *expected, report=True)  # another process may have been faster
        if found is None:
            job = _Job(clip, dataset, encoding, rows, progress)
            write_atomic(path, job.write)
            found = _read(path, *expected)
    if found is None:
        raise UserError(f"feature cache: {path} does not read back as written; {ADVICE}.")
    return found


def digest(*parts: str) -> str:
    """A short content key (128 bits) of some strings."""
    text = "\x1f".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of one cache file, made with its folder; waits for other processes."""
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process that is writing %s", path)
            lock.acquire()
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from None
    try:
        yield
    finally:
        lock.release()


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a cache file so that others see it complete or not at all; call under its lock.

    Temporary files that a killed process left behind are removed first: under the lock they
    belong to nobody.
    """
    try:
        for stale in path.parent.glob(f".{path.name}.*.tmp"):
            stale.unlink()
        with replacing(path) as temporary, temporary.open("wb") as file:
            write(file)
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from None


@contextmanager
def progress_bar(title: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, advanced by the yielded function, where stderr is a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def _announce(line: str, shown: bool) -> None:
    """A plain line on stderr where a bar was asked for and there is no terminal to draw it on."""
    if shown and not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
    else:
        log.info(line)


def _cannot_write(path: Path, error: OSError) -> str:
    reason = error.strerror or type(error).__name__
    return f"cache: cannot write {path}: {reason}; {ADVICE}."


def _read(
    path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], *, report: bool = False
) -> NDArray[Any] | None:
    """The cached rows, or None where there is no complete file of this shape and type."""
    try:
        array: np.memmap[Any, np.dtype[Any]] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        if report:
            log.warning("feature cache: %s is damaged (%s); computing it again", path, error)
        return None
    complete = array.offset + array.nbytes == path.stat().st_size
    if array.shape != shape or array.dtype != dtype or not complete:
        if report:
            log.warning(
                "feature cache: %s holds %s %s, not %s %s; computing it again",
                path,
                array.dtype,
                array.shape,
                dtype,
                shape,
            )
        return None
    return array


@dataclass(frozen=True)
class _Job:
    """One cache file to be computed."""

    clip: ImageEncoder
    dataset: ImageDataset
    encoding: Encoding
    rows: Sequence[int]
    progress: bool

    def write(self, file: BinaryIO) -> None:
        """Write all rows as .npy, batch by batch.

        Through the file, not through a writable memory map: on a full disk a map ends the process
        with SIGBUS where a write raises.
        """
        total, start, shape = len(self.rows), time.monotonic(), self.encoding.shape
        header = {"descr": self.encoding.dtype, "fortran_order": False, "shape": (total, *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        what = "" if self.encoding.view == "center" else f" ({self.encoding.view})"
        name = f"{self.dataset.name}{what}"
        _announce(f"encoding {total} images of {name}, once: features are cached", self.progress)
        with progress_bar(f"encoding {name}", total, self.progress) as advance:
            for first, images_BCHW in self._batches():
                features = self.encoding.encode(images_BCHW).numpy()
                rows = np.ascontiguousarray(features, dtype=self.encoding.dtype)
                if rows.shape != (len(images_BCHW), *shape):
                    raise ValueError(f"encoding gave {rows.shape} for {len(images_BCHW)} images")
                if not np.isfinite(rows).all():
                    raise UserError(
                        f"features of images {first} to {first + len(rows) - 1} are not finite; "
                        "check the weights (backbone.checkpoint) or use "
                        "backbone.precision=float32."
                    )
                file.write(rows.tobytes())
                advance(len(rows))
        _announce(f"encoded {total} images in {time.monotonic() - start:.1f} s", self.progress)

    def _batches(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, images (B, 3, H, W)), decoded by threads two batches ahead of the encoder."""
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
            pool.shutdown(cancel_futures=True)
