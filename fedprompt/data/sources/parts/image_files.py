"""Turns labelled image files into an `ImageDataset`, for every source that reads folders.

Suffix: N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fedprompt.data.cache_files import digest
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.images import decode_rgb, hold_out_test
from fedprompt.data.pixels import Pixels
from fedprompt.data.sources.base import StoredImagesConfig
from fedprompt.data.sources.parts.integrity import (
    bad_images,
    content_hash,
    journal_path,
    pixel_keys,
    scan,
)
from fedprompt.data.sources.parts.verdicts import stamp_of
from fedprompt.errors import UserError
from fedprompt.files import read_regular


@dataclass(frozen=True)
class ImageFile:
    """One labelled image.

    Attributes:
        path: relative to the data set's folder, with forward slashes.
        label: index of the class.
        split: `TRAIN` or `TEST`.
        domain: index of the domain.
    """

    path: str
    label: int
    split: int
    domain: int = 0


@dataclass(frozen=True)
class _Opener:
    """Opens image i. It is a class, not a closure, so that a data set can be pickled."""

    root: Path
    paths: tuple[str, ...]
    hashes: tuple[str, ...]
    pixels: Pixels

    def __call__(self, index: int) -> Image.Image:
        path = self.root / self.paths[index]
        try:
            data = read_regular(path)
            # A row of the feature cache is found by this hash, so it must be that of these bytes.
            if content_hash(data) != self.hashes[index]:
                raise UserError(
                    f"data: {path} has changed since the folder was checked; start the run again. "
                    "If it says so again, 'touch' the file: its times do not show the change."
                )
            return decode_rgb(data, self.pixels)
        except (OSError, ValueError) as error:
            raise UserError(
                f"data: {path} can no longer be read: {error}; start the run again."
            ) from None


def files_dataset(
    config: StoredImagesConfig,
    root: Path,
    files: Sequence[ImageFile],
    class_names: tuple[str, ...],
    domain_names: tuple[str, ...],
    *,
    test_fraction: float | None,
    seed: int,
    cache_dir: Path,
) -> ImageDataset:
    """Build a data set of the readable ones among labelled files.

    Args:
        config: title of the data set, and what to do with unreadable images.
        root: the folder to which the files' paths are relative.
        files: the images, in the order of the data set.
        class_names: names in label order.
        domain_names: names of the domains.
        test_fraction: share of each class and domain that becomes the test split, drawn with
            `seed`; None = the splits are those of `files`.
        seed: seed of the experiment.
        cache_dir: folder that stores hashes of the files between runs.

    Returns:
        The data set. The name of an image is its path below `root`.

    Raises:
        UserError: an image is unreadable while `on_bad_image` is `error`.
    """
    pixels = config.pixels
    place = ("folder", str(root.resolve()), *pixels.key)
    scanned = scan(
        [file.path for file in files],
        lambda path: stamp_of(root / path),
        lambda i: _read(root / files[i].path),
        journal_path(cache_dir, *place),
        config.title,
        pixels,
    )
    verdicts = scanned.verdicts
    names = [str(root / file.path) for file in files]
    bad = bad_images(names, verdicts, config.on_bad_image, config.title)
    readable = [i for i, verdict in enumerate(verdicts) if verdict.reason is None]
    labels_N = np.array([files[i].label for i in readable], dtype=np.int64)
    split_N = np.array([files[i].split for i in readable], dtype=np.int8)
    domains_N = np.array([files[i].domain for i in readable], dtype=np.int64)
    if test_fraction is not None:
        # Stratify by the pair of class and domain, so that the test split has all domains.
        cells_N = labels_N * len(domain_names) + domains_N
        split_N = hold_out_test(cells_N, test_fraction, seed)
    # Paths are relative, so that a folder can be moved without encoding its images again.
    hashes = tuple(verdicts[i].hash for i in readable)
    content = [f"{files[i].path}|{verdicts[i].hash}|{files[i].label}" for i in readable]
    return ImageDataset(
        name=config.title,
        class_names=class_names,
        labels_N=labels_N,
        split_N=split_N,
        domains_N=domains_N,
        domain_names=domain_names,
        fingerprint=digest("folder", *pixels.key, *content),
        open_image=_Opener(
            root,
            tuple(files[i].path for i in readable),
            hashes,
            pixels,
        ),
        bad_images=bad,
        image_names=tuple(files[i].path for i in readable),
        hashes=hashes,
        pixel_keys=pixel_keys(hashes, pixels),
        place=digest(*place),
        retained=pixel_keys(scanned.others, pixels),
        portable=True,
    )


def _read(path: Path) -> bytes:
    if path.is_symlink() and not path.exists():
        raise ValueError(f"it is a link to {path.readlink()}, which does not exist")
    return read_regular(path)
