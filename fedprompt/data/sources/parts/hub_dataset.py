"""Turns a Hugging Face data set into an `ImageDataset`, for the sources `hub` and `catalogue`.

Suffixes: N images, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedprompt.data.cache_files import digest
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.images import decode_rgb, hold_out_test, readable_name
from fedprompt.data.pixels import Pixels
from fedprompt.data.sources.parts.hub_keys import HubKeys
from fedprompt.data.sources.parts.hub_labels import read_labels
from fedprompt.data.sources.parts.hub_splits import Part, load_splits, read_parts, stamp_of_row
from fedprompt.data.sources.parts.integrity import (
    bad_images,
    content_hash,
    journal_path,
    pixel_keys,
    scan,
)
from fedprompt.data.sources.parts.verdicts import Verdict
from fedprompt.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Opener:
    """Opens image i. It is a class, not a closure, so that a data set can be pickled."""

    parts: tuple[Part, ...]
    part_N: NDArray[np.int64]
    row_N: NDArray[np.int64]
    hashes: tuple[str, ...]
    pixels: Pixels

    def __call__(self, index: int) -> Image.Image:
        part, row = self.parts[self.part_N[index]], int(self.row_N[index])
        try:
            data = part.read(row)
            # A row of the feature cache is found by this hash, so it must be that of these bytes.
            if content_hash(data) != self.hashes[index]:
                raise ValueError("its content is not what was found when the rows were checked")
            return decode_rgb(data, self.pixels)
        except (OSError, ValueError) as error:
            raise UserError(
                f"data: split '{part.split}', row {row} can no longer be read: {error}."
            ) from None


def load_hub(
    config: HubKeys,
    seed: int,
    cache_dir: Path,
    *,
    classes: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    spell: Callable[[str], str] = readable_name,
) -> ImageDataset:
    """Load the data set `config.hub_id`.

    Args:
        config: id, splits and columns of the data set.
        seed: decides which images are held out if `test_split` is null.
        cache_dir: folder that stores hashes of the images between runs.
        classes: a mapping from the authors' class names to the names used in prompts, in label
            order. If it is None or empty, the names in the data set are used, made readable.
        ignore: the authors' names of classes whose rows are left out.
        spell: makes a class name of the data set readable.

    Returns:
        The images in the order of the splits and their rows. The name of an image is its split and
        row.

    Raises:
        UserError: the hub cannot be reached, a split or column does not exist, labels have no
            names, or an image is unreadable while `on_bad_image` is `error`.
    """
    parts = tuple(read_parts(load_splits(config), config, ignore))
    class_names, labels = read_labels(parts, config, classes or {}, ignore, spell)
    domain_names, domains = _read_domains(parts, config)

    verdicts: list[Verdict] = []
    pixels = config.pixels
    places = []
    for part in parts:
        # `datasets` changes this fingerprint with the rows and columns that are selected.
        place = ("hub", part.images._fingerprint, part.column, *pixels.key)
        path = journal_path(cache_dir, *place)
        title = f"{config.title} ({part.split})"
        verdicts += scan(part.names(), stamp_of_row, part.read, path, title, pixels).verdicts
        places.append(digest(*place))
    part_of = np.repeat(np.arange(len(parts)), [len(part.labels) for part in parts])
    row_of = np.concatenate([np.arange(len(part.labels)) for part in parts])
    names = [f"split '{parts[p].split}', row {row}" for p, row in zip(part_of, row_of, strict=True)]
    bad = bad_images(names, verdicts, config.on_bad_image, config.title)
    readable = np.flatnonzero([verdict.reason is None for verdict in verdicts])

    part_N, row_N, labels_N = part_of[readable], row_of[readable], labels[readable]
    domains_N = domains[readable]
    split_N = np.array([part.code for part in parts], dtype=np.int8)[part_N]
    if config.test_split is None:
        # Stratify by the pair of class and domain, so that the test split has all domains.
        cells_N = labels_N * len(domain_names) + domains_N
        split_N = hold_out_test(cells_N, config.test_fraction, seed)
    _check_classes(labels_N, split_N, class_names, config)
    # The order counts: the cached features have one row per readable image.
    hashes = tuple(verdicts[i].hash for i in readable)
    content = [f"{names[i]}|{verdicts[i].hash}|{labels[i]}" for i in readable]
    return ImageDataset(
        name=config.title,
        class_names=class_names,
        labels_N=labels_N,
        split_N=split_N,
        domains_N=domains_N,
        domain_names=domain_names,
        fingerprint=digest("hub", *pixels.key, *content),
        open_image=_Opener(parts, part_N.astype(np.int64), row_N.astype(np.int64), hashes, pixels),
        bad_images=bad,
        hashes=hashes,
        pixel_keys=pixel_keys(hashes, pixels),
        place=digest(*places),
        image_names=tuple(f"{parts[p].split}/{row}" for p, row in zip(part_N, row_N, strict=True)),
    )


def _check_classes(
    labels_N: NDArray[np.int64],
    split_N: NDArray[np.int8],
    class_names: tuple[str, ...],
    config: HubKeys,
) -> None:
    """Refuse a set with images of fewer than two classes; warn about a class that has none."""
    tests_only = config.train_split is None
    used_N = split_N == (TEST if tests_only else TRAIN)
    what = "test" if tests_only else "training"
    present_C = np.bincount(labels_N[used_N], minlength=len(class_names)) > 0
    if present_C.sum() < 2:
        raise UserError(
            f"data: {config.hub_id} has {what} images of {present_C.sum()} class(es); at least "
            "two are needed."
        )
    if not present_C.all():
        log.warning("%s: no %s image of %s", config.title, what, class_names[present_C.argmin()])


def _read_domains(
    parts: Sequence[Part], config: HubKeys
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """(names of the domains, sorted; index of the domain of every row of all splits)."""
    if config.domain_column is None:
        rows = sum(len(part.labels) for part in parts)
        return (config.title,), np.zeros(rows, dtype=np.int64)
    values = []
    for part in parts:
        for row, value in enumerate(part.domains):
            if value is None:
                raise UserError(f"data: split '{part.split}', row {row} has no domain.")
            values.append(str(value))
    names = sorted(set(values))
    index = {name: i for i, name in enumerate(names)}
    return tuple(names), np.array([index[value] for value in values], dtype=np.int64)
