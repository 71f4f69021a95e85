"""Images with several labels each: how they are numbered and dealt to clients.

Everything that divides images - schemes of partitions, local splits, few-shot draws, hold-outs -
goes by one class per image. An image with several labels goes by its rarest one: so a Dirichlet
partition skews the labels that distinguish images, and not those that nearly all of them have, and
a stratified hold-out has some images of every label.

Suffixes: N images, C labels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.dataset import ImageDataset


def rarest_labels(targets_NC: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The rarest label of each image: the one that the fewest images of the data set have.

    Args:
        targets_NC: which labels each image has; at least one.

    Returns:
        Indices of labels (N,). Of equally rare labels, the first counts.
    """
    images_C = targets_NC.sum(axis=0, dtype=np.int64)
    # Labels that an image does not have are more frequent than any.
    frequency_NC = np.where(targets_NC, images_C, len(targets_NC) + 1)
    rarest_N: NDArray[np.int64] = frequency_NC.argmin(axis=1).astype(np.int64)
    return rarest_N


def with_targets(
    dataset: ImageDataset, names: tuple[str, ...], targets_NC: NDArray[np.bool_]
) -> ImageDataset:
    """The same images with several labels each.

    Args:
        dataset: the images; its classes are replaced.
        names: the labels, in the order of the columns.
        targets_NC: which labels each image has.

    Returns:
        A multi-label data set. Its fingerprint stays, since no pixel changes.
    """
    return replace(
        dataset,
        class_names=names,
        labels_N=rarest_labels(targets_NC),
        targets_NC=targets_NC,
        superclass_names=(),
    )
