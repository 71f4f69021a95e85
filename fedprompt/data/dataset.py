"""What every data set looks like to the rest of the code: a table of images opened one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TRAIN, TEST = 0, 1
VAL = 2  # only in listings: a data set holds training and test images
HELD = 3  # held out by a protocol: no client trains on it, no usual test holds it


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
    it keys the feature cache. `open_image(i)` gives the i-th image in RGB. `superclass_names` holds
    the coarser class of each class where the authors define one, else it is empty.

    `image_names` are the same on every machine, and name the images in partition files: the path
    below the images' folder, split and row of a table, or what made the image; no two are equal.
    They are empty in a data set that exists only in memory.

    `owners_N` is the client that holds each image, -1 for the server, where the data themselves say
    so. `parts` are the data sets that this one is made of, in the order of its rows; the cache then
    keeps each of them by itself.
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
    superclass_names: tuple[str, ...] = field(default=())
    image_names: tuple[str, ...] = field(default=(), repr=False)
    owners_N: NDArray[np.int64] | None = None
    parts: tuple[ImageDataset, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels_N)


@dataclass(frozen=True)
class JoinedOpener:
    """Opens image i of the data set it is from; a class, so that a data set can be pickled."""

    openers: tuple[Callable[[int], Image.Image], ...]
    source_N: NDArray[np.int64]
    row_N: NDArray[np.int64]

    def __call__(self, index: int) -> Image.Image:
        """Image `index` of the joined table."""
        opener = self.openers[int(self.source_N[index])]
        return opener(int(self.row_N[index]))


def opener_of(parts: Sequence[ImageDataset], rows: Sequence[NDArray[np.int64]]) -> JoinedOpener:
    """The opener of images `rows[i]` of `parts[i]`, one data set after the other."""
    source_N = np.repeat(np.arange(len(parts)), [len(kept) for kept in rows])
    row_N = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
    return JoinedOpener(tuple(part.open_image for part in parts), source_N, row_N)
