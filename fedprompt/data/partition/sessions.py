"""Class-incremental learning: classes arrive in sessions.

With `partition.sessions` the classes are divided, in label order, into as many sessions, and the
rounds of a run likewise. In a session, clients train on their images of its classes alone, and the
names of all classes seen so far compete. Tests have images of the classes seen so far. Prompts and
private tensors are kept from session to session.

Source: Image-Object-Specific Prompt Learning for Few-Shot Class-Incremental Learning (Yoon et al.,
arXiv 2309.02833) and the literature before it: the first session has many classes and all images of
them (`first_session_share`), and a later one has few images of each class (`session_shots`). How we
differ: the paper is not federated. Here a client has the images of a session's classes that the
partition gives it; one without any does not train in the session.

Suffixes: N images, C classes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.schema import PartitionConfig
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.partition.draws import Indices
from fedprompt.data.partition.holders import Partition
from fedprompt.errors import UserError
from fedprompt.rng import generator


def bounds(options: PartitionConfig, classes: int) -> list[tuple[int, int]]:
    """The classes of each session.

    Args:
        options: the number of sessions and the share of the first one.
        classes: number of classes C.

    Returns:
        Per session, its first label and the label after its last one. Where classes cannot be
        divided evenly, earlier sessions have one more.

    Raises:
        UserError: there are fewer than two classes in the first session, or none in another.
    """
    sessions, share = options.sessions, options.first_session_share
    if share:
        # Rounded, so that float noise does not make 11 of 0.55 x 20 classes 12.
        first = int(np.ceil(round(share * classes, 9)))
        later = np.array_split(np.arange(first, classes), sessions - 1)
        sizes = [first, *map(len, later)]
    else:
        sizes = [len(part) for part in np.array_split(np.arange(classes), sessions)]
    if sizes[0] < 2 or min(sizes) < 1:
        raise UserError(
            f"partition.sessions={sessions}: of {classes} classes the sessions would have "
            f"{', '.join(map(str, sizes))}; the first needs two, and every other one. Change "
            "partition.sessions or partition.first_session_share."
        )
    ends = np.cumsum(sizes).tolist()
    return list(zip([0, *ends], ends, strict=False))


def in_session(
    options: PartitionConfig, dataset: ImageDataset, partition: Partition, session: int, seed: int
) -> tuple[ImageDataset, Partition]:
    """What exists in a session.

    Args:
        options: the sessions.
        dataset: the whole data set.
        partition: who holds which of its images.
        session: the session, from 1.
        seed: the experiment's seed, for the draw of `session_shots`.

    Returns:
        The data set with the names of the classes seen so far, and the partition with training
        images of the session's classes and test and validation images of the classes seen so far.

    Raises:
        UserError: the classes cannot be divided, or no client has training images of the session.
    """
    first, end = bounds(options, len(dataset.class_names))[session - 1]
    labels_N = dataset.labels_N
    new_N = (labels_N >= first) & (labels_N < end)
    partition = partition.restricted(new_N, (labels_N >= 0) & (labels_N < end))
    if session > 1 and options.session_shots is not None:
        partition = partition.trained_on(
            [
                _few(partition.train(k), labels_N, options.session_shots, seed, session, k)
                for k in range(partition.num_clients)
            ]
        )
    if not len(partition.train_flat):
        names = ", ".join(dataset.class_names[first:end])
        raise UserError(
            f"partition.sessions: no client has training images of session {session} ({names})."
        )
    # Labels of later classes stay as they are; nobody holds such an image.
    seen = replace(
        dataset,
        class_names=dataset.class_names[:end],
        superclass_names=dataset.superclass_names[:end],
    )
    return seen, partition


def _few(
    own_N: Indices, labels_N: NDArray[np.int64], shots: int, seed: int, session: int, client: int
) -> Indices:
    """At most `shots` of a client's images of each class, ascending."""
    order = own_N[generator(seed, "session shots", session, client).permutation(len(own_N))]
    kept = [order[labels_N[order] == label][:shots] for label in np.unique(labels_N[own_N])]
    return np.sort(np.concatenate([own_N[:0], *kept]))
