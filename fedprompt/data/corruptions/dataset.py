"""Corrupted copies of some images as a data set of their own, so that the feature cache holds them.

Every image is opened and prepared for the backbone as always, then corrupted at the backbone's
size. One data set holds all corruptions and severities: the cache encodes what it does not hold in
one pass, and no image twice.

Suffix: N images that are corrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.cache_files import digest
from fedprompt.data.dataset import ImageDataset
from fedprompt.rng import generator

from . import corrupted

VERSION = "2"
"""Changes when a corruption does, so that no cache holds rows of the former one."""


@dataclass(frozen=True)
class CorruptedOpener:
    """Opens corrupted images, row by row: kinds, then severities, then images.

    Attributes:
        clip: the frozen backbone, whose preprocessing precedes the corruption.
        dataset: the data set of the images.
        index_N: the images' numbers in it.
        kinds: names of corruptions.
        severities: from 1 to 5.
        seed: the seed of the random draws.
    """

    clip: FrozenCLIP
    dataset: ImageDataset
    index_N: NDArray[np.int64]
    kinds: tuple[str, ...]
    severities: tuple[int, ...]
    seed: int

    def __call__(self, row: int) -> Image.Image:
        """Open a corrupted image, in RGB, at the backbone's size."""
        kind, severity, place = self._parts(row)
        index = int(self.index_N[place])
        mean, std = self.clip.mean_std[:, :, None, None]
        pixels = self.clip.preprocess(self.dataset.open_image(index)) * std + mean
        image_HW3 = (pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        # The severity is no part of the key: a higher one is never the luckier draw.
        draw = generator(self.seed, "corruption", kind, self.content(index))
        return Image.fromarray(corrupted(image_HW3, kind, severity, draw))

    def content(self, index: int) -> str:
        """What an image's draws depend on: its pixels where they have a key."""
        keys = self.dataset.pixel_keys
        return keys[index] if keys else digest(self.dataset.fingerprint, str(index))

    def key(self, row: int) -> str:
        """What decides the pixels of a row; see `ImageDataset.pixel_keys`."""
        kind, severity, place = self._parts(row)
        settings = (VERSION, kind, str(severity), str(self.seed), self.clip.preprocess_fingerprint)
        return digest("corrupted", self.content(int(self.index_N[place])), *settings)

    def _parts(self, row: int) -> tuple[str, int, int]:
        group, place = divmod(row, len(self.index_N))
        kind, severity = divmod(group, len(self.severities))
        return self.kinds[kind], self.severities[severity], place


def corrupted_dataset(
    clip: FrozenCLIP,
    dataset: ImageDataset,
    index_N: NDArray[np.int64],
    kinds: Sequence[str],
    severities: Sequence[int],
    seed: int,
) -> ImageDataset:
    """All corruptions of some images.

    Args:
        clip: the frozen backbone.
        dataset: the data set of the images.
        index_N: their numbers in it.
        kinds: names of corruptions.
        severities: from 1 to 5.
        seed: the seed of the random draws.

    Returns:
        Row ((k S) + s) N + n is image n under kind k at severity s, of S severities.
    """
    opener = CorruptedOpener(clip, dataset, index_N, tuple(kinds), tuple(severities), seed)
    groups = len(kinds) * len(severities)
    keys = tuple(opener.key(row) for row in range(groups * len(index_N)))
    return replace(
        dataset,
        name=f"{dataset.name}, corrupted",
        labels_N=np.tile(dataset.labels_N[index_N], groups),
        split_N=np.tile(dataset.split_N[index_N], groups),
        domains_N=np.tile(dataset.domains_N[index_N], groups),
        fingerprint=digest(*keys),
        open_image=opener,
        pixel_keys=keys,
        # Nothing else of the data set is of these images.
        bad_images=(), image_names=(), owners_N=None, hashes=(), place="", retained=(),
        portable=False, parts=(),
    )  # fmt: skip
