"""Published data sets of the catalogue, read from the authors' folder or loaded from the hub.

With `data.root`, the folder that the authors publish is read. Split and label order are those of
CoOp's split file if it lies beside the images and `data.split` allows it, else the authors'. If
there is neither, `data.test_fraction` of each class and domain is held out, drawn with the seed.
Without `data.root`, the copy on the Hugging Face hub is loaded with its split. Suffixes: N images,
C classes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from fedprompt.config.fields import option
from fedprompt.data.catalogue import Entry, entry
from fedprompt.data.dataset import TEST, TRAIN, VAL, ImageDataset
from fedprompt.data.images import name_key
from fedprompt.data.sources.base import DataSource
from fedprompt.data.sources.parts import cifar
from fedprompt.data.sources.parts.hub_dataset import load_hub
from fedprompt.data.sources.parts.hub_keys import HubKeys
from fedprompt.data.sources.parts.image_files import ImageFile, files_dataset
from fedprompt.data.sources.parts.published import (
    class_name,
    list_copy,
    number_classes,
    open_copy,
)
from fedprompt.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CatalogueConfig(HubKeys):
    """A published data set; `data=<name>` sets all of these keys but `root`."""

    source: Literal["catalogue"] = option("catalogue", "the data source")
    dataset: str | None = option(None, "name of the data set, see 'fedprompt data list'")
    root: str | None = option(
        None, "the authors' folder on this machine; null = load the copy on the hub", path=True
    )
    split: Literal["auto", "coop", "official"] = option(
        "auto", "which split to use; auto = CoOp's split file if it is in the folder, else official"
    )
    validation: Literal["unused", "train", "server"] = option(
        "unused",
        "what to do with validation images of a folder: leave them out, train on them, or give "
        "them to the server as its validation images",
    )

    @property
    def official_validation(self) -> bool:
        """Whether the server's validation images are those of the folder or of the hub's split."""
        return self.validation == "server" if self.root else super().official_validation

    def check(self) -> None:
        """Refuse an unknown data set, and one with neither a folder nor a copy on the hub."""
        super().check()
        if self.dataset is None:
            raise UserError("source 'catalogue' needs 'dataset', a name of 'fedprompt data list'.")
        facts = entry(self.dataset)
        if not (self.root or self.hub_id):
            raise UserError(
                f"no copy of {self.dataset} on the hub is known; download {facts.download} from "
                f"{facts.homepage}, unpack it and set data.root to the folder."
            )
        if self.validation == "server" and not (self.root or self.validation_split):
            raise UserError(
                "'validation=server' needs the authors' folder in 'root', or the name of the hub's "
                "split in 'validation_split'."
            )


class Catalogue(DataSource):
    """Any data set of the catalogue."""

    name = "catalogue"
    Config = CatalogueConfig

    @staticmethod
    def known_classes(config: CatalogueConfig) -> tuple[str, ...] | None:
        """Those of the entry; None where the copy defines them. See `DataSource.known_classes`."""
        assert config.dataset is not None
        names = config.class_names or entry(config.dataset).classes.values()
        return tuple(names) or None

    @staticmethod
    def load(config: CatalogueConfig, seed: int, cache_dir: Path) -> ImageDataset:
        """Open the data set `config.dataset`.

        Args:
            config: name of the data set, its folder or its place on the hub, and its split.
            seed: decides which images are held out if the data set has no test split.
            cache_dir: folder that stores hashes of the images between runs.

        Returns:
            The images. Classes are in the order of the catalogue's entry or of CoOp's split file.

        Raises:
            UserError: a folder or file is missing or not laid out as published, the hub's copy
                cannot be loaded, or an image is unreadable while `on_bad_image` is `error`.
        """
        assert config.dataset is not None
        facts = entry(config.dataset)
        if config.root is None:
            dataset = _from_hub(facts, config, seed, cache_dir)
        else:
            dataset = _from_folder(facts, config, config.root, seed, cache_dir)
        if config.official_validation and not (dataset.split_N == VAL).any():
            raise UserError(
                f"data: data.validation=server: the split of {facts.name} has no validation "
                "images; use CoOp's split file (data.split=coop), or leave data.validation and set "
                "partition.server_validation_fraction."
            )
        dataset = _with_superclasses(dataset, facts)
        if not config.class_names:
            return dataset
        if len(config.class_names) != len(dataset.class_names):
            raise UserError(
                f"data: data.class_names has {len(config.class_names)} names, {facts.name} has "
                f"{len(dataset.class_names)} classes."
            )
        return replace(dataset, class_names=tuple(config.class_names))


def _from_folder(
    facts: Entry, config: CatalogueConfig, root: str, seed: int, cache_dir: Path
) -> ImageDataset:
    copy = open_copy(facts, root, config.domains)
    # Its images are records in a few large files, so there is nothing to list.
    if facts.layout["reader"] == "cifar_binary":
        return cifar.load(copy, config.title)
    listing, _, from_coop = list_copy(copy, config.split)
    # The labels in CoOp's file are those of published results, e.g. of a base-to-new division.
    class_names, label_of = number_classes(listing, copy, by_name=not from_coop)
    domain_of = {domain: i for i, domain in enumerate(copy.domains)}
    # Without a split, TRAIN is a placeholder: `files_dataset` draws the split below.
    used_as = {None: TRAIN, TRAIN: TRAIN, TEST: TEST}
    used_as[VAL] = VAL if config.validation == "server" else TRAIN
    files = [
        ImageFile(
            item.path,
            label_of[item.key],
            used_as[item.split],
            domain_of.get(item.domain, 0),
        )
        for item in listing.listed
        if item.split != VAL or config.validation != "unused"
    ]
    unused = len(listing.listed) - len(files)
    if unused:
        log.info("%s: %d validation images are not used", facts.name, unused)
    has_split = any(item.split is not None for item in listing.listed)
    dataset = files_dataset(
        config,
        listing.images,
        files,
        class_names,
        tuple(facts.domains[domain] for domain in copy.domains) or (config.title,),
        test_fraction=None if has_split else config.test_fraction,
        seed=seed,
        cache_dir=cache_dir,
    )
    _check_training(dataset, facts)
    return dataset


def _from_hub(facts: Entry, config: CatalogueConfig, seed: int, cache_dir: Path) -> ImageDataset:
    dataset = load_hub(
        # `Catalogue.load` applies the user's names; `load_hub` would match them with the hub's.
        replace(config, class_names=[]),
        seed,
        cache_dir,
        classes=facts.classes,
        ignore=facts.hub.ignore if facts.hub else (),
        spell=lambda name: class_name(name, facts),
    )
    # The hub's copies name domains as the authors do; tables show the catalogue's names.
    ours = {name_key(theirs): name for theirs, name in facts.domains.items()}
    domains = tuple(ours.get(name_key(name), name) for name in dataset.domain_names)
    return replace(dataset, domain_names=domains)


def _check_training(dataset: ImageDataset, facts: Entry) -> None:
    """Refuse training images of fewer than two classes; warn about a class that has none."""
    # Variants of ImageNet have test images only: models are trained on ImageNet itself.
    if facts.split.kind == "test only":
        return
    trained_C = np.bincount(
        dataset.labels_N[dataset.split_N == TRAIN], minlength=len(dataset.class_names)
    )
    if (trained_C > 0).sum() < 2:
        raise UserError(
            f"data: {facts.name}: training images of {(trained_C > 0).sum()} class(es) can be "
            "read; at least two are needed."
        )
    if not trained_C.all():
        log.warning(
            "%s: no training image of %s", facts.name, dataset.class_names[trained_C.argmin()]
        )


def _with_superclasses(dataset: ImageDataset, facts: Entry) -> ImageDataset:
    if not facts.superclasses:
        return dataset
    group_of = {name: group for group, members in facts.superclasses.items() for name in members}
    return replace(
        dataset, superclass_names=tuple(group_of[name] for name in facts.classes.values())
    )
