"""A data set of image files: records of paths and labels become an `ImageDataset`.

Suffix: N images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fedprompt.config.schema import DataConfig
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.cache import digest
from fedprompt.data.images import decode_rgb, hold_out_test
from fedprompt.data.sources.integrity import bad_images, memo_path, scan
from fedprompt.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFile:
    """One labelled image; `path` is relative to the data set's folder, with forward slashes."""

    path: str
    label: int
    split: int
    domain: int = 0


@dataclass(frozen=True)
class _Opener:
    """Opens image i; a class, not a closure, so that a data set can be pickled."""

    root: Path
    paths: tuple[str, ...]

    def __call__(self, index: int) -> Image.Image:
        path = self.root / self.paths[index]
        try:
            return decode_rgb(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(
                f"data: {path} was readable and no longer is: {error}; start again."
            ) from None


def files_dataset(
    config: DataConfig,
    root: Path,
    files: Sequence[ImageFile],
    class_names: tuple[str, ...],
    domain_names: tuple[str, ...],
    *,
    hold_out: bool,
    seed: int,
    cache_dir: Path,
) -> ImageDataset:
    """All readable `files` below `root`.

    With `hold_out`, a seeded part of each class and domain becomes the test split.

    Raises:
        UserError: an unreadable image under `on_bad_image: error`.
    """
    keys = [_key(root, file.path) for file in files]
    memo = memo_path(cache_dir, "folder", str(root.resolve()))
    verdicts = scan(keys, lambda i: (root / files[i].path).read_bytes(), memo, config.title)
    names = [str(root / file.path) for file in files]
    bad = bad_images(names, verdicts, config.on_bad_image, config.title)
    kept = [i for i, verdict in enumerate(verdicts) if verdict.reason is None]
    labels_N = np.array([files[i].label for i in kept], dtype=np.int64)
    split_N = np.array([files[i].split for i in kept], dtype=np.int8)
    domains_N = np.array([files[i].domain for i in kept], dtype=np.int64)
    if hold_out:
        cells_N = labels_N * len(domain_names) + domains_N
        split_N = hold_out_test(cells_N, config.test_fraction, seed)
    content = [f"{files[i].path}|{verdicts[i].hash}|{files[i].label}" for i in kept]
    return ImageDataset(
        name=config.title,
        class_names=class_names,
        labels_N=labels_N,
        split_N=split_N,
        domains_N=domains_N,
        domain_names=domain_names,
        fingerprint=digest("folder", *content),
        open_image=_Opener(root, tuple(files[i].path for i in kept)),
        bad_images=bad,
        image_names=tuple(files[i].path for i in kept),
    )


def is_image(name: str) -> bool:
    """Whether a file is an image by its suffix, and not hidden."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def subfolders(parent: Path) -> list[str]:
    """Names of the folders in `parent`, sorted; hidden ones and `__MACOSX` do not count."""
    try:
        return sorted(p.name for p in parent.iterdir() if _is_visible(p.name) and p.is_dir())
    except OSError as error:
        raise UserError(f"data: cannot list {parent}: {error.strerror}.") from None


def images_below(folder: Path) -> Iterator[Path]:
    """All image files in a folder and its visible sub-folders."""
    for parent, below, names in os.walk(folder):
        below[:] = [name for name in below if _is_visible(name)]
        yield from (Path(parent) / name for name in names if is_image(name))


def _is_visible(name: str) -> bool:
    return not name.startswith((".", "__"))


def _key(root: Path, path: str) -> str:
    try:
        status = (root / path).stat()
    except OSError:  # a dangling link: reading it will give the reason
        return f"{path}|?"
    return f"{path}|{status.st_size}|{status.st_mtime_ns}"
