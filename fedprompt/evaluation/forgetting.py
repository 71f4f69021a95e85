"""A request to be forgotten: whose images it names, and federations without them.

Suffixes: P images of the pool, S shadows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.dataset import ImageDataset
from fedprompt.data.partition import Partition
from fedprompt.rng import generator

Indices = NDArray[np.int64]


# The generated `==` would fail: the truth value of compared arrays is not defined.
@dataclass(frozen=True, eq=False)
class Request:
    """The images of a client or of some classes, which are to be forgotten.

    The pool holds the forgotten training images and local test images of the same kind: test
    images of the client, or of the classes on the clients that have training images of them. They
    are the members and the others of a membership attack.

    Attributes:
        title: what is forgotten, in words.
        classes: labels of the forgotten classes; empty if a client is forgotten.
        client: the forgotten client, or None.
        pool_P: indices of the images.
        holder_P: the client that holds each of them.
        member_P: whether the client has trained on it.
    """

    title: str
    classes: tuple[int, ...]
    client: int | None
    pool_P: Indices
    holder_P: Indices
    member_P: NDArray[np.bool_]

    @classmethod
    def of_client(cls, partition: Partition, client: int) -> Request:
        """The request of one client."""
        return cls(f"client {client}", (), client, *_pool(partition, [client], None))

    @classmethod
    def of_classes(
        cls,
        dataset: ImageDataset,
        partition: Partition,
        classes: tuple[int, ...],
        clients: list[int],
    ) -> Request:
        """The request for the training images of some classes, of all clients that train."""
        names = ", ".join(dataset.class_names[c] for c in classes)
        wanted_N = np.isin(dataset.labels_N, classes)
        title = f"class {names}" if len(classes) == 1 else f"classes {names}"
        return cls(title, classes, None, *_pool(partition, clients, wanted_N))

    @property
    def forgotten(self) -> Indices:
        """Indices of the training images to forget."""
        return self.pool_P[self.member_P]

    @property
    def others(self) -> Indices:
        """Indices of the test images in the pool."""
        return self.pool_P[~self.member_P]

    def without(self, partition: Partition) -> Partition:
        """The partition without the forgotten training images; their clients keep all others."""
        return self._with(partition, np.zeros(len(self.pool_P), dtype=bool))

    def shadows(self, partition: Partition, count: int, seed: int) -> Iterator[Partition]:
        """Partitions in which the clients train on random halves of the pool instead.

        Args:
            partition: the partition of the run.
            count: S, even.
            seed: the seed of the run.
        """
        for inside_P in self.inside(count, seed):
            yield self._with(partition, inside_P)

    def inside(self, count: int, seed: int) -> NDArray[np.bool_]:
        """Which images of the pool each shadow trains on (S, P); every image is in half of them."""
        draws_SP = generator(seed, "shadows").random((count, len(self.pool_P)))
        ranks_SP = draws_SP.argsort(axis=0).argsort(axis=0)
        return np.asarray(ranks_SP < count // 2)

    def _with(self, partition: Partition, inside_P: NDArray[np.bool_]) -> Partition:
        train = [partition.train(k) for k in range(partition.num_clients)]
        for k in np.unique(self.holder_P).tolist():
            own_P = self.holder_P == k
            kept = np.setdiff1d(train[k], self.pool_P[own_P])
            train[k] = np.union1d(kept, self.pool_P[own_P & inside_P])
        return partition.trained_on(train)


def _pool(
    partition: Partition, clients: list[int], wanted_N: NDArray[np.bool_] | None
) -> tuple[Indices, Indices, NDArray[np.bool_]]:
    """`pool_P`, `holder_P` and `member_P` of the wanted images of these clients, or of all."""
    pool, holders, members = [], [], []
    for client in clients:
        parts = [partition.train(client), partition.test(client)]
        if wanted_N is not None:
            parts = [part[wanted_N[part]] for part in parts]
            # Without training images of the classes, the client has nothing to forget.
            parts = parts if len(parts[0]) else [part[:0] for part in parts]
        for part, member in zip(parts, (True, False), strict=True):
            pool.append(part)
            holders.append(np.full(len(part), client, dtype=np.int64))
            members.append(np.full(len(part), member))
    nothing = np.zeros(0, dtype=np.int64)
    return (
        np.concatenate([nothing, *pool]),
        np.concatenate([nothing, *holders]),
        np.concatenate([nothing.astype(bool), *members]),
    )
