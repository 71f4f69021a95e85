"""Holds out classes or a domain that no client trains on, for protocols that test on them.

A protocol such as base-to-new or leave-one-domain-out calls it before the data are divided among
clients. The result is a view of the data set with the same images under the same indices, so that
the feature cache stays valid. Held-out images are marked `HELD`, and their label in the view is -1.
Suffixes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.dataset import HELD, TEST, ImageDataset


# The generated `==` would fail: the truth value of compared arrays is not defined.
@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out images, on which a protocol tests at the end.

    Attributes:
        kind: whether classes or a domain were held out.
        name: what messages and tables call the held-out images.
        class_names: the held-out classes, or all classes if a domain was held out.
        index_N: indices of the images in the data set.
        labels_N: index of each image's class in `class_names`.
    """

    kind: Literal["classes", "domain"]
    name: str
    class_names: tuple[str, ...]
    index_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]


def hold_out_classes(dataset: ImageDataset, held: Sequence[int]) -> tuple[ImageDataset, HeldOut]:
    """Hold out some classes.

    Args:
        dataset: the data set, which is not changed.
        held: labels of the classes to hold out, in any order.

    Returns:
        The view without these classes, whose remaining classes are renumbered from 0 in the same
        order; and the test images of the held-out classes, numbered likewise.
    """
    held_C = np.isin(np.arange(len(dataset.class_names)), held)
    # A class's new label is the number of earlier classes on its side.
    new_label_C = np.where(held_C, np.cumsum(held_C), np.cumsum(~held_C)) - 1
    is_held_N = held_C[dataset.labels_N]
    names = np.array(dataset.class_names, dtype=object)
    superclasses = np.array(dataset.superclass_names, dtype=object)
    view = replace(
        dataset,
        class_names=tuple(names[~held_C]),
        labels_N=np.where(is_held_N, -1, new_label_C[dataset.labels_N]),
        split_N=np.where(is_held_N, HELD, dataset.split_N).astype(np.int8),
        superclass_names=tuple(superclasses[~held_C]) if len(superclasses) else (),
    )
    index_N = np.flatnonzero(is_held_N & (dataset.split_N == TEST))
    labels_N = new_label_C[dataset.labels_N[index_N]]
    return view, HeldOut("classes", "classes", tuple(names[held_C]), index_N, labels_N)


def hold_out_domain(
    dataset: ImageDataset, domain: int, *, tests_only: bool
) -> tuple[ImageDataset, HeldOut]:
    """Hold out one domain.

    Args:
        dataset: the data set, which is not changed.
        domain: index of the domain to hold out.
        tests_only: whether to test on the test split of the domain only, instead of on all its
            images.

    Returns:
        The view without the domain, whose other domains are renumbered from 0 in the same order;
        and the images of the domain to test on.
    """
    is_held_N = dataset.domains_N == domain
    names = dataset.domain_names
    view = replace(
        dataset,
        domains_N=dataset.domains_N - (dataset.domains_N > domain),
        domain_names=(*names[:domain], *names[domain + 1 :]),
        labels_N=np.where(is_held_N, -1, dataset.labels_N),
        split_N=np.where(is_held_N, HELD, dataset.split_N).astype(np.int8),
    )
    # The domain of a held-out image is meaningless in the view, but it must be a valid index.
    view.domains_N[is_held_N] = 0
    chosen_N = is_held_N & (dataset.split_N == TEST) if tests_only else is_held_N
    index_N = np.flatnonzero(chosen_N)
    labels_N = dataset.labels_N[index_N]
    return view, HeldOut("domain", names[domain], dataset.class_names, index_N, labels_N)
