"""Several data sets of the catalogue as one: common labels, and an image's data set is its domain.

A file in `common_labels/` lists the data sets and, for every common label, the classes of each that
it stands for; images of other classes are left out. With `partition.scheme=domain` every client
then owns images of one data set. `data.root` holds one folder per data set, named as in the
catalogue; without it they come from the hub. Suffix: N images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from fedprompt.config.fields import build
from fedprompt.config.schema import DataConfig
from fedprompt.data import catalogue
from fedprompt.data.dataset import ImageDataset, opener_of
from fedprompt.data.features.cache import digest
from fedprompt.data.sources import published
from fedprompt.errors import UserError, did_you_mean

HERE = Path(__file__).parent / "common_labels"


@dataclass(frozen=True)
class CommonLabels:
    """A list of common labels: `classes[label][source]` are the classes that it stands for."""

    sources: tuple[str, ...]
    classes: Mapping[str, Mapping[str, tuple[str, ...]]]


def names() -> list[str]:
    """Names of all lists of common labels, sorted."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


@cache
def common_labels(name: str) -> CommonLabels:
    """The list of that name.

    Raises:
        UserError: no such list.
    """
    if name not in names():
        raise UserError(f"no list of common labels '{name}'.{did_you_mean(name, names())}")
    raw = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    classes = {
        str(label): {source: tuple(theirs) for source, theirs in by_source.items()}
        for label, by_source in raw["labels"].items()
    }
    return CommonLabels(tuple(raw["sources"]), classes)


def load(config: DataConfig, seed: int, cache_dir: Path) -> ImageDataset:
    """The data sets of `config.common_labels`, or those of them in `config.domains`.

    Raises:
        UserError: unknown data set, or what one of them says.
    """
    assert config.common_labels is not None
    common = common_labels(config.common_labels)
    for name in config.domains:
        if name not in common.sources:
            hint = did_you_mean(name, common.sources)
            raise UserError(f"data: data.domains: {config.title} has no data set '{name}'.{hint}")
    sources = [name for name in common.sources if name in config.domains or not config.domains]
    class_names = tuple(config.class_names) or tuple(common.classes)
    if len(class_names) != len(common.classes):
        raise UserError(
            f"data: data.class_names has {len(class_names)} names, {config.title} has "
            f"{len(common.classes)} common labels."
        )
    parts = [published.load(_one(config, name), seed, cache_dir) for name in sources]
    chosen = [_chosen(part, common, name) for part, name in zip(parts, sources, strict=True)]
    rows = [np.flatnonzero(labels >= 0) for labels in chosen]
    opener = opener_of(parts, rows)
    return ImageDataset(
        name=config.title,
        class_names=class_names,
        labels_N=np.concatenate([c[kept] for c, kept in zip(chosen, rows, strict=True)]),
        split_N=np.concatenate([p.split_N[kept] for p, kept in zip(parts, rows, strict=True)]),
        domains_N=opener.source_N,
        domain_names=tuple(sources),
        fingerprint=digest("multi", *common.classes, *(part.fingerprint for part in parts)),
        open_image=opener,
        bad_images=tuple(bad for part in parts for bad in part.bad_images),
        image_names=tuple(
            f"{name}/{part.image_names[row]}"
            for name, part, kept in zip(sources, parts, rows, strict=True)
            for row in kept
        ),
    )


def _one(config: DataConfig, name: str) -> DataConfig:
    """The config that loads one of the data sets alone."""
    keys = catalogue.data_keys(name)
    if config.root is not None:
        keys["root"] = str(Path(config.root).expanduser() / name)
    alone = build(DataConfig, keys, f"data ({name})")
    return replace(
        alone,
        split=config.split,
        validation=config.validation,
        test_fraction=config.test_fraction,
        on_bad_image=config.on_bad_image,
    )


def _chosen(part: ImageDataset, common: CommonLabels, source: str) -> NDArray[np.int64]:
    """The common label of every image of one data set, -1 where it has none."""
    label_of_class = {
        theirs: label
        for label, by_source in enumerate(common.classes.values())
        for theirs in by_source.get(source, ())
    }
    label_C = np.array([label_of_class.get(name, -1) for name in part.class_names], dtype=np.int64)
    return label_C[part.labels_N]
