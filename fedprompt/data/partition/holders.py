"""A partition as a value: which images each client and the server hold.

Suffixes: N images, K clients, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.partition.draws import Indices

SERVER, NOBODY = -1, -2
"""Holders of an image that are no clients."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Which images each client and the server hold.

    Indices point into the `ImageDataset` that was partitioned. They are stored compactly: client k
    has the images `flat[offsets[k]:offsets[k + 1]]`, in ascending order.

    Attributes:
        train_flat: training images of all clients.
        train_offsets: (K + 1,), where each client's training images begin in `train_flat`.
        test_flat: local test images of all clients.
        test_offsets: (K + 1,), likewise for `test_flat`.
        server_test: test images of the server.
        unlabelled: clients whose training images have no labels, so that they never train.

    Raises:
        ValueError: an image is held twice.
    """

    train_flat: Indices
    train_offsets: Indices
    test_flat: Indices
    test_offsets: Indices
    server_test: Indices
    unlabelled: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        held = np.concatenate((self.train_flat, self.test_flat, self.server_test))
        if len(np.unique(held)) < len(held):
            raise ValueError("an image is held twice")

    @classmethod
    def of_holders(
        cls,
        holder_N: Indices,
        is_test_N: NDArray[np.bool_],
        clients: int,
        unlabelled: frozenset[int] = frozenset(),
    ) -> Partition:
        """The partition that gives each image to one holder.

        Args:
            holder_N: a client, `SERVER` or `NOBODY` for each image. What the server holds are test
                images.
            is_test_N: which of the clients' images are for testing.
            clients: number of clients K.
            unlabelled: clients whose training images have no labels.
        """
        arrays = (
            *_group(holder_N, ~is_test_N, clients),
            *_group(holder_N, is_test_N, clients),
            np.flatnonzero(holder_N == SERVER).astype(np.int64),
        )
        for array in arrays:
            array.flags.writeable = False
        return cls(*arrays, unlabelled=unlabelled)

    @property
    def num_clients(self) -> int:
        """Number of clients K."""
        return len(self.train_offsets) - 1

    @property
    def trainable(self) -> list[int]:
        """Clients with labelled training images, ascending: those that can train."""
        holding = np.flatnonzero(np.diff(self.train_offsets))
        return [int(k) for k in holding if int(k) not in self.unlabelled]

    def train(self, client: int) -> Indices:
        """Indices of the images that a client trains on."""
        return self.train_flat[self.train_offsets[client] : self.train_offsets[client + 1]]

    def test(self, client: int) -> Indices:
        """Indices of the images that a client tests on; it trains on none of them."""
        return self.test_flat[self.test_offsets[client] : self.test_offsets[client + 1]]

    def train_counts(self, labels_N: NDArray[np.int64], num_classes: int) -> Indices:
        """Local training images per client and class, (K, C)."""
        return count_values(self.train_flat, self.train_offsets, labels_N, num_classes)

    def test_counts(self, labels_N: NDArray[np.int64], num_classes: int) -> Indices:
        """Local test images per client and class, (K, C)."""
        return count_values(self.test_flat, self.test_offsets, labels_N, num_classes)


def _group(holder_N: Indices, mask_N: NDArray[np.bool_], clients: int) -> tuple[Indices, Indices]:
    """(flat, offsets) of the images in the mask that clients hold."""
    chosen = np.flatnonzero(mask_N & (holder_N >= 0)).astype(np.int64)
    chosen = chosen[np.argsort(holder_N[chosen], kind="stable")]
    sizes_K = np.bincount(holder_N[chosen], minlength=clients)
    return chosen, np.concatenate(([0], np.cumsum(sizes_K))).astype(np.int64)


def count_values(flat: Indices, offsets: Indices, values_N: Indices, num_values: int) -> Indices:
    """How many of its images in `flat` have each value, per client: (K, num_values)."""
    clients = len(offsets) - 1
    client = np.repeat(np.arange(clients), np.diff(offsets))
    cells = np.bincount(client * num_values + values_N[flat], minlength=clients * num_values)
    return cells.reshape(clients, num_values).astype(np.int64)
