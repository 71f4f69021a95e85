"""What a column of the feature cache contains: a view of the images, encoded in one way.

`table.open_feature_table` chooses the encodings and `cache.cached` computes them.

Suffixes: B images in a batch, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image

from fedprompt.data.dataset import ImageDataset
from fedprompt.data.images import random_view
from fedprompt.rng import generator


class ImageEncoder(Protocol):
    """What the cache needs from a frozen CLIP; `FrozenCLIP` satisfies it."""

    @property
    def fingerprint(self) -> str:
        """Hash that changes when the image features may change."""

    @property
    def preprocess_fingerprint(self) -> str:
        """Hash that changes when the preprocessing changes."""

    @property
    def device(self) -> torch.device:
        """Where images are encoded."""

    @property
    def embed_dim(self) -> int:
        """Number of features D."""

    @property
    def image_batch(self) -> int:
        """Number of images to encode in one batch."""

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Resize, crop and normalise one RGB image to a (3, H, W) tensor."""

    def encode_images(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Encode a batch as features (B, D), not normalised, float32, on the CPU.

        The batch may be on the device already.
        """


@dataclass(frozen=True)
class Encoding:
    """How an image becomes a row of the cache.

    Attributes:
        view: name of the encoding. It is part of the file's key, so it must contain every
            parameter that the rows depend on.
        shape: shape of one row.
        load: opens the image of a given number and returns the encoder's input, (C, H, W). It is
            called from several threads. Encodings that share it are computed in one pass.
        encode: turns a batch of inputs (B, C, H, W) into B rows of `shape`, on the CPU. The inputs
            are on the backbone's device if `of_weights`, else on the CPU.
        dtype: NumPy type in which rows are stored.
        of_weights: whether rows depend on the backbone's weights, and not on its preprocessing
            alone.
        of_place: whether rows also depend on the number of the image in its data set.
    """

    view: str
    shape: tuple[int, ...]
    load: Callable[[int], torch.Tensor]
    encode: Callable[[torch.Tensor], torch.Tensor]
    dtype: str = "<f4"
    of_weights: bool = True
    of_place: bool = False


def plain(clip: ImageEncoder, dataset: ImageDataset) -> Encoding:
    """Return the encoding of whole images, as CLIP preprocesses them, into features (D,)."""

    def load(index: int) -> torch.Tensor:
        return clip.preprocess(dataset.open_image(index))

    return Encoding("center", (clip.embed_dim,), load, clip.encode_images)


def augmented(clip: ImageEncoder, dataset: ImageDataset, view: int, min_scale: float) -> Encoding:
    """Return the encoding of one random crop per image into features (D,).

    Half of the crops are mirrored. A crop depends on `view`, the image's index and `min_scale`
    only, not on the experiment's seed, so that all runs share the files.

    Args:
        clip: the frozen backbone.
        dataset: the images.
        view: number of the view; 0 is the whole image, as `plain` encodes it.
        min_scale: smallest share of an image's area in a crop.

    Returns:
        The encoding of that view.
    """
    if view == 0:
        return plain(clip, dataset)
    # A crop is resized to the size that `preprocess` produces, so that `preprocess` itself does
    # not resize or crop it again and only normalises it.
    height, width = clip.preprocess(Image.new("RGB", (64, 64))).shape[-2:]

    def load(index: int) -> torch.Tensor:
        # Keyed by the image: decoding threads may load images in any order.
        draw = generator(0, "view", view, index)
        image = dataset.open_image(index)
        return clip.preprocess(random_view(image, (width, height), draw, min_scale))

    name = f"crop{min_scale:g}-{view}"
    return Encoding(name, (clip.embed_dim,), load, clip.encode_images, of_place=True)
