"""Test images of data sets besides an experiment's own, for protocols that look at several."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.schema import DataConfig
from fedprompt.data import open_dataset
from fedprompt.data.dataset import TEST, ImageDataset
from fedprompt.data.features.inputs import Inputs
from fedprompt.data.features.table import open_feature_table
from fedprompt.data.sections import data_config
from fedprompt.data.sources.registry import build_data
from fedprompt.errors import UserError


@dataclass(frozen=True, eq=False)
class TestSet:
    """A data set's test images: indices, inputs and labels (n,)."""

    dataset: ImageDataset
    templates: tuple[str, ...]
    index_N: NDArray[np.int64]
    inputs_N: Inputs
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
    sections: Sequence[Mapping[str, Any]],
    seed: int,
    clip: FrozenCLIP,
    cache_dir: Path,
    needs: Collection[str],
) -> list[TestSet]:
    """Open data sets that `complete` has described; images that no cache holds are encoded.

    `needs` is what the method under test needs of an image.

    Raises:
        UserError: a data set cannot be had, or has no test images.
    """
    configs = [build_data(section) for section in sections]
    return [_open(config, seed, clip, cache_dir, needs) for config in configs]


def _open(
    config: DataConfig, seed: int, clip: FrozenCLIP, cache_dir: Path, needs: Collection[str]
) -> TestSet:
    dataset = open_dataset(config, seed, cache_dir)
    index_N = np.flatnonzero(dataset.split_N == TEST)
    if not len(index_N):
        raise UserError(f"data set '{dataset.name}' has no test images.")
    return TestSet(
        dataset,
        tuple(config.templates),
        index_N,
        open_feature_table(clip, dataset, cache_dir, needs).rows(index_N),
        torch.from_numpy(dataset.labels_N[index_N]),
    )
