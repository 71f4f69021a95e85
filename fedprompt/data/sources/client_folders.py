"""One image folder per client, `folder/class/*.jpg`, and optionally one for the server's tests.

The folders decide which client has which images, so no partition scheme is used. Each folder is
divided into local training and test images separately. The images of client k, their order, their
split and their cached features depend only on that client's folder, on `data.class_names` and on
the seed. A node of a deployment that has one folder therefore computes the same numbers as a
simulation that has all of them. An empty entry of `data.folders` stands for a folder on another
machine.

Rules:
- `data.class_names` lists the classes of all clients in label order. Sub-folders match its names
  without regard to case, spaces, underscores and hyphens; images may lie deeper inside them.
- A client may lack classes, which is label skew. A class that is not on the list is an error,
  because its images would otherwise be left out silently.
- `data.root` contains the server's test images in the same form; null = the server has none.

Suffix: N images.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from fedprompt.config.fields import option
from fedprompt.config.schema import PartitionConfig
from fedprompt.data.cache_files import digest
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset, opener_of
from fedprompt.data.images import name_key
from fedprompt.data.sources.base import DataSource, StoredImagesConfig
from fedprompt.data.sources.parts.folder_layout import split_of
from fedprompt.data.sources.parts.image_files import ImageFile, files_dataset
from fedprompt.data.sources.parts.walk import SUFFIXES, LeftOut, files_in, images_below, subfolders
from fedprompt.errors import UserError, did_you_mean

log = logging.getLogger(__name__)
SERVER = -1
"""The owner, in `ImageDataset.owners_N`, of the server's images."""


@dataclass(frozen=True)
class ClientFoldersConfig(StoredImagesConfig):
    """One folder of images per client."""

    source: Literal["client_folders"] = option("client_folders", "the data source")
    folders: list[str] = option(
        [],
        "the folder of each client, folder/class/*.jpg; empty = each node names its own",
        path=True,
    )
    root: str | None = option(
        None, "folder with the server's test images, root/class/*.jpg; null = none", path=True
    )

    def check(self) -> None:
        """Refuse missing or repeated class names, since folders alone do not define the labels."""
        super().check()
        if len(self.class_names) < 2:
            raise UserError("source 'client_folders' needs 'class_names', at least two.")
        if len(set(map(name_key, self.class_names))) < len(self.class_names):
            raise UserError("'class_names' lists a class twice.")

    def check_partition(self, partition: PartitionConfig) -> None:
        """Refuse a number of folders that is not the number of clients, and a partition file.

        Args:
            partition: the `partition` section of the same experiment.

        Raises:
            UserError: the message names the key.
        """
        count = len(self.folders)
        if count not in (0, partition.clients):
            raise UserError(
                f"config: data.folders has {count} folders for partition.clients="
                f"{partition.clients}; list one for each client, or none if each node has its own."
            )
        if partition.file is not None:
            raise UserError(
                "config: partition.file cannot be used with data.source=client_folders, whose "
                "folders are the partition."
            )


class ClientFolders(DataSource):
    """The images of every client whose folder is on this machine, then those of the server."""

    name = "client_folders"
    Config = ClientFoldersConfig

    @staticmethod
    def load(config: ClientFoldersConfig, seed: int, cache_dir: Path) -> ImageDataset:
        """Open all folders that are on this machine.

        Args:
            config: the folders and the class names.
            seed: not used here; the partition draws the local test images of each folder.
            cache_dir: folder that stores hashes of the images between runs.

        Returns:
            The images of all folders. Every folder is a domain and has an owner; clients' images
            are `TRAIN` and the server's `TEST`.

        Raises:
            UserError: two clients have the same folder, a folder does not exist, contains no
                images or has classes that are not in `class_names`, or an image is unreadable while
                `on_bad_image` is `error`.
        """
        _refuse_shared(config)
        names, parts, owners = [], [], []
        # Folders are opened one by one, each as a data set with a fingerprint and cache of its
        # own, so that a client's images do not depend on which other folders are present.
        for client, folder in enumerate(config.folders):
            if folder:
                names.append(f"client-{client}")
                parts.append(_load_folder(config, folder, names[-1], TRAIN, seed, cache_dir))
                owners.append(client)
        if config.root is not None:
            names.append("server")
            parts.append(_load_folder(config, config.root, names[-1], TEST, seed, cache_dir))
            owners.append(SERVER)
        return _join(config, names, parts, owners)


def _refuse_shared(config: ClientFoldersConfig) -> None:
    """Refuse a folder that two clients, or a client and the server's tests, have in common."""
    holder_of: dict[Path, str] = {}
    folders = [(f"client {k}", folder) for k, folder in enumerate(config.folders) if folder]
    if config.root is not None:
        folders.append(("the server's test images (data.root)", config.root))
    for holder, folder in folders:
        # Links to one folder are the same folder.
        place = Path(folder).expanduser().resolve()
        other = holder_of.setdefault(place, holder)
        if other != holder:
            raise UserError(
                f"data: {folder} is the folder of {other} and of {holder}; the same images would "
                "count several times, or be trained and tested on. Give each its own folder."
            )


