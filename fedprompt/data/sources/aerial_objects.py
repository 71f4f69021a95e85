"""The embedded drawings with several labels each: what is seen on them, not which scene they are.

The images are those of `aerial_scenes`, pixel by pixel, and share its cached features. The labels
are kept by the drawing code: it knows of every pixel what was painted there last, and a label is
set if what it names is seen on at least 8 of the 4,096 pixels (`fedprompt.data.aerial_scenes`).

Facts: 14 labels, 1 to 4 of them on an image (2.4 on average over the default images); "trees" are
on two thirds of the images, "runway" on one in twenty. Images and domains as in `aerial_scenes`.

Suffixes: N images, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.fields import option
from fedprompt.data.aerial_scenes import LABELS, LEAST_PIXELS
from fedprompt.data.cache_files import default_cache_dir, digest, locked, write_atomic
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.label_sets import with_targets
from fedprompt.data.sources.aerial_scenes import AerialScenes, AerialScenesConfig, remembered
from fedprompt.data.sources.base import DataSource
from fedprompt.errors import UserError


@dataclass(frozen=True)
class AerialObjectsConfig(AerialScenesConfig):
    """Synthetic aerial scenes with the set of things that are seen on each."""

    source: Literal["aerial_objects"] = option(  # type: ignore[assignment]
        "aerial_objects", "the data source"
    )
    title: str = option("aerial_objects", "name of the data set in tables and plots")

    @property
    def multi_label(self) -> bool:
        """An image shows several things."""
        return True

    def check(self) -> None:
        """Refuse other names: the labels are what the drawing code can paint."""
        super().check()
        if self.class_names and tuple(self.class_names) != LABELS:
            raise UserError("source 'aerial_objects' has its own labels; leave class_names empty.")


class AerialObjects(DataSource):
    """`images_per_class` drawings of every scene in every domain, with what is seen on them."""

    name = "aerial_objects"
    Config = AerialObjectsConfig

    @staticmethod
    def load(config: AerialObjectsConfig, seed: int, cache_dir: Path | None = None) -> ImageDataset:
        """Open the drawings, and draw them once to see what they show.

        Args:
            config: domains and number of images.
            seed: not used; images, labels and split are the same in every run.
            cache_dir: keeps the labels, so that they are found without drawing.

        Returns:
            The images, ordered by domain, scene and index.

        Raises:
            UserError: a domain is unknown or listed twice, or the cache cannot be written.
        """
        scenes = AerialScenes.load(
            AerialScenesConfig(
                title=config.title,
                images_per_class=config.images_per_class,
                first_image=config.first_image,
                domains=config.domains,
                test_fraction=config.test_fraction,
            ),
            seed,
        )
        targets_NC = _cached_targets(scenes, cache_dir or default_cache_dir())
        return with_targets(scenes, LABELS, targets_NC)


def _cached_targets(scenes: ImageDataset, cache_dir: Path) -> NDArray[np.bool_]:
    """What is seen on each drawing, (N, C), from the cache if it is there."""
    key = digest(scenes.fingerprint, str(LEAST_PIXELS), *LABELS)
    path = cache_dir / "labels" / f"{key}.npy"
    found = _read(path, (len(scenes), len(LABELS)))
    if found is not None:
        return found
    with locked(path):
        # Another process may have drawn them in the meantime.
        found = _read(path, (len(scenes), len(LABELS)))
        if found is None:
            found = _targets(scenes)
            kept = found
            write_atomic(path, lambda file: np.save(file, kept))
    return found


def _read(path: Path, shape: tuple[int, int]) -> NDArray[np.bool_] | None:
    try:
        stored = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # there is none, or a machine has stopped writing it
        return None
    return stored if stored.shape == shape and stored.dtype == np.bool_ else None


def _targets(scenes: ImageDataset) -> NDArray[np.bool_]:
    column = {label: c for c, label in enumerate(LABELS)}
    targets_NC = np.zeros((len(scenes), len(LABELS)), dtype=bool)
    for row, name in enumerate(scenes.image_names):
        domain, scene, index = name.split("/")
        # Kept in memory, so that encoding the images does not draw them again.
        for label in remembered(scene, domain, int(index))[1]:
            targets_NC[row, column[label]] = True
    return targets_NC
