"""One image folder per client, `folder/class/*.jpg`, and perhaps one with the server's test images.

The folders decide who holds what, so no partition scheme is at work; each is split into local train
and test by itself. Client k's images, their order, their split and their cached features depend on
its own folder, `data.class_names` and the seed only: a node of a deployment that has just this
folder works on the same numbers as a simulation that has them all. A folder '' is elsewhere.

Rules:
- `data.class_names` is the one list of labels. Sub-folders match its names ignoring case, spaces,
  underscores and hyphens; images may lie deeper inside them.
- A client may lack classes: that is label skew. A class that is not on the list is an error, since
  its images would be left out in silence.
- `data.root` holds the server's test images, in the same form; null = the server has none.

Suffix: N images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedprompt.config.schema import DataConfig
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset, opener_of
from fedprompt.data.features.cache import digest
from fedprompt.data.images import name_key
from fedprompt.data.sources.image_files import (
    SUFFIXES,
    ImageFile,
    files_dataset,
    images_below,
    subfolders,
)
from fedprompt.errors import UserError, did_you_mean

SERVER = -1
"""Owner of the server's images."""


def load(config: DataConfig, seed: int, cache_dir: Path) -> ImageDataset:
    """The images of all clients whose folders are here, then those of the server.

    Raises:
        UserError: a folder that is missing, has no images or has classes that are not listed, or
            an unreadable image under `on_bad_image: error`.
    """
    names, parts, owners = [], [], []
    for client, folder in enumerate(config.folders):
        if folder:
            names.append(f"client-{client}")
            parts.append(_one(config, Path(folder), names[-1], TRAIN, seed, cache_dir))
            owners.append(client)
    if config.root is not None:
        names.append("server")
        parts.append(_one(config, Path(config.root), names[-1], TEST, seed, cache_dir))
        owners.append(SERVER)
    rows = [np.arange(len(part)) for part in parts]
    empty = np.zeros(0, dtype=np.int64)
    sizes = [len(part) for part in parts]
    owners_N = np.repeat(np.array(owners, dtype=np.int64), sizes)
    domain_names = (*(f"client {k}" for k in range(len(config.folders))), "server")
    return ImageDataset(
        name=config.title,
        class_names=tuple(name.strip() for name in config.class_names),
        labels_N=np.concatenate([empty, *(part.labels_N for part in parts)]),
        split_N=np.concatenate([empty.astype(np.int8), *(part.split_N for part in parts)]),
        domains_N=np.where(owners_N == SERVER, len(config.folders), owners_N),
        domain_names=domain_names,
        fingerprint=digest("client folders", *(part.fingerprint for part in parts)),
        open_image=opener_of(parts, rows),
        bad_images=tuple(bad for part in parts for bad in part.bad_images),
        image_names=tuple(
            f"{name}/{image}"
            for name, part in zip(names, parts, strict=True)
            for image in part.image_names
        ),
        owners_N=owners_N,
        parts=tuple(parts),
    )


def _one(
    config: DataConfig, root: Path, title: str, split: int, seed: int, cache_dir: Path
) -> ImageDataset:
    """The images of one folder, all in `split`, sorted by path."""
    root = root.expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.is_file() else "does not exist"
        raise UserError(f"data: {title}: {root} {what}; it must hold <class>/*.jpg.")
    label_of = _labels(config.class_names, subfolders(root), title, root)
    files = [
        ImageFile(path.relative_to(root).as_posix(), label, split)
        for folder, label in label_of.items()
        for path in images_below(root / folder)
    ]
    files.sort(key=lambda file: file.path)
    dataset = files_dataset(
        config, root, files, tuple(config.class_names), (title,),
        hold_out=False, seed=seed, cache_dir=cache_dir,
    )  # fmt: skip
    if not len(dataset):
        raise UserError(
            f"data: {title}: no readable image in {root}/<class>/ ({', '.join(SUFFIXES)})."
        )
    return dataset


def _labels(wanted: list[str], folders: list[str], title: str, root: Path) -> dict[str, int]:
    """The label of each class folder."""
    label_of_key = {name_key(name): label for label, name in enumerate(wanted)}
    label_of: dict[str, int] = {}
    twins: dict[int, str] = {}
    for folder in folders:
        label = label_of_key.get(name_key(folder))
        if label is None:
            more = sum(name_key(other) not in label_of_key for other in folders) - 1
            others = f" (and {more} more)" if more else ""
            raise UserError(
                f"data: {title}: {root} has a class '{folder}'{others} that is not in "
                f"data.class_names; rename it or take it out.{did_you_mean(folder, wanted)}"
            )
        if label in twins:
            raise UserError(
                f"data: {title}: folders '{twins[label]}' and '{folder}' in {root} are the same "
                "class; merge them."
            )
        label_of[folder], twins[label] = label, folder
    return label_of
