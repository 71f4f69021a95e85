"""The form in which every data source delivers its images: a table of images opened on demand.

Suffixes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TRAIN, TEST = 0, 1
VAL = 2  # of an official validation split; an `ImageDataset` has such images only if asked to
HELD = 3  # held out by a protocol: no client trains on the image and no ordinary test contains it
UNLABELLED = -1
"""The label of an image whose class is not known."""


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read: its place and the reason."""

    where: str
    reason: str


@dataclass(frozen=True)
class ImageDataset:
    """N labelled images in a fixed order.

    Attributes:
        name: title of the data set in tables and plots.
        class_names: the names used in prompts, in label order.
        labels_N: index of each image's class in `class_names`; of its rarest label if it has
            several (`targets_NC`).
        split_N: `TRAIN`, `TEST` or `VAL` for each image: the authors' split if there is one, else a
            seeded, stratified hold-out.
        domains_N: index of each image's domain in `domain_names`; all zero if there is one domain.
        domain_names: names of the domains.
        fingerprint: changes when any pixel, or the order of the images, may have changed.
        open_image: returns image i in RGB. Several threads call it, and it can be pickled.
        bad_images: the unreadable images that were left out.
        superclass_names: the coarser class of each class; empty if the authors define none.
        image_names: a unique name of each image, the same on every machine, by which partition
            files refer to it: its path below the folder of images, its split and row in a table,
            or the arguments that drew it. Empty in a data set that exists only in memory.
        owners_N: the client that has each image, -1 for the server; None unless the data set itself
            is divided among clients.
        hashes: a hash of the encoded bytes of each image; empty if images are not stored as files.
        pixel_keys: for each image, 32 hexadecimal digits that depend on all that decides its pixels
            and on nothing else, as `digest` returns them. Images of equal keys share a row of the
            feature cache, so a changed image is encoded by itself. If it is empty, `fingerprint`
            and the number of an image are its key.
        place: what stays the same when images change, such as the folder; empty = `fingerprint`.
            The feature cache removes rows that a later state of the same place supersedes.
        retained: keys like `pixel_keys` of images that the place has beside these.
        portable: whether workers of a simulation, also on other machines, can take a copy of this
            object instead of opening the data set again.
        notes: lines for the user on how the stored files were understood and what was left out.
        parts: the data sets whose rows make up this one, in order. If images have owners, the
            features of each part are cached separately.
        targets_NC: which labels each image has, for multi-label data; None if every image has one
            class. `class_names` are then the labels.
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
    hashes: tuple[str, ...] = field(default=(), repr=False)
    pixel_keys: tuple[str, ...] = field(default=(), repr=False)
    place: str = ""
    retained: tuple[str, ...] = field(default=(), repr=False)
    portable: bool = False
    notes: tuple[str, ...] = ()
    parts: tuple[ImageDataset, ...] = field(default=(), repr=False)
    targets_NC: NDArray[np.bool_] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels_N)


@dataclass(frozen=True)
class JoinedOpener:
    """Opens the images of a joined table. It is a class so that a data set can be pickled.

    Attributes:
        openers: `open_image` of each data set.
        source_N: the data set that each image is from, an index into `openers`.
        row_N: index of each image in that data set.
    """

    openers: tuple[Callable[[int], Image.Image], ...]
    source_N: NDArray[np.int64]
    row_N: NDArray[np.int64]

    def __call__(self, index: int) -> Image.Image:
        """Open image `index` of the joined table, in RGB."""
        opener = self.openers[int(self.source_N[index])]
        return opener(int(self.row_N[index]))


@dataclass(frozen=True)
class WithheldOpener:
    """Opens only the images that may be read. It is a class so that a data set can be pickled.

    Attributes:
        opener: `open_image` of the data set.
        readable_N: which images may be read.
    """

    opener: Callable[[int], Image.Image]
    readable_N: NDArray[np.bool_]

    def __call__(self, index: int) -> Image.Image:
        """Open image `index`, in RGB.

        Raises:
            ValueError: the image is withheld. No correct program asks for one.
        """
        if not self.readable_N[index]:
            raise ValueError(f"image {index} is withheld")
        return self.opener(index)


def withheld(dataset: ImageDataset, readable_N: NDArray[np.bool_]) -> ImageDataset:
    """The data set without the content of some images: they have no label and cannot be opened.

    Args:
        dataset: the whole data set.
        readable_N: which images may be read.

    Returns:
        A data set with the same images in the same order. The others have label -1 and no targets.
    """
    targets_NC = dataset.targets_NC
    return replace(
        dataset,
        targets_NC=None if targets_NC is None else targets_NC & readable_N[:, None],
        labels_N=np.where(readable_N, dataset.labels_N, -1),
        open_image=WithheldOpener(dataset.open_image, readable_N),
        parts=(),
    )


def opener_of(parts: Sequence[ImageDataset], rows: Sequence[NDArray[np.int64]]) -> JoinedOpener:
    """The opener of a table that joins rows of several data sets.

    Args:
        parts: the data sets, in the order of the joined table.
        rows: for each data set, the indices of the images to use.

    Returns:
        The opener; its arrays say where each image is from.
    """
    source_N = np.repeat(np.arange(len(parts)), [len(kept) for kept in rows])
    # `np.concatenate` refuses an empty list, and a node may have no folder at all.
    row_N = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
    return JoinedOpener(tuple(part.open_image for part in parts), source_N, row_N)
