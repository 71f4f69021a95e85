"""What every data set looks like to the rest of the code: a table of images opened one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TRAIN, TEST = 0, 1


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read: where it is and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class ImageDataset:
    """A fixed list of n labelled images.

    `labels_N` indexes `class_names`; `domains_N` indexes `domain_names` (all zero where a data set
    has one domain). `split_N` is `TRAIN` or `TEST` per image: the authors' split where there is
    one, else a seeded stratified hold-out. `fingerprint` changes when any pixel may have changed;
    it keys the feature cache. `open_image(i)` gives the i-th image in RGB.
    """

    name: str
    class_names: tuple[str, ...]
    labels_N: NDArray[np.int64]
    split_N: NDArray[np.int8]
    domains_N: NDArray[np.int64]
    domain_names: tuple[str, ...]
    fingerprint: str
    open_image: Callable[[int], Image.Image]
    bad_images: tuple[BadImage, ...] = field(default=())

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels_N)
