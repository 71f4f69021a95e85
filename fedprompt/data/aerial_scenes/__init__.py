"""A deterministic generator of small aerial scenes of land use, which needs no download.

The data source `aerial_scenes` draws its images with it (quickstart, tests, demo), and
`scripts/pretrain_tiny_clip.py` draws the images on which the tiny CLIP is trained.

Facts: 20 classes (names as in UC Merced and RESISC45), 4 federated and 12 pre-training domains
(sensor x season x region x ground resolution), 64x64 RGB, any number of images. An image depends
only on its class, domain, index and seed, and on `VERSION`.

The images are drawings, not photographs. They exercise a federated prompt-learning system end to
end; accuracies on them say nothing about accuracies on real remote sensing data.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.aerial_scenes.canvas import Canvas
from fedprompt.data.aerial_scenes.domains import (
    DOMAINS,
    FEDERATED_DOMAINS,
    PRETRAINING_DOMAINS,
    sense,
)
from fedprompt.data.aerial_scenes.objects import LABELS, LEAST_PIXELS, Scene
from fedprompt.data.aerial_scenes.scenes import (
    CLASSES,
    DRAW,
    DRAW_EXTRA,
    EXTRA_CLASSES,
    HELD_OUT_CLASSES,
)
from fedprompt.errors import UserError, did_you_mean
from fedprompt.rng import generator

__all__ = [
    "CLASSES",
    "EXTRA_CLASSES",
    "FEDERATED_DOMAINS",
    "HELD_OUT_CLASSES",
    "LABELS",
    "LEAST_PIXELS",
    "PRETRAINING_DOMAINS",
    "VERSION",
    "check_class",
    "check_domain",
    "draw",
    "labelled",
    "render",
]

# Increase it when any pixel changes. It is part of the data set's fingerprint, so that no cached
# feature of the old drawings is used for the new ones.
VERSION = 1


def draw(
    class_name: str, domain: str, index: int, seed: int = 0
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Draw one image and describe its content.

    Args:
        class_name: one of `CLASSES` or `EXTRA_CLASSES`.
        domain: a federated or a pre-training domain.
        index: number of the image within its class and domain.
        seed: a different seed gives different images; the data set uses 0.

    Returns:
        The image, uint8 (64, 64, 3), and notes on the objects in it, from which captions are made.

    Raises:
        UserError: the class or the domain is unknown.
    """
    image, scene = _drawn(class_name, domain, index, seed)
    return image, tuple(scene.notes)


def labelled(
    class_name: str, domain: str, index: int, seed: int = 0
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Draw one image, and say which of `LABELS` are seen on it.

    A label is what the drawing code has painted, where nothing was painted over it: trees on at
    least `LEAST_PIXELS` pixels make "trees" a label, in whatever scene they stand. The sensor's
    blur and noise come after that. Arguments and errors are those of `draw`.
    """
    image, scene = _drawn(class_name, domain, index, seed)
    return image, scene.shown()


def _drawn(class_name: str, domain: str, index: int, seed: int) -> tuple[NDArray[np.uint8], Scene]:
    """An image and the scene behind it."""
    check_domain(domain)
    _check(class_name, CLASSES + EXTRA_CLASSES, "class")
    look = DOMAINS[domain]
    # Keyed by the image, so that images can be drawn in any order and in any process.
    rng = generator(seed, "aerial_scenes", VERSION, class_name, domain, index)
    canvas = Canvas(
        rng,
        step=look.zoom * rng.uniform(0.88, 1.14),
        angle=rng.uniform(0.0, 2.0 * np.pi),
        centre=(rng.uniform(-5.0, 5.0), rng.uniform(-5.0, 5.0)),
        sun=rng.uniform(0.3, 1.3),
    )
    scene = Scene(canvas, look, rng)
    # The order of draws from `rng` is part of the data set: any change of it alters all images and
    # requires a new VERSION.
    (DRAW.get(class_name) or DRAW_EXTRA[class_name])(scene)
    image = sense(canvas.rgb_HW3, look.sensor, rng)
    return np.round(image * 255.0).astype(np.uint8), scene


def render(class_name: str, domain: str, index: int, seed: int = 0) -> NDArray[np.uint8]:
    """Draw one image, uint8 (64, 64, 3). Arguments and errors are those of `draw`."""
    return draw(class_name, domain, index, seed)[0]


def check_domain(name: str) -> None:
    """Check that the generator has a domain of this name.

    Raises:
        UserError: it has not; the message contains the nearest domain.
    """
    _check(name, tuple(DOMAINS), "domain")


def check_class(name: str) -> None:
    """Check that a name is one of the 20 classes.

    Raises:
        UserError: it is not; the message contains the nearest class.
    """
    _check(name, CLASSES, "class")


def _check(name: str, known: tuple[str, ...], kind: str) -> None:
    if name not in known:
        raise UserError(f"aerial_scenes: no {kind} '{name}'.{did_you_mean(name, known)}")
