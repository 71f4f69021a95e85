"""Data sets of the catalogue: from the folder that their authors publish, or from the hub.

With `data.root` the folder is read. CoOp's split file beside the images then fixes split and label
order (`data.split` can ask for it or leave it aside); else the authors' split does; where there is
none, `data.test_fraction` of each class and domain is held out, seeded. Without `data.root` the
copy on the hub is loaded, with its own split.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from fedprompt.config.schema import DataConfig
from fedprompt.data.catalogue import Entry, entry
from fedprompt.data.dataset import TRAIN, VAL, ImageDataset
from fedprompt.data.images import name_key, readable_name
from fedprompt.data.sources import cifar, coop_split
from fedprompt.data.sources.image_files import ImageFile, files_dataset
from fedprompt.data.sources.layouts import Copy, Listing, capitals, read_layout
from fedprompt.errors import UserError, did_you_mean

log = logging.getLogger(__name__)


def load(config: DataConfig, seed: int, cache_dir: Path) -> ImageDataset:
    """The data set `config.dataset`.

    Raises:
        UserError: folder or file missing or not laid out as published, or what the hub says.
    """
    assert config.dataset is not None
    found = entry(config.dataset)
    if config.root is None:
        dataset = _from_hub(found, config, seed, cache_dir)
    else:
        dataset = _from_folder(found, config, seed, cache_dir)
    if config.class_names:
        if len(config.class_names) != len(dataset.class_names):
            raise UserError(
                f"data: data.class_names has {len(config.class_names)} names, {found.name} has "
                f"{len(dataset.class_names)} classes."
            )
        dataset = replace(dataset, class_names=tuple(config.class_names))
    return dataset


def open_copy(found: Entry, root: str | Path, domains: Sequence[str] = ()) -> Copy:
    """The folder `root` as a copy of the entry, with the `domains` to read (none = all)."""
    return Copy(found, Path(root).expanduser(), _domains(found, domains))


def list_copy(copy: Copy, split: str = "auto") -> tuple[Listing, str, bool]:
    """(listing, where its split is from, whether that is CoOp's file).

    `split` is `auto`, `coop` or `official`.

    Raises:
        UserError: the folder is not laid out as published.
    """
    found = copy.entry
    path = None if split == "official" else _coop_file(copy, split == "coop")
    if path is None:
        listing = read_layout(copy)
    else:
        listing = coop_split.read_split(path, copy.images_folder(found.layout["images"]))
    _check_paths(listing, copy)
    return listing, found.split.kind if path is None else f"CoOp's {path.name}", path is not None


def _from_folder(found: Entry, config: DataConfig, seed: int, cache_dir: Path) -> ImageDataset:
    assert config.root is not None
    copy = open_copy(found, config.root, config.domains)
    if found.layout["reader"] == "cifar_binary":
        return _with_superclasses(cifar.load(copy, config.title), found)
    listing, _, from_coop = list_copy(copy, config.split)
    class_names, label_of = _number_classes(listing, copy, by_name=not from_coop)
    domain_of = {domain: i for i, domain in enumerate(copy.domains)}
    as_train = config.validation == "train"
    files = [
        ImageFile(
            item.path,
            label_of[item.key],
            TRAIN if item.split is None or item.split == VAL else item.split,
            domain_of.get(item.domain, 0),
        )
        for item in listing.listed
        if item.split != VAL or as_train
    ]
    unused = len(listing.listed) - len(files)
    if unused:
        log.info("%s: %d validation images are not used", found.name, unused)
    dataset = files_dataset(
        config,
        listing.images,
        files,
        class_names,
        tuple(found.domains[domain] for domain in copy.domains) or (config.title,),
        hold_out=all(item.split is None for item in listing.listed),
        seed=seed,
        cache_dir=cache_dir,
    )
    _check_training(dataset, found)
    return _with_superclasses(dataset, found)


def _from_hub(found: Entry, config: DataConfig, seed: int, cache_dir: Path) -> ImageDataset:
    from fedprompt.data.sources import hub  # `datasets` alone takes seconds

    ignore = found.hub.ignore if found.hub else ()
    dataset = hub.load(
        replace(config, class_names=[]),
        seed,
        cache_dir,
        classes=found.classes,
        ignore=ignore,
        spell=lambda name: class_name(name, found),
    )
    ours = {name_key(theirs): name for theirs, name in found.domains.items()}
    domains = tuple(ours.get(name_key(name), name) for name in dataset.domain_names)
    return _with_superclasses(replace(dataset, domain_names=domains), found)


def _coop_file(copy: Copy, required: bool) -> Path | None:
    coop = copy.entry.coop_split
    if coop is None:
        if required:
            raise UserError(
                f"data: data.split=coop: CoOp has no split file for {copy.entry.name}; leave "
                "data.split out."
            )
        return None
    images = copy.images_folder(copy.entry.layout["images"])
    path = coop_split.find_split(coop.file, (copy.root, images, images.parent))
    if path is None and required:
        raise UserError(
            f"data: data.split=coop: no {coop.file} in {copy.root}; download it from "
            f"{coop_split.SOURCE} and put it there."
        )
    return path


def _check_paths(listing: Listing, copy: Copy) -> None:
    """Refuse paths that leave the folder, and lists of which no image is there."""
    for item in listing.listed:
        path = PurePosixPath(item.path)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"data: {copy.entry.name}: a list names {item.path}, outside the data.")
    if not any((listing.images / item.path).is_file() for item in listing.listed):
        first = listing.listed[0].path if listing.listed else "any"
        raise copy.problem(
            f"none of the {len(listing.listed)} listed images is in {listing.images}, e.g. {first}"
        )


def _number_classes(
    listing: Listing, copy: Copy, *, by_name: bool
) -> tuple[tuple[str, ...], dict[str, int]]:
    """(class names in label order, label of each class key)."""
    found = copy.entry
    if not (found.classes and by_name):
        if len(listing.keys) != found.num_classes:
            raise copy.problem(f"{len(listing.keys)} classes instead of {found.num_classes}")
        names = tuple(_spelled(key, listing, found) for key in listing.keys)
        return names, {key: label for label, key in enumerate(listing.keys)}
    by_key = {name_key(theirs): label for label, theirs in enumerate(found.classes)}
    label_of: dict[str, int] = {}
    for key in listing.keys:
        label = by_key.get(name_key(key))
        if label is None:
            hint = did_you_mean(key, list(found.classes))
            raise copy.problem(f"class '{key}' is not one of the {found.num_classes}.{hint}")
        label_of[key] = label
    there = set(label_of.values())
    missing = [name for label, name in enumerate(found.classes) if label not in there]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise copy.problem(f"class '{missing[0]}'{more} missing")
    return tuple(found.classes.values()), label_of


def class_name(theirs: str, found: Entry) -> str:
    """The authors' name of a class made readable, in the style of the entry."""
    if found.class_style == "readable":
        return readable_name(theirs)
    if found.class_style == "capitals":
        return " ".join(capitals(theirs))
    if found.class_style == "place" and "/" in theirs:  # 'a/apse/indoor' -> 'indoor apse'
        return " ".join(reversed(theirs.split("/")[1:])).replace("_", " ")
    if found.class_style == "year first":
        model, _, year = theirs.rpartition(" ")
        return f"{year} {model}".strip()
    return theirs.replace("_", " ")


def _spelled(key: str, listing: Listing, found: Entry) -> str:
    """A class's name: in the entry's spelling where it has one, else the copy's, made readable."""
    theirs = listing.names.get(key, key)
    spellings = {name_key(name): name for name in found.classes.values()}
    spellings |= {name_key(name): ours for name, ours in found.classes.items()}
    if name_key(theirs) in spellings:
        return spellings[name_key(theirs)]
    return theirs.replace("_", " ") if key in listing.names else class_name(theirs, found)


def _domains(found: Entry, wanted: Sequence[str]) -> tuple[str, ...]:
    """The authors' names of the domains to read."""
    by_key = {name_key(ours): theirs for theirs, ours in found.domains.items()}
    by_key |= {name_key(theirs): theirs for theirs in found.domains}
    for name in wanted:
        if name_key(name) not in by_key:
            hint = did_you_mean(name, list(found.domains.values()))
            raise UserError(f"data: data.domains: {found.name} has no domain '{name}'.{hint}")
    chosen = {by_key[name_key(name)] for name in wanted}
    return tuple(theirs for theirs in found.domains if theirs in chosen or not wanted)


def _check_training(dataset: ImageDataset, found: Entry) -> None:
    if found.split.kind == "test only":
        return
    trained = np.bincount(
        dataset.labels_N[dataset.split_N == TRAIN], minlength=len(dataset.class_names)
    )
    if (trained > 0).sum() < 2:
        raise UserError(
            f"data: {found.name}: training images of {(trained > 0).sum()} class(es) can be read; "
            "at least two are needed."
        )
    if not trained.all():
        log.warning(
            "%s: no training image of %s", found.name, dataset.class_names[trained.argmin()]
        )


def _with_superclasses(dataset: ImageDataset, found: Entry) -> ImageDataset:
    if not found.superclasses:
        return dataset
    group_of = {name: group for group, members in found.superclasses.items() for name in members}
    return replace(
        dataset, superclass_names=tuple(group_of[name] for name in found.classes.values())
    )
