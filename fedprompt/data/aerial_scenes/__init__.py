"""A deterministic generator of small aerial land-use scenes: the data set that needs no download.

Facts: 20 classes (names as in UC Merced and RESISC45), 4 federated and 12 pre-training domains
(sensor x season x region x ground resolution), 64x64 RGB, any number of images. An image is a
function of (class, domain, index, seed) and `VERSION` and of nothing else.

These are drawings, not photographs. They exercise a federated prompt-learning system end to end;
accuracies on them say nothing about accuracies on real remote sensing data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fedprompt.config.schema import DataConfig
from fedprompt.data.aerial_scenes.canvas import Canvas
from fedprompt.data.aerial_scenes.domains import (
    DOMAINS,
    FEDERATED_DOMAINS,
    PRETRAINING_DOMAINS,
    sense,
)
from fedprompt.data.aerial_scenes.objects import Scene
from fedprompt.data.aerial_scenes.scenes import (
    CLASSES,
    DRAW,
    DRAW_EXTRA,
    EXTRA_CLASSES,
    HELD_OUT_CLASSES,
)
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.errors import UserError, did_you_mean
from fedprompt.rng import generator

__all__ = [
    "CLASSES",
    "EXTRA_CLASSES",
    "FEDERATED_DOMAINS",
    "HELD_OUT_CLASSES",
    "PRETRAINING_DOMAINS",
    "VERSION",
    "contact_sheet",
    "draw",
    "load",
    "render",
]

VERSION = 1  # raise it when any pixel changes: it enters the fingerprint of the data set


def draw(
    class_name: str, domain: str, index: int, seed: int = 0
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """The image (64, 64, 3) and notes on what stands in it, for captions."""
    _check(domain, tuple(DOMAINS), "domain")
    _check(class_name, CLASSES + EXTRA_CLASSES, "class")
    look = DOMAINS[domain]
    rng = generator(seed, "aerial_scenes", VERSION, class_name, domain, index)
    canvas = Canvas(
        rng,
        step=look.zoom * rng.uniform(0.88, 1.14),
        angle=rng.uniform(0.0, 2.0 * np.pi),
        centre=(rng.uniform(-5.0, 5.0), rng.uniform(-5.0, 5.0)),
        sun=rng.uniform(0.3, 1.3),
    )
    scene = Scene(canvas, look, rng)
    (DRAW.get(class_name) or DRAW_EXTRA[class_name])(scene)
    image = sense(canvas.rgb_HW3, look.sensor, rng)
    return np.round(image * 255.0).astype(np.uint8), tuple(scene.notes)


def render(class_name: str, domain: str, index: int, seed: int = 0) -> NDArray[np.uint8]:
    """One image, uint8 (64, 64, 3).

    Raises:
        UserError: unknown class or domain.
    """
    return draw(class_name, domain, index, seed)[0]


def load(config: DataConfig, seed: int) -> ImageDataset:
    """The data set of `config`: every class in every domain, `images_per_class` times.

    The last `test_fraction` of the indices of each class and domain are the test split. `seed` is
    part of the loader's signature only: pixels and split do not depend on an experiment's seed.

    Raises:
        UserError: unknown or repeated domain, or class names that are not the generator's.
    """
    del seed
    domains = tuple(config.domains) or FEDERATED_DOMAINS
    for domain in domains:
        _check(domain, tuple(DOMAINS), "domain")
    if len(set(domains)) < len(domains):
        raise UserError("aerial_scenes: a domain is listed twice in data.domains.")
    names = tuple(config.class_names) or CLASSES
    for name in names:
        _check(name, CLASSES, "class")
    per_class = config.images_per_class
    tests = min(per_class - 1, max(1, round(per_class * config.test_fraction)))
    grid = np.indices((len(domains), len(names), per_class)).reshape(3, -1)
    domains_N, labels_N, index_N = grid.astype(np.int64)
    split_N = np.where(index_N >= per_class - tests, TEST, TRAIN).astype(np.int8)

    return ImageDataset(
        name=config.title,
        class_names=names,
        labels_N=labels_N,
        split_N=split_N,
        domains_N=domains_N,
        domain_names=domains,
        fingerprint=_fingerprint(names, domains, per_class),
        open_image=_Opener(names, domains, per_class),
        image_names=tuple(
            f"{domain}/{name}/{i}" for domain in domains for name in names for i in range(per_class)
        ),
    )


@dataclass(frozen=True)
class _Opener:
    """Opens the i-th image; a class and not a closure, so that worker processes can be sent it."""

    names: tuple[str, ...]
    domains: tuple[str, ...]
    per_class: int

    def __call__(self, i: int) -> Image.Image:
        shape = (len(self.domains), len(self.names), self.per_class)
        domain, label, index = (int(part) for part in np.unravel_index(i, shape))
        return Image.fromarray(_remembered(self.names[label], self.domains[domain], index))


@lru_cache(maxsize=8192)  # 100 MB at most; spares methods with visual prompts the drawing
def _remembered(class_name: str, domain: str, index: int) -> NDArray[np.uint8]:
    return render(class_name, domain, index)


def contact_sheet(
    path: str | Path,
    domains: Sequence[str] = FEDERATED_DOMAINS,
    classes: Sequence[str] = CLASSES,
    per_cell: int = 2,
    enlarge: int = 2,
) -> None:
    """Write a PNG: one row per class, `per_cell` images of every domain side by side."""
    tile, margin, head = 64 * enlarge + 4, 130, 18
    columns = len(domains) * per_cell
    sheet = Image.new("RGB", (margin + columns * tile, head + len(classes) * tile), "white")
    pen = ImageDraw.Draw(sheet)
    for d, domain in enumerate(domains):
        pen.text((margin + d * per_cell * tile + 4, 3), domain, fill="black")
        for row, name in enumerate(classes):
            pen.text((4, head + row * tile + tile // 2), name, fill="black")
            for k in range(per_cell):
                image = Image.fromarray(render(name, domain, k))
                image = image.resize((64 * enlarge, 64 * enlarge), Image.Resampling.NEAREST)
                place = (margin + (d * per_cell + k) * tile, head + row * tile)
                sheet.paste(image, place)
    sheet.save(path)


def _fingerprint(names: Sequence[str], domains: Sequence[str], per_class: int) -> str:
    parts = ["aerial_scenes", str(VERSION), *names, *domains, str(per_class)]
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def _check(name: str, known: tuple[str, ...], kind: str) -> None:
    if name not in known:
        raise UserError(f"aerial_scenes: no {kind} '{name}'.{did_you_mean(name, known)}")
