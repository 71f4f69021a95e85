"""The feature table of a data set: memory-mapped columns that share a row order.

Clients and the server open tables before the first round and read rows in every training step and
evaluation.

Suffixes: N images, D joint embedding, P patches, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.layer_statistics import StatisticsEncoder
from fedprompt.backbone.patch_features import dense_encoder, local_encoder
from fedprompt.backbone.token_routing import TokenRouting
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.cache import cached
from fedprompt.data.features.columns import (
    local_of,
    patch_encoder,
    patches_of,
    pixels_of,
    router,
    routing_of,
    with_statistics,
)
from fedprompt.data.features.encoding import augmented
from fedprompt.data.features.inputs import Inputs
from fedprompt.data.features.rows import Rows


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """One view of a data set's images.

    Columns are those of `Inputs`, except that features are not normalised and pixels are bytes.

    Attributes:
        features_ND: image features.
        patches_NPD: L2-normalised patch features, or None.
        pixels_N3HW: pixels before they are normalised, or None.
        mean_std: (2, 3), mean and standard deviation that normalise pixels; given with them.
        readable_N: the images that may be read, or None for all.
        local_NPD: L2-normalised local features of patches, or None.
        teacher_NT: image features of another frozen model, not normalised, or None.
        routing_N2E: weights of experts in training and in tests, or None.
        statistics_NL2w: mean and standard deviation of tokens behind each layer, or None.
    """

    features_ND: Rows
    patches_NPD: Rows | None = None
    pixels_N3HW: Rows | None = None
    mean_std: Tensor | None = None
    readable_N: NDArray[np.bool_] | None = None
    local_NPD: Rows | None = None
    teacher_NT: Rows | None = None
    routing_N2E: Rows | None = None
    statistics_NL2w: Rows | None = None

    def rows(self, index: NDArray[np.int64], needs: Collection[str] | None = None) -> Inputs:
        """Read the images of the given row numbers into memory.

        Args:
            index: row numbers.
            needs: the columns to read beside features; None for all that the table has.

        Raises:
            ValueError: an image is withheld. No correct program asks for one.
        """
        if self.readable_N is not None and not self.readable_N[index].all():
            raise ValueError("an image that is withheld was asked for")

        def read(name: str, column: Rows | None) -> Tensor | None:
            if column is None or (needs is not None and name not in needs):
                return None
            return torch.from_numpy(np.array(column[index]))

        features, norms = _normalised(_rows(self.features_ND, index))
        teacher = read("teacher", self.teacher_NT)
        return Inputs(
            features,
            read("patches", self.patches_NPD),
            read("pixels", self.pixels_N3HW),
            self.mean_std,
            norms,
            read("local", self.local_NPD),
            None if teacher is None else F.normalize(teacher, dim=-1),
            read("routing", self.routing_N2E),
            read("statistics", self.statistics_NL2w),
        )


def open_feature_table(
    clip: FrozenCLIP,
    dataset: ImageDataset,
    cache_dir: Path,
    needs: Collection[str],
    *,
    view: int = 0,
    crop_scale: float = 1.0,
    routing: TokenRouting | None = None,
    index_R: NDArray[np.int64] | None = None,
    progress: bool = True,
) -> FeatureTable:
    """Open the columns of one view; they are computed on first use and then cached.

    Args:
        clip: the frozen backbone.
        dataset: the images.
        cache_dir: the cache folder.
        needs: what the method needs beside features: `patches`, `local`, `pixels`, `routing`,
            `statistics`, or nothing.
        view: number of the view; 0 is the whole image, others are random crops.
        crop_scale: smallest share of an image's area in a crop.
        routing: how tokens are routed, if that is needed.
        index_R: the images to open, in this order; None for all of them.
        progress: whether to report progress on stderr.

    Returns:
        A table with one row per image, memory-mapped.

    Raises:
        UserError: the backbone has no patch features or no statistics of layers, an image cannot be
            read, or the cache cannot be written.
    """
    # A data set of client folders is cached folder by folder: a node that holds only some of the
    # folders then uses the same files as a simulation of all of them.
    if dataset.owners_N is not None and index_R is None:
        parts = [
            open_feature_table(
                clip,
                part,
                cache_dir,
                needs,
                view=view,
                crop_scale=crop_scale,
                routing=routing,
                progress=progress,
            )
            for part in dataset.parts
        ]
        return _stacked(parts, clip.embed_dim)
    plain = augmented(clip, dataset, view, crop_scale)
    encodings = with_statistics(clip, plain) if "statistics" in needs else [plain]
    if "patches" in needs:
        encodings.append(patches_of(clip, plain))
    if "local" in needs:
        encodings.append(local_of(clip, plain))
    if "pixels" in needs:
        encodings.append(pixels_of(clip, plain))
    if "routing" in needs:
        encodings.append(routing_of(clip, plain, routing))
    columns = cached(clip, dataset, cache_dir, encodings, index_R=index_R, progress=progress)
    found = dict(zip((encoding.view for encoding in encodings), columns, strict=True))
    return FeatureTable(
        found[plain.view],
        found.get(f"patches-{plain.view}"),
        found.get(f"pixels-{plain.view}"),
        clip.mean_std if "pixels" in needs else None,
        local_NPD=found.get(f"local-{plain.view}"),
        routing_N2E=None if routing is None else found.get(f"{routing.view}-{plain.view}"),
        statistics_NL2w=found.get(f"statistics-{plain.view}"),
    )


@torch.no_grad()
def encode_inputs(
    clip: FrozenCLIP,
    images_B3HW: Tensor,
    needs: Collection[str],
    routing: TokenRouting | None = None,
) -> Inputs:
    """Encode preprocessed images as `Inputs`, without the cache.

    Args:
        clip: the frozen backbone.
        images_B3HW: images as `clip.preprocess` returns them.
        needs: what the method needs beside features: `patches`, `local`, `pixels`, `routing`,
            `statistics`, or nothing.
        routing: how tokens are routed, if that is needed.

    Returns:
        The images as a set of B.

    Raises:
        UserError: the backbone has no patch features or no statistics of layers.
    """
    both = StatisticsEncoder(clip) if "statistics" in needs else None
    encode = clip.encode_images if both is None else both.features
    features, norms = _normalised(encode(images_B3HW))
    patches = patch_encoder(clip, dense_encoder)[0](images_B3HW) if "patches" in needs else None
    local = patch_encoder(clip, local_encoder)[0](images_B3HW) if "local" in needs else None
    pixels = images_B3HW if "pixels" in needs else None
    routed = router(clip, routing)(images_B3HW) if "routing" in needs else None
    found = Inputs(features, patches, pixels, norms=norms, local=local, routing=routed)
    return found if both is None else replace(found, statistics=both.statistics(images_B3HW))


def _normalised(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return L2-normalised features (..., D) and their original lengths (...)."""
    return F.normalize(features, dim=-1), features.norm(dim=-1)


