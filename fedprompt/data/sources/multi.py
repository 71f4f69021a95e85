"""Joins several data sets of the catalogue under common labels; each becomes a domain.

A file in `common_labels/` lists the data sets and, for every common label, the classes of each data
set that have this label; images of other classes are left out. With `partition.scheme=domain`,
every client has images of one data set. `data.root` contains one folder per data set, named as in
the catalogue; without it, they are loaded from the hub. Suffixes: N images, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from fedprompt.config.fields import build, option
from fedprompt.data.cache_files import digest
from fedprompt.data.catalogue import data_keys
from fedprompt.data.dataset import ImageDataset, opener_of
from fedprompt.data.sources.base import DataSource, SplitImagesConfig
from fedprompt.data.sources.catalogue import Catalogue, CatalogueConfig
from fedprompt.errors import UserError, did_you_mean

HERE = Path(__file__).parent / "common_labels"


@dataclass(frozen=True)
class CommonLabels:
    """A list of common labels.

    Attributes:
        sources: names of the data sets in the catalogue.
        classes: the classes that each common label stands for, `classes[label][data set]`.
    """

    sources: tuple[str, ...]
    classes: Mapping[str, Mapping[str, tuple[str, ...]]]


def names() -> list[str]:
    """The names of all lists of common labels, sorted."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


@cache
def common_labels(name: str) -> CommonLabels:
    """Read the list of common labels called `name`.

    Args:
        name: one of `names()`.

    Returns:
        The list; it is read once per process.

    Raises:
        UserError: there is no such list; the message suggests the nearest name.
    """
    if name not in names():
        raise UserError(f"no list of common labels '{name}'.{did_you_mean(name, names())}")
    raw = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    classes = {
        str(label): {source: tuple(theirs) for source, theirs in by_source.items()}
        for label, by_source in raw["labels"].items()
    }
    return CommonLabels(tuple(raw["sources"]), classes)


@dataclass(frozen=True)
class MultiConfig(SplitImagesConfig):
    """Several data sets of the catalogue under common labels."""

    source: Literal["multi"] = option("multi", "the data source")
    common_labels: str | None = option(None, "name of a list of data sets and their common labels")
    root: str | None = option(
        None, "folder with one folder per data set; null = load them from the hub", path=True
    )
    domains: list[str] = option([], "data sets to use; empty = all of the list")
    split: Literal["auto", "coop", "official"] = option(
        "auto", "which split to use of each data set, as for source catalogue"
    )
    validation: Literal["unused", "train", "server"] = option(
        "unused",
        "what to do with validation images: leave them out, train on them, or give them to the "
        "server as its validation images",
    )

    @property
    def official_validation(self) -> bool:
        """Whether the server's validation images are those of the data sets."""
        return self.validation == "server"

    def check(self) -> None:
        """Refuse a section without a known list of common labels."""
        super().check()
        if self.common_labels is None:
            raise UserError(f"source 'multi' needs 'common_labels': {', '.join(names())}.")
        common_labels(self.common_labels)


class Multi(DataSource):
    """The data sets of a list of common labels, one after the other."""

    name = "multi"
    Config = MultiConfig

    @staticmethod
    def load(config: MultiConfig, seed: int, cache_dir: Path) -> ImageDataset:
        """Open the data sets of `config.common_labels`, or those of them in `config.domains`.

        Args:
            config: name of the list, the folder of the data sets and how they are split.
            seed: decides which images are held out of data sets without a test split.
            cache_dir: folder that stores hashes of the images between runs.

        Returns:
            The images, one data set after the other. Domain d is the d-th data set.

        Raises:
            UserError: a data set is unknown or cannot be read.
        """
        assert config.common_labels is not None
        common = common_labels(config.common_labels)
        for name in config.domains:
            if name not in common.sources:
                hint = did_you_mean(name, common.sources)
                raise UserError(
                    f"data: data.domains: {config.title} has no data set '{name}'.{hint}"
                )
        # The order is the list's, not the user's, so that domains are numbered consistently.
        sources = [name for name in common.sources if name in config.domains or not config.domains]
        class_names = tuple(config.class_names) or tuple(common.classes)
        if len(class_names) != len(common.classes):
            raise UserError(
                f"data: data.class_names has {len(class_names)} names, {config.title} has "
                f"{len(common.classes)} common labels."
            )
        parts = [Catalogue.load(_single(config, name), seed, cache_dir) for name in sources]
        labels = [_common(part, common, name) for part, name in zip(parts, sources, strict=True)]
        # Images of classes without a common label are left out.
        rows = [np.flatnonzero(part_labels >= 0) for part_labels in labels]
        opener = opener_of(parts, rows)
        return ImageDataset(
            name=config.title,
            class_names=class_names,
            labels_N=np.concatenate([a[index] for a, index in zip(labels, rows, strict=True)]),
            split_N=np.concatenate(
                [p.split_N[index] for p, index in zip(parts, rows, strict=True)]
            ),
            domains_N=opener.source_N,
            domain_names=tuple(sources),
            # The mapping decides which images there are, and so which rows a cached file has.
            fingerprint=digest(
                "multi", json.dumps(_mapping(common)), *(part.fingerprint for part in parts)
            ),
            open_image=opener,
            bad_images=tuple(bad for part in parts for bad in part.bad_images),
            hashes=_of_rows(parts, rows, "hashes"),
            pixel_keys=_of_rows(parts, rows, "pixel_keys"),
            place=digest("multi", json.dumps(_mapping(common)), *(part.place for part in parts)),
            portable=all(part.portable for part in parts),
            # Different data sets may have images of the same name.
            image_names=tuple(
                f"{name}/{part.image_names[row]}"
                for name, part, index in zip(sources, parts, rows, strict=True)
                for row in index
            ),
        )


def _of_rows(
    parts: Sequence[ImageDataset], rows: Sequence[NDArray[np.int64]], name: str
) -> tuple[str, ...]:
    """An attribute of the images in `rows`, joined; empty if a data set does not have it.

    Copies in the authors' binary files have no hashes of single images, for example.
    """
    values = [getattr(part, name) for part in parts]
    if not all(values):
        return ()
    return tuple(one[row] for one, index in zip(values, rows, strict=True) for row in index)


def _single(config: MultiConfig, name: str) -> CatalogueConfig:
    """The config that opens one of the data sets."""
    # The remaining keys, such as the hub's columns, differ between the data sets.
    keys = data_keys(name) | {
        "split": config.split,
        "validation": config.validation,
        "test_fraction": config.test_fraction,
        "on_bad_image": config.on_bad_image,
        "stretch": config.stretch,
        "percentiles": config.percentiles,
        "bands": config.bands,
    }
    if config.root is not None:
        keys["root"] = str(Path(config.root).expanduser() / name)
    return build(CatalogueConfig, keys, f"data ({name})")


def _mapping(common: CommonLabels) -> dict[str, dict[str, tuple[str, ...]]]:
    """The common labels as plain values, in label order."""
    return {label: dict(by_source) for label, by_source in common.classes.items()}


def _common(part: ImageDataset, common: CommonLabels, source: str) -> NDArray[np.int64]:
    """The common label of every image of one data set (N,); -1 for images without one."""
    # Class names are those of the catalogue here, since `_single` sets no `data.class_names`.
    label_of_class = {
        theirs: label
        for label, by_source in enumerate(common.classes.values())
        for theirs in by_source.get(source, ())
    }
    label_C = np.array([label_of_class.get(name, -1) for name in part.class_names], dtype=np.int64)
    return label_C[part.labels_N]
