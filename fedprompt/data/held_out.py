"""Classes or a domain that no client holds: views of a data set for protocols that need some.

A view has the same images under the same indices, so that the feature cache serves it as it is.
Held-out images are marked `HELD` and have no label in the view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.dataset import HELD, TEST, ImageDataset


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Images to be tested on in the end.

    `index_N` points into the data set; `labels_N` indexes `class_names`, which are the held-out
    classes, or all classes where a domain is held out. `name` says what was held out.
    """

    kind: Literal["classes", "domain"]
    name: str
    class_names: tuple[str, ...]
    index_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]


def hold_out_classes(dataset: ImageDataset, held: Sequence[int]) -> tuple[ImageDataset, HeldOut]:
    """The data set without the classes `held`, and their test images, classes in label order."""
    held_C = np.isin(np.arange(len(dataset.class_names)), held)
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
    """The data set without one domain, and that domain's images: of the test split, or all."""
    is_held_N = dataset.domains_N == domain
    names = dataset.domain_names
    view = replace(
        dataset,
        domains_N=dataset.domains_N - (dataset.domains_N > domain),
        domain_names=(*names[:domain], *names[domain + 1 :]),
        labels_N=np.where(is_held_N, -1, dataset.labels_N),
        split_N=np.where(is_held_N, HELD, dataset.split_N).astype(np.int8),
    )
    # Of a held-out image the view's domain means nothing; the index must stay valid all the same.
    view.domains_N[is_held_N] = 0
    chosen_N = is_held_N & (dataset.split_N == TEST) if tests_only else is_held_N
    index_N = np.flatnonzero(chosen_N)
    labels_N = dataset.labels_N[index_N]
    return view, HeldOut("domain", names[domain], dataset.class_names, index_N, labels_N)
