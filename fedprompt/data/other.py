"""Test images of data sets besides an experiment's own, for protocols that look at several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.config import data_config
from fedprompt.data import open_dataset
from fedprompt.data.base import TEST, ImageDataset
from fedprompt.data.cache import ImageEncoder, cached_features
from fedprompt.errors import UserError
from fedprompt.options import build
from fedprompt.schema import DataConfig


@dataclass(frozen=True, eq=False)
class OtherData:
    """A data set's test images: indices, L2-normalised features (n, D) and labels (n,)."""

    dataset: ImageDataset
    templates: tuple[str, ...]
    index_N: NDArray[np.int64]
    features_ND: Tensor
    labels_N: Tensor

    @property
    def name(self) -> str:
        """The data set's title."""
        return self.dataset.name


def complete(chosen: Any, where: str) -> list[dict[str, Any]]:
    """Data sets as complete `data` sections; each is given by name, or by `use` and changes.

    Raises:
        UserError: not a list, an unknown name, wrong keys, or two data sets of one title.
    """
    if not isinstance(chosen, Sequence) or isinstance(chosen, str):
        raise UserError(f"config: {where} is {chosen!r}; it must be a list of data sets.")
    configs = [data_config(one, where) for one in chosen]
    titles = [config.title for config in configs]
    for title in titles:
        if titles.count(title) > 1:
            raise UserError(
                f"config: {where}: two data sets are called '{title}'; give each its own title, "
                f"e.g. {{use: {title}, title: another}}."
            )
    return [asdict(config) for config in configs]


def open_others(
    sections: Sequence[Mapping[str, Any]], seed: int, clip: ImageEncoder, cache_dir: Path
) -> list[OtherData]:
    """Open data sets that `complete` has described; images that no cache holds are encoded.

    Raises:
        UserError: a data set cannot be had, or has no test images.
    """
    return [_open(build(DataConfig, dict(s), "data"), seed, clip, cache_dir) for s in sections]


def _open(config: DataConfig, seed: int, clip: ImageEncoder, cache_dir: Path) -> OtherData:
    dataset = open_dataset(config, seed, cache_dir)
    index_N = np.flatnonzero(dataset.split_N == TEST)
    if not len(index_N):
        raise UserError(f"data set '{dataset.name}' has no test images.")
    rows = np.asarray(cached_features(clip, dataset, cache_dir)[index_N], dtype=np.float32)
    return OtherData(
        dataset,
        tuple(config.templates),
        index_N,
        F.normalize(torch.from_numpy(rows), dim=-1),
        torch.from_numpy(dataset.labels_N[index_N]),
    )
