"""Joins several sources of images under common labels; each becomes a domain.

A file of common labels (`parts/common_labels.py`) lists the sources, mostly data sets of the
catalogue, and how their classes map to one label list. With `partition.scheme=domain`, every client
has images of one source. `data.root` contains one folder per source, with the source's name;
without it, data sets of the catalogue are loaded from the hub. Suffixes: N images, C classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.fields import option
from fedprompt.config.schema import DataConfig
from fedprompt.data.cache_files import digest
from fedprompt.data.catalogue import data_keys
from fedprompt.data.dataset import ImageDataset, opener_of
from fedprompt.data.sources.base import DataSource, SplitImagesConfig
from fedprompt.data.sources.parts.common_labels import CommonLabels, names, read
from fedprompt.data.sources.registry import build_data, source_class, source_keys
from fedprompt.errors import UserError, did_you_mean

PASSED_ON = (
    "split",
    "validation",
    "test_fraction",
    "on_bad_image",
    "stretch",
    "percentiles",
    "bands",
)
"""The keys that hold for every source which has them and does not set them in the label file."""


@dataclass(frozen=True)
class MultiConfig(SplitImagesConfig):
    """Several sources of images under common labels."""

    source: Literal["multi"] = option("multi", "the data source")
    common_labels: str | None = option(
        None,
        "the sources and their common labels: a YAML file, or a shipped one's name",
        path=True,
    )
    labels: Literal["all", "used"] = option(
        "all",
        "which common labels are the classes: all of the list, or those under which a source that "
        "is used has a class",
    )
    root: str | None = option(
        None, "folder with one folder per source; null = load them from the hub", path=True
    )
    domains: list[str] = option([], "sources to use; empty = those that the list uses by itself")
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
        """Refuse a section without a list of common labels, a wrong list and unknown sources."""
        super().check()
        if self.common_labels is None:
            raise UserError(
                f"source 'multi' needs 'common_labels': {', '.join(names())} or a YAML file."
            )
        # What is neither a name nor a file stands for a file on another machine.
        if re.fullmatch(r"[\w-]+|.*\.ya?ml", self.common_labels):
            check_domains(read(self.common_labels), self)


class Multi(DataSource):
    """The sources of a list of common labels, one after the other."""

    name = "multi"
    Config = MultiConfig

    @staticmethod
    def known_classes(config: MultiConfig) -> tuple[str, ...] | None:
        """None: which sources are used may depend on the folders that are there."""
        return None

    @staticmethod
    def load(config: MultiConfig, seed: int, cache_dir: Path) -> ImageDataset:
        """Open the sources of `config.common_labels`, or those of them in `config.domains`.

        Args:
            config: the list, the folder of the sources and how they are split.
            seed: decides which images are held out of sources without a test split.
            cache_dir: folder that stores hashes of the images between runs.

        Returns:
            The images, one source after the other. Domain d is the d-th source that is used.

        Raises:
            UserError: the list is wrong, or a source is unknown or cannot be read.
        """
        assert config.common_labels is not None
        common = read(config.common_labels)
        check_domains(common, config)
        sources, notes = _used(common, config)
        labels = tuple(common.classes) if config.labels == "all" else common.labels_of(sources)
        class_names = tuple(config.class_names) or labels
        if len(class_names) != len(labels):
            raise UserError(
                f"data: data.class_names has {len(class_names)} names, {config.title} has "
                f"{len(labels)} common labels."
            )
        # All sections are complete before the first, perhaps large, folder is listed.
        sections = [_section(common, config, name) for name in sources]
        parts = [source_class(one.source).load(one, seed, cache_dir) for one in sections]
        mapped = [_common(p, common, n, labels) for p, n in zip(parts, sources, strict=True)]
        # Images of classes without a common label are left out.
        rows = [np.flatnonzero(part_labels >= 0) for part_labels in mapped]
        opener = opener_of(parts, rows)
        mapping = {label: dict(common.classes[label]) for label in labels}
        return ImageDataset(
            name=config.title,
            class_names=class_names,
            labels_N=np.concatenate([a[index] for a, index in zip(mapped, rows, strict=True)]),
            split_N=np.concatenate(
                [p.split_N[index] for p, index in zip(parts, rows, strict=True)]
            ),
            domains_N=opener.source_N,
            domain_names=tuple(sources),
            # The mapping decides which images there are, and so which rows a cached file has.
            fingerprint=digest("multi", json.dumps(mapping), *(part.fingerprint for part in parts)),
            open_image=opener,
            bad_images=tuple(bad for part in parts for bad in part.bad_images),
            hashes=_of_rows(parts, rows, "hashes"),
            pixel_keys=_of_rows(parts, rows, "pixel_keys"),
            place=digest("multi", json.dumps(mapping), *(part.place for part in parts)),
            portable=all(part.portable for part in parts),
            notes=(*notes, *(note for part in parts for note in part.notes)),
            # Different sources may have images of the same name.
            image_names=tuple(
                f"{name}/{part.image_names[row]}"
                for name, part, index in zip(sources, parts, rows, strict=True)
                for row in index
            ),
        )


def check_domains(common: CommonLabels, config: MultiConfig) -> None:
    """Refuse `data.domains` that the list of common labels does not have."""
    for name in config.domains:
        if name not in common.sources:
            hint = did_you_mean(name, list(common.sources))
            raise UserError(f"data: data.domains: {config.title} has no data set '{name}'.{hint}")


def _used(common: CommonLabels, config: MultiConfig) -> tuple[list[str], list[str]]:
    """The sources that are used, and what the user should know about the others.

    The order is the list's, not the user's, so that domains are numbered consistently.
    """
    if config.domains:
        return [name for name in common.sources if name in config.domains], []
    used, notes = [], []
    for name in common.sources:
        if name in common.on_request:
            continue
        if name in common.if_present:
            folder = _folder(config, name)
            if folder is None or not folder.is_dir():
                notes.append(f"{name} is not used: there is no folder {folder or name}")
                continue
            notes.append(f"{name} is used: there is a folder {folder}")
        used.append(name)
    return used, notes


def _folder(config: MultiConfig, name: str) -> Path | None:
    """The folder of a source below `data.root`, if that is set."""
    return None if config.root is None else Path(config.root).expanduser() / name


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


def _section(common: CommonLabels, config: MultiConfig, name: str) -> DataConfig:
    """The config that opens one of the sources."""
    section = common.sources[name]
    keys: dict[str, Any] = dict(section) or data_keys(name)
    known = source_keys(str(keys["source"]))
    # The remaining keys, such as the hub's columns, differ between the sources.
    keys |= {k: getattr(config, k) for k in PASSED_ON if k in known and k not in section}
    folder = _folder(config, name)
    if folder is not None and "root" in known and not section.get("root"):
        keys["root"] = str(folder)
    return build_data(keys, f"data ({name})")


def _common(
    part: ImageDataset, common: CommonLabels, source: str, labels: Sequence[str]
) -> NDArray[np.int64]:
    """The common label of every image of one source (N,); -1 for images without one."""
    # Class names are those of the source here, since `_section` sets no `data.class_names`.
    common.check_classes(source, part.class_names)
    label_of = common.label_of(source)
    index_of: Mapping[str, int] = {label: i for i, label in enumerate(labels)}
    label_C = np.array([index_of.get(label_of.get(name, ""), -1) for name in part.class_names])
    return label_C.astype(np.int64)[part.labels_N]
