"""Reads the binary version of CIFAR: files of records of label bytes and 3,072 pixel bytes.

The Python version consists of pickles. It is refused, because unpickling executes code from the
file. Suffix: N images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedprompt.data.cache_files import digest
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.images import name_key
from fedprompt.data.sources.parts.layouts import Copy
from fedprompt.errors import UserError

SIDE = 32
PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True)
class Records:
    """The labels and splits of all records, and the place of each image.

    Called with an index, it opens that image; it is a class so that a data set can be pickled.

    Attributes:
        files: the files of records, training files first.
        file_N: the file of each image, an index into `files`.
        row_N: index of each image's record in its file.
        labels_N: class of each image.
        split_N: `TRAIN` or `TEST`.
        label_bytes: bytes of a record before its pixels.
    """

    files: tuple[Path, ...]
    file_N: NDArray[np.int64]
    row_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]
    split_N: NDArray[np.int8]
    label_bytes: int

    def __call__(self, index: int) -> Image.Image:
        """Open image `index`, stored as a red, a green and a blue plane, each row by row."""
        path = self.files[self.file_N[index]]
        size = self.label_bytes + PIXELS
        try:
            # Opened per image: threads would move the position of a shared file, and an open file
            # cannot be pickled.
            with path.open("rb") as file:
                file.seek(int(self.row_N[index]) * size + self.label_bytes)
                planes = np.frombuffer(file.read(PIXELS), dtype=np.uint8)
            return Image.fromarray(planes.reshape(3, SIDE, SIDE).transpose(1, 2, 0))
        except (OSError, ValueError) as error:
            raise UserError(
                f"data: {path} was readable and no longer is: {error}; start again."
            ) from None


def load(copy: Copy, title: str) -> ImageDataset:
    """Open the data set in a copy.

    Args:
        copy: the folder, a copy of CIFAR-10 or CIFAR-100.
        title: name of the data set in tables and plots.

    Returns:
        The images in the order of the files. Class names are those of the catalogue's entry.

    Raises:
        UserError: files are missing or incomplete, have other classes, or are the Python version.
    """
    records = read_records(copy)
    # Raw pixels cannot be damaged in a way that decoding would reveal, so images are not checked
    # one by one, and hashes of whole files key the feature cache.
    hashes = []
    for path in records.files:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "blake2b").hexdigest())
    return ImageDataset(
        name=title,
        class_names=tuple(copy.entry.classes.values()),
        labels_N=records.labels_N,
        split_N=records.split_N,
        domains_N=np.zeros(len(records.labels_N), dtype=np.int64),
        domain_names=(title,),
        fingerprint=digest("cifar", *hashes),
        open_image=records,
        image_names=tuple(
            f"{records.files[file].name}/{row}"
            for file, row in zip(records.file_N, records.row_N, strict=True)
        ),
    )


def read_records(copy: Copy) -> Records:
    """Read the labels and places of all images.

    Raises:
        UserError: files are missing or incomplete, have other classes, or are the Python version.
    """
    layout = copy.entry.layout
    folder = _folder(copy, layout)
    label_bytes = int(layout["label_bytes"])
    _check_names(copy, folder / layout["names"])
    files: list[Path] = []
    labels: list[NDArray[np.int64]] = []
    splits: list[NDArray[np.int8]] = []
    for split, code in (("train", TRAIN), ("test", TEST)):
        for name in layout[split]:
            path = folder / name
            if not path.is_file():
                raise copy.problem(f"no file {name} in {folder}")
            raw = np.fromfile(path, dtype=np.uint8)
            if not len(raw) or len(raw) % (label_bytes + PIXELS):
                raise copy.problem(f"{path} is cut short ({len(raw)} bytes)")
            # The last label byte is the class: in CIFAR-100 the superclass stands before it.
            found = raw.reshape(-1, label_bytes + PIXELS)[:, label_bytes - 1].astype(np.int64)
            if found.max() >= copy.entry.num_classes:
                raise copy.problem(f"{path} has label {found.max()}: another data set")
            files.append(path)
            labels.append(found)
            splits.append(np.full(len(found), code, dtype=np.int8))
    sizes = [len(found) for found in labels]
    return Records(
        files=tuple(files),
        file_N=np.repeat(np.arange(len(files), dtype=np.int64), sizes),
        row_N=np.concatenate([np.arange(size, dtype=np.int64) for size in sizes]),
        labels_N=np.concatenate(labels),
        split_N=np.concatenate(splits),
        label_bytes=label_bytes,
    )


def _folder(copy: Copy, layout: Mapping[str, Sequence[str]]) -> Path:
    python = str(layout["python_version"])
    binary = (copy.root / str(layout["images"][0])).is_dir()
    if not binary and ((copy.root / python).is_dir() or copy.root.name == python):
        raise UserError(
            f"data: {copy.entry.name}: {copy.root} holds the Python version ({python}), a set of "
            f"pickles, which is not read; download the binary version, {copy.entry.download}, from "
            f"{copy.entry.homepage}, or leave data.root out and load it from the hub."
        )
    return copy.images_folder(layout["images"])


def _check_names(copy: Copy, path: Path) -> None:
    if not path.is_file():
        raise copy.problem(f"no file {path.name} in {path.parent}")
    theirs = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    theirs = [name for name in theirs if name]
    if [name_key(n) for n in theirs] != [name_key(n) for n in copy.entry.classes]:
        raise copy.problem(f"{path} lists other classes")