@dataclass(frozen=True, eq=False)
class _Stack:
    """Columns of several data sets that are indexed as one; no column is copied.

    Attributes:
        parts: columns of the same row shape and dtype.
        starts: row number at which each part begins.
    """

    parts: tuple[Rows, ...]
    starts: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows, and the shape of one row."""
        return (len(self), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> Any:
        """NumPy type of the numbers."""
        return self.parts[0].dtype

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[Any]:
        of_part = np.searchsorted(self.starts, index, side="right") - 1
        first = self.parts[0]
        rows = np.empty((len(index), *first.shape[1:]), dtype=first.dtype)
        for k, part in enumerate(self.parts):
            chosen = of_part == k
            rows[chosen] = part[index[chosen] - self.starts[k]]
        return rows


def _stacked(parts: Sequence[FeatureTable], embed_dim: int) -> FeatureTable:
    """Concatenate the columns of all parts without copying them."""
    # A node may hold no images at all.
    if not parts:
        return FeatureTable(np.zeros((0, embed_dim), dtype=np.float32))

    def stack(name: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        if columns[0] is None:
            return None
        ends = np.cumsum([len(column) for column in columns])
        return _Stack(tuple(columns), np.concatenate(([0], ends[:-1])))

    return FeatureTable(
        stack("features_ND"),
        stack("patches_NPD"),
        stack("pixels_N3HW"),
        parts[0].mean_std,
        local_NPD=stack("local_NPD"),
        routing_N2E=stack("routing_N2E"),
        statistics_NL2w=stack("statistics_NL2w"),
    )


def _rows(column: Rows, index: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.asarray(column[index], dtype=np.float32))
