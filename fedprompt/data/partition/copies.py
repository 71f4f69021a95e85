"""Finds files that occur several times where that spoils a result.

A partition holds every image once, but a folder may hold the same file under two names: then a test
image may also be a training image, or an image may have two classes.
"""

from __future__ import annotations

import logging

import numpy as np

from fedprompt.data.dataset import ImageDataset
from fedprompt.data.partition.holders import Partition

log = logging.getLogger(__name__)


def warn_of_copies(dataset: ImageDataset, partition: Partition) -> None:
    """Warn of test images that are also training images, and of images of two classes.

    Args:
        dataset: the images. Nothing is done if they have no hashes.
        partition: which of them are trained and tested on.
    """
    if not dataset.hashes:
        return
    hashes_N = np.array(dataset.hashes)
    trained = set(hashes_N[partition.train_flat].tolist())
    for where, index in {
        "the server's test images": partition.server_test,
        "the clients' test images": partition.test_flat,
    }.items():
        copies = [int(i) for i in index if hashes_N[i] in trained]
        if copies:
            log.warning(
                "%s: %d of %d of %s are copies of training images, e.g. %s; accuracies on them are "
                "too high. Remove the copies.",
                dataset.name, len(copies), len(index), where, _name(dataset, copies[0]),
            )  # fmt: skip
    label_of: dict[str, int] = {}
    twice: list[int] = []
    for i in np.flatnonzero(dataset.labels_N >= 0).tolist():
        if label_of.setdefault(dataset.hashes[i], int(dataset.labels_N[i])) != dataset.labels_N[i]:
            twice.append(i)
    if twice:
        log.warning(
            "%s: %d images are also in another class, e.g. %s; remove them from one.",
            dataset.name, len(twice), _name(dataset, twice[0]),
        )  # fmt: skip


def _name(dataset: ImageDataset, index: int) -> str:
    return dataset.image_names[index] if dataset.image_names else f"image {index}"
