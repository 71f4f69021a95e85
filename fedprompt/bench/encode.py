"""From image files on a disk to cached features: decoding, the image tower, and both together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.bench.backbones import random_images
from fedprompt.bench.compare import Row, clock
from fedprompt.bench.output import Column, Output
from fedprompt.data.dataset import TRAIN, ImageDataset
from fedprompt.data.features.cache import cached
from fedprompt.data.features.encoding import plain
from fedprompt.data.threads import DECODE_THREADS, in_threads
from fedprompt.rng import generator

COLUMNS: tuple[Column, ...] = (
    ("case", "case", ""),
    ("threads", "threads", "d"),
    ("decoded/s", "decoded_per_s", ".1f"),
    ("tower/s", "tower_per_s", ".1f"),
    ("encoded/s", "encoded_per_s", ".1f"),
    ("from cache/s", "cached_per_s", ".0f"),
)


@dataclass(frozen=True)
class EncodeOptions:
    """What `bench encode` measures: the number of images, and their height and width in pixels."""

    images: int = 256
    size: int = 256
    repeats: int = 3


def bench_encode(clip: FrozenCLIP, options: EncodeOptions, out: Output) -> None:
    """Measure images per second; every part alone, and the whole pass that fills the cache.

    Args:
        clip: the frozen backbone.
        options: what to measure.
        out: where rows and notes go.
    """
    with tempfile.TemporaryDirectory(prefix="fedprompt-bench-") as folder:
        dataset = _write_images(Path(folder), options)
        encoding, batch = plain(clip, dataset), min(clip.image_batch, options.images)
        pixels, numbers = random_images(clip, batch, seed=0), range(options.images)

        def encode(cache: Path) -> None:
            (rows,) = cached(clip, dataset, cache, [encoding], progress=False)
            np.asarray(rows[np.arange(options.images)])

        def decode() -> None:
            for _ in in_threads(encoding.load, numbers, ahead=2 * batch):
                pass

        out.progress(f"{options.images} images of {options.size} x {options.size} pixels")
        clip.encode_images(pixels)  # the first call allocates
        caches = [Path(folder, f"cache-{i}") for i in range(options.repeats)]
        encoded = min(_seconds(partial(encode, cache)) for cache in caches)

        def fastest(call: Callable[[], Any]) -> float:
            return min(_seconds(call) for _ in range(options.repeats))

        row: Row = {
            "case": f"JPEG {options.size}, batches of {batch}",
            "threads": DECODE_THREADS,
            "decoded_per_s": options.images / fastest(decode),
            "tower_per_s": batch / fastest(lambda: clip.encode_images(pixels)),
            "encoded_per_s": options.images / encoded,
            "cached_per_s": options.images / fastest(partial(encode, caches[0])),
        }
    out.add(row)
    out.table(COLUMNS)


def _seconds(call: Callable[[], Any]) -> float:
    began = clock()
    call()
    return clock() - began


def _write_images(folder: Path, options: EncodeOptions) -> ImageDataset:
    """Write smooth random JPEG files, which compress like photographs, and open them as a set."""

    def path(number: int) -> Path:
        return folder / f"{number}.jpg"

    def opened(number: int) -> Image.Image:
        with Image.open(path(number)) as picture:
            return picture.convert("RGB")

    size = (options.size, options.size)
    for number in range(options.images):
        coarse = generator(0, "bench", "picture", number).integers(0, 256, (32, 32, 3))
        picture = Image.fromarray(coarse.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        picture.save(path(number), quality=90)
    return ImageDataset(
        name="bench",
        class_names=("picture", "other"),
        labels_N=np.zeros(options.images, dtype=np.int64),
        split_N=np.full(options.images, TRAIN, dtype=np.int8),
        domains_N=np.zeros(options.images, dtype=np.int64),
        domain_names=("bench",),
        fingerprint=f"bench {options}",
        open_image=opened,
    )
