"""What is known of every image of a data set: memory-mapped columns that share a row order.

Suffixes: N images, D joint embedding, P patches, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.patch_features import LocalEncoder, dense_encoder
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.cache import cached
from fedprompt.data.features.encoding import Encoding, augmented
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """One view of a data set's images; see `Inputs` for what each column holds.

    Features are not normalised; pixels are bytes, which `mean_std` (2, 3) normalises.
    """

    features_ND: NDArray[np.float32]
    patches_NPD: NDArray[np.float32] | None = None
    pixels_N3HW: NDArray[np.uint8] | None = None
    mean_std: Tensor | None = None

    def rows(self, index: NDArray[np.int64]) -> Inputs:
        """Some images, in memory."""

        def read(column: NDArray[Any] | None) -> Tensor | None:
            return None if column is None else torch.from_numpy(np.array(column[index]))

        features, norms = _normalised(_rows(self.features_ND, index))
        return Inputs(
            features, read(self.patches_NPD), read(self.pixels_N3HW), self.mean_std, norms
        )


def open_feature_table(
    clip: FrozenCLIP,
    dataset: ImageDataset,
    cache_dir: Path,
    needs: Collection[str],
    *,
    view: int = 0,
    crop_scale: float = 1.0,
    index_R: NDArray[np.int64] | None = None,
    progress: bool = True,
) -> FeatureTable:
    """Columns of one view, of all images or of `index_R`; computed on first use, then cached.

    `needs` is a method's; view 0 is the whole image, others are crops of at least `crop_scale`.

    Raises:
        UserError: the backbone has no patches, or the cache cannot be written.
    """
    if dataset.owners_N is not None and index_R is None:
        parts = [
            open_feature_table(
                clip, part, cache_dir, needs, view=view, crop_scale=crop_scale, progress=progress
            )
            for part in dataset.parts
        ]
        return _stacked(parts, clip.embed_dim)
    plain = augmented(clip, dataset, view, crop_scale)

    def column(encoding: Encoding) -> NDArray[Any]:
        return cached(clip, dataset, cache_dir, encoding, index_R=index_R, progress=progress)

    patches = column(_patches(clip, plain)) if "patches" in needs else None
    if "pixels" not in needs:
        return FeatureTable(column(plain), patches)
    return FeatureTable(column(plain), patches, column(_pixels(clip, plain)), clip.mean_std)


@torch.no_grad()
def encode_inputs(clip: FrozenCLIP, images_B3HW: Tensor, needs: Collection[str]) -> Inputs:
    """Preprocessed images as a method that `needs` these sees them, without any cache.

    Raises:
        UserError: the backbone has no patches.
    """
    features, norms = _normalised(clip.encode_images(images_B3HW))
    patches = _dense(clip)[0](images_B3HW) if "patches" in needs else None
    return Inputs(features, patches, images_B3HW if "pixels" in needs else None, norms=norms)


def _normalised(features: Tensor) -> tuple[Tensor, Tensor]:
    """L2-normalised features (..., D), and the lengths that they had (...)."""
    return F.normalize(features, dim=-1), features.norm(dim=-1)


@dataclass(frozen=True, eq=False)
class _Stack:
    """Columns of several data sets as one, read where they lie; indexed by row numbers."""

    parts: tuple[NDArray[Any], ...]
    starts: NDArray[np.int64]

    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[Any]:
        of_part = np.searchsorted(self.starts, index, side="right") - 1
        first = self.parts[0]
        rows = np.empty((len(index), *first.shape[1:]), dtype=first.dtype)
        for k, part in enumerate(self.parts):
            chosen = of_part == k
            rows[chosen] = part[index[chosen] - self.starts[k]]
        return rows


def _stacked(parts: Sequence[FeatureTable], embed_dim: int) -> FeatureTable:
    """The columns of all parts, one after the other; none of them is copied."""
    if not parts:
        return FeatureTable(np.zeros((0, embed_dim), dtype=np.float32))

    def stack(name: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        if columns[0] is None:
            return None
        ends = np.cumsum([len(column) for column in columns])
        return _Stack(tuple(columns), np.concatenate(([0], ends[:-1])))

    return FeatureTable(
        stack("features_ND"), stack("patches_NPD"), stack("pixels_N3HW"), parts[0].mean_std
    )


def _patches(clip: FrozenCLIP, view: Encoding) -> Encoding:
    """Normalised features (P, D) of the patches, float32."""
    encode, patches = _dense(clip)
    return Encoding(f"patches-{view.view}", (patches, clip.embed_dim), view.load, encode)


def _dense(clip: FrozenCLIP) -> tuple[LocalEncoder, int]:
    found = dense_encoder(clip)
    if found is None:
        raise UserError(
            f"backbone: {clip.name} gives no patch features; take one of open_clip's plain ViT or "
            "ResNet models."
        )
    return found


def _pixels(clip: FrozenCLIP, view: Encoding) -> Encoding:
    """The bytes (3, H, W) that preprocessing makes of an image before it normalises them."""
    mean_3, std_3 = clip.mean_std
    shape = tuple(view.load(0).shape)

    def load(index: int) -> Tensor:
        pixels = view.load(index) * std_3[:, None, None] + mean_3[:, None, None]
        rounded: Tensor = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
        return rounded

    return Encoding(f"pixels-{view.view}", shape, load, _unchanged, "|u1", of_weights=False)


def _unchanged(pixels: Tensor) -> Tensor:
    return pixels


def _rows(column: NDArray[np.float32], index: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.asarray(column[index], dtype=np.float32))
