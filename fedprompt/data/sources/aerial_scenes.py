"""The embedded data set: synthetic aerial images of land use, drawn on demand.

Facts: 20 classes, 4 federated and 12 pre-training domains, 64x64 RGB, any number of images. Class
names, domains and drawing are described in `fedprompt.data.aerial_scenes`. Suffix: N images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedprompt.config.fields import option
from fedprompt.config.schema import DataConfig
from fedprompt.data.aerial_scenes import VERSION, check_class, check_domain, labelled
from fedprompt.data.aerial_scenes.domains import FEDERATED_DOMAINS
from fedprompt.data.aerial_scenes.scenes import CLASSES
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.sources.base import DataSource
from fedprompt.errors import UserError


@dataclass(frozen=True)
class AerialScenesConfig(DataConfig):
    """Synthetic aerial scenes; nothing is downloaded."""

    source: Literal["aerial_scenes"] = option("aerial_scenes", "the data source")
    title: str = option("aerial_scenes", "name of the data set in tables and plots")
    images_per_class: int = option(60, "images of every class in every domain", ge=2)
    first_image: int = option(
        0, "number of the first of them: images for another purpose begin where those end", ge=0
    )
    domains: list[str] = option([], "domains to draw; empty = the four federated ones")
    test_fraction: float = option(
        0.25, "share of each class and domain that is the test split", gt=0, lt=1
    )


class AerialScenes(DataSource):
    """Synthetic aerial scenes: `images_per_class` images of every class in every domain."""

    name = "aerial_scenes"
    Config = AerialScenesConfig

    @staticmethod
    def known_classes(config: AerialScenesConfig) -> tuple[str, ...]:
        """The scenes that are drawn; see `DataSource.known_classes`."""
        return tuple(config.class_names) or CLASSES

    @staticmethod
    def load(config: AerialScenesConfig, seed: int, cache_dir: Path | None = None) -> ImageDataset:
        """Open the scenes.

        The last `test_fraction` of the indices of each class and domain are the test split.

        Args:
            config: classes, domains and number of images.
            seed: not used; the images and their split are the same in every run.
            cache_dir: not used.

        Returns:
            The images, ordered by domain, class and index.

        Raises:
            UserError: a domain is unknown or listed twice, or a class cannot be drawn.
        """
        del seed, cache_dir
        domains = tuple(config.domains) or FEDERATED_DOMAINS
        for domain in domains:
            check_domain(domain)
        if len(set(domains)) < len(domains):
            raise UserError("aerial_scenes: a domain is listed twice in data.domains.")
        names = tuple(config.class_names) or CLASSES
        for name in names:
            check_class(name)
        per_class = config.images_per_class
        # At least one image on either side of the split.
        tests = min(per_class - 1, max(1, round(per_class * config.test_fraction)))
        # The axes and their order must be those of `_Opener`.
        cells = np.indices((len(domains), len(names), per_class)).reshape(3, -1)
        domains_N, labels_N, index_N = cells.astype(np.int64)
        first = config.first_image
        return ImageDataset(
            name=config.title,
            class_names=names,
            labels_N=labels_N,
            split_N=np.where(index_N >= per_class - tests, TEST, TRAIN).astype(np.int8),
            domains_N=domains_N,
            domain_names=domains,
            fingerprint=_fingerprint(names, domains, per_class, first),
            open_image=_Opener(names, domains, per_class, first),
            image_names=tuple(
                f"{domain}/{name}/{i}"
                for domain in domains
                for name in names
                for i in range(first, first + per_class)
            ),
        )


@dataclass(frozen=True)
class _Opener:
    """Draws image i. It is a class, not a closure, so that it can be sent to other processes."""

    names: tuple[str, ...]
    domains: tuple[str, ...]
    per_class: int
    first: int

    def __call__(self, i: int) -> Image.Image:
        shape = (len(self.domains), len(self.names), self.per_class)
        domain, label, index = (int(part) for part in np.unravel_index(i, shape))
        return Image.fromarray(
            remembered(self.names[label], self.domains[domain], self.first + index)[0]
        )


# Methods with visual prompts open every image in every round, and drawing one takes milliseconds.
# 8,192 images of 12 kB are 100 MB.
@lru_cache(maxsize=8192)
def remembered(
    class_name: str, domain: str, index: int
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """An image and its labels, as `fedprompt.data.aerial_scenes.labelled` draws them."""
    return labelled(class_name, domain, index)


def _fingerprint(names: Sequence[str], domains: Sequence[str], per_class: int, first: int) -> str:
    # `VERSION` changes with the drawing code, which makes cached features stale.
    parts = ["aerial_scenes", str(VERSION), *names, *domains, str(per_class)]
    # Left out at its default, so that features which were cached before the key existed stay valid.
    parts += [f"from {first}"] if first else []
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]