def _join(
    config: ClientFoldersConfig,
    names: Sequence[str],
    parts: Sequence[ImageDataset],
    owners: Sequence[int],
) -> ImageDataset:
    """Join the data sets of the folders; each becomes a domain and has an owner."""
    empty = np.zeros(0, dtype=np.int64)  # a server may have no folder; NumPy joins no empty list
    sizes = [len(part) for part in parts]
    owners_N = np.repeat(np.array(owners, dtype=np.int64), sizes)
    # All clients are listed, also those on other machines: a client is the same domain everywhere.
    domain_names = (*(f"client {k}" for k in range(len(config.folders))), "server")
    return ImageDataset(
        name=config.title,
        class_names=tuple(name.strip() for name in config.class_names),
        labels_N=np.concatenate([empty, *(part.labels_N for part in parts)]),
        split_N=np.concatenate([empty.astype(np.int8), *(part.split_N for part in parts)]),
        domains_N=np.where(owners_N == SERVER, len(config.folders), owners_N),
        domain_names=domain_names,
        fingerprint=digest("client folders", *(part.fingerprint for part in parts)),
        open_image=opener_of(parts, [np.arange(size) for size in sizes]),
        bad_images=tuple(bad for part in parts for bad in part.bad_images),
        # Folders may have images of the same name; the client's number makes the names unique.
        image_names=tuple(
            f"{name}/{image}"
            for name, part in zip(names, parts, strict=True)
            for image in part.image_names
        ),
        owners_N=owners_N,
        hashes=tuple(image_hash for part in parts for image_hash in part.hashes),
        portable=True,
        notes=tuple(note for part in parts for note in part.notes),
        parts=tuple(parts),
    )


def _load_folder(
    config: ClientFoldersConfig, folder: str, title: str, split: int, seed: int, cache_dir: Path
) -> ImageDataset:
    """Open the images of one folder, sorted by path and all in `split`."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.is_file() else "does not exist"
        raise UserError(f"data: {title}: {root} {what}; it must contain <class>/*.jpg.")
    label_of = _labels(config.class_names, subfolders(root), title, root)
    left_out = LeftOut()
    files = [
        ImageFile(path.relative_to(root).as_posix(), label, split)
        for class_folder, label in label_of.items()
        for path in images_below(root / class_folder, left_out)
    ]
    for path in files_in(root):
        left_out.add(path)
    # `os.walk` lists files in an order that depends on the file system, and so differs on a node.
    files.sort(key=lambda file: file.path)
    dataset = files_dataset(
        config, root, files, tuple(config.class_names), (title,),
        test_fraction=None, seed=seed, cache_dir=cache_dir,
    )  # fmt: skip
    if not len(dataset):
        raise UserError(
            f"data: {title}: no readable image in {root}/<class>/ ({', '.join(SUFFIXES)})."
        )
    if left_out.images:
        log.warning("%s: not read: %s in %s", title, left_out.images, root)
    unused = f"; not used: {left_out}" if left_out.suffixes else ""
    found = len(set(dataset.labels_N.tolist()))
    note = f"{title}: {root}: {found} classes, {len(dataset)} images{unused}"
    return replace(dataset, notes=(note,))


def _labels(
    class_names: list[str], folders: Sequence[str], title: str, root: Path
) -> dict[str, int]:
    """The label of each class folder; `title` and `root` are for messages."""
    label_of_key = {name_key(name): label for label, name in enumerate(class_names)}
    label_of: dict[str, int] = {}
    folder_of: dict[int, str] = {}
    for folder in folders:
        label = label_of_key.get(name_key(folder))
        if label is None:
            # Clients' local tests are drawn from their images, so there are no folders of splits.
            if split_of(folder) is not None and len(folders) <= 3:
                raise UserError(
                    f"data: {title}: {root} contains '{folder}', the name of a split; move the "
                    f"class folders to {root}/<class>: local test images are held out by "
                    "partition.local_test_fraction."
                )
            more = sum(name_key(name) not in label_of_key for name in folders) - 1
            rest = f" (and {more} more)" if more else ""
            raise UserError(
                f"data: {title}: {root} has a class '{folder}'{rest} that is not in "
                f"data.class_names; rename or remove it.{did_you_mean(folder, class_names)}"
            )
        # Their images would be joined silently, although one of the folders may be a mistake.
        if label in folder_of:
            raise UserError(
                f"data: {title}: folders '{folder_of[label]}' and '{folder}' in {root} are the "
                "same class; merge them."
            )
        label_of[folder], folder_of[label] = label, folder
    return label_of
