"""Test images of data sets other than the experiment's, for protocols that test on several.

Used on the server: `complete` when a config is composed, `open_others` before the first round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from fedprompt.methods.base import Method


@dataclass(frozen=True, eq=False)
class TestSet:
    """The test images of a data set.

    Attributes:
        dataset: the whole data set.
        templates: the prompt templates of its `data` section, for the class names.
        index_N: indices of its test images in the data set (n,).
        inputs_N: inputs of these images (n, ...).
        labels_N: class indices of these images (n,).
    """

    dataset: ImageDataset
    templates: tuple[str, ...]
    index_N: NDArray[np.int64]
    inputs_N: Inputs
    labels_N: Tensor

    @property
    def name(self) -> str:
        """The title of the data set."""
        return self.dataset.name


def complete(chosen: Any, where: str) -> list[dict[str, Any]]:
    """Expand a list of data sets in a protocol's options to complete `data` sections.

    Args:
        chosen: the value of the option: a list of names, of mappings with `use` and changes, or of
            complete sections.
        where: the key of the option, for messages.

    Returns:
        One complete `data` section per data set. Complete sections are returned as they are.

    Raises:
        UserError: the value is not a list, a name or key is unknown, or two data sets have the
            same title.
    """
    if not isinstance(chosen, Sequence) or isinstance(chosen, str):
        raise UserError(f"config: {where} is {chosen!r}; it must be a list of data sets.")
    configs = [data_config(one, where) for one in chosen]
    # Protocols store and show results by title.
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
    method: Method,
    data: DataConfig,
) -> list[TestSet]:
    """Open the data sets of `complete`, and encode their test images if no cache holds them.

    Where the experiment joins several data sets of one folder, a data set without a folder of its
    own is looked for beside them.

    Args:
        sections: complete `data` sections.
        seed: the experiment's seed, which decides on generated images and random splits.
        clip: the frozen backbone.
        cache_dir: the folder for downloads and encoded features.
        method: the method under test, which says what it reads of an image.
        data: the experiment's own `data` section.

    Returns:
        One test set per section, in order.

    Raises:
        UserError: a data set cannot be found, downloaded or read, or it has no test images.
    """
    configs = [build_data(_beside(section, data)) for section in sections]
    return [_open(config, seed, clip, cache_dir, method) for config in configs]


def _beside(section: Mapping[str, Any], data: DataConfig) -> Mapping[str, Any]:
    """The section of a data set, with its folder if that stands beside those of the experiment."""
    root = getattr(data, "root", None)
    if data.source != "multi" or not root or section.get("root"):
        return section
    if section["source"] == "multi":
        return {**section, "root": root}
    folder = Path(root).expanduser() / str(section.get("dataset"))
    return {**section, "root": str(folder)} if folder.is_dir() else section


def _open(
    config: DataConfig, seed: int, clip: FrozenCLIP, cache_dir: Path, method: Method
) -> TestSet:
    if config.multi_label:
        raise UserError(
            f"data set '{config.title}' has several labels on an image, and this protocol tests "
            "one class per image; use another data set."
        )
    dataset = open_dataset(config, seed, cache_dir)
    index_N = np.flatnonzero(dataset.split_N == TEST)
    if not len(index_N):
        raise UserError(f"data set '{dataset.name}' has no test images.")
    return TestSet(
        dataset,
        tuple(config.templates),
        index_N,
        open_feature_table(clip, dataset, cache_dir, method.needs, routing=method.routing).rows(
            index_N
        ),
        torch.from_numpy(dataset.labels_N[index_N]),
    )
